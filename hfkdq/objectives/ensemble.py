# SPDX-License-Identifier: Apache-2.0
"""Learning from several teachers at once, sample by sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from transformers import PreTrainedModel

from ..losses.divergences import log_probabilities
from ..modeling.masks import Batch, Positions
from .base import Objective, TrainingStep
from .heads import Prediction
from .logits import LogitKD
from .model_signature import ModelSignature


@dataclass(frozen=True, kw_only=True)
class EnsembleKD(Objective):
    """The divergences from several teachers, weighted position by position: `sum_k w_k * D(teacher_k, student)`.

    With `weighting="confidence"`, `w_k = (1 - exp(c_k) / sum_j exp(c_j)) / (K - 1)` for `K` teachers, where `c_k` is the
    cross-entropy of teacher `k` with the label, so that a teacher nearer to the label counts more (Zhang et al.,
    "Confidence-Aware Multi-Teacher Knowledge Distillation", 2022). Where there is no label (none at all, or -100)
    it is the entropy of the teacher's prediction. For weights or schedules per teacher, give each a `LogitKD(teacher=name, weight=...)` instead.

    Args:
        objective (`LogitKD`, defaults to `LogitKD()`): how each teacher is compared with the student.
        teachers (list of `str`, *optional*): the names of the teachers; by default all of them.
        weighting (`str`, defaults to `"confidence"`): `"confidence"`, or `"mean"` for `1 / K`.
        weight (`float` or schedule, defaults to 1.0): factor of this term.

    Raises:
        ValueError: an unknown weighting; at `attach`, a single teacher, or what [`LogitKD`] raises.

    Example:
        ```python
        >>> from hfkdq import EnsembleKD, LogitKD
        >>> EnsembleKD(objective=LogitKD(temperature=4.0)).name
        'ensemble_kd'

        ```
    """

    uses_all_teachers: ClassVar[bool] = True

    objective: LogitKD = field(default_factory=LogitKD)
    teachers: tuple[str, ...] | list[str] | None = None
    weighting: Literal["confidence", "mean"] = "confidence"
    _members: Mapping[str, LogitKD] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.objective, LogitKD):
            raise ValueError(f"EnsembleKD weighs predictions: objective must be a LogitKD, got {self.objective!r}.")

    def attach(self, student: PreTrainedModel, teacher: Mapping[str, PreTrainedModel | ModelSignature] | Any) -> None:
        """As `Objective.attach`, with all teachers by their names."""
        super().attach(student, None)
        chosen = {name: model for name, model in teacher.items() if self.teachers is None or name in self.teachers}
        missing = set(self.teachers or ()) - chosen.keys()
        if missing or len(chosen) < 2:
            raise ValueError(
                f"EnsembleKD needs two teachers or more, got {', '.join(teacher)}"
                f"{'; there is no ' + ', '.join(sorted(missing)) if missing else ''}. Give teacher_model={{name: model, ...}}."
            )
        members = {name: self.objective.copy() for name in chosen}
        for name, model in chosen.items():
            members[name].attach(student, model)
        self._keep(_members=members)

    def positions(self, batch: Batch) -> Positions:
        return next(iter(self._members.values())).positions(batch)

    def loss(self, step: TrainingStep) -> torch.Tensor:
        values, costs, mask = [], [], None
        for name, member in self._members.items():
            one = replace(step, teacher=step.teacher[name])
            found, mask = member.values(one)
            values.append(found)
            if self.weighting == "confidence":
                costs.append(_cost(member.predictions(one)))
        stacked = torch.stack(values)
        if costs:
            doubt = torch.softmax(torch.stack(costs), dim=0)
            combined = (stacked * (1.0 - doubt) / (len(values) - 1)).sum(0)
        else:
            combined = stacked.mean(0)
        return self.objective.reduced(combined, mask)


@torch.no_grad()
def _cost(predictions: list[Prediction]) -> torch.Tensor:
    """Uncertainty of a teacher per position: cross-entropy with the label, or else its entropy."""
    costs = []
    for p in predictions:
        log_p = log_probabilities(p.teacher, valid_classes=p.valid_classes)
        cost = -(log_p.exp() * log_p).sum(-1)
        if p.target is not None and p.target.is_floating_point():  # a soft label
            cost = -(p.target * log_p).sum(-1)
        elif p.target is not None:
            of_label = -log_p.gather(-1, p.target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
            cost = torch.where(p.target < 0, cost, of_label)
        costs.append(cost if p.position_weights is None else (cost * p.position_weights).flatten(1).sum(1))
    return torch.stack(costs).mean(0)
