# SPDX-License-Identifier: Apache-2.0
"""Distillation of attention probabilities.

Needs eager attention, the only implementation that computes them; switches both models to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from ..losses.features import attention_kl, attention_mse
from ..losses.reduction import masked_mean
from ..modeling.masks import Batch, Positions, valid_count
from .base import Objective, TrainingStep
from .outline import Outline, layer_map, layers_of, mean_over_active_layers, outline_of


@dataclass(frozen=True, kw_only=True)
class AttentionKD(Objective):
    """Distance between attention distributions of matched layers.

    `mean over pairs (s, t) and heads h of D(A_teacher[t, h, q], A_student[s, h, q])`, mean over the queries `q` attended
    to. `D` is `KL(teacher || student)`, of Sun et al., "MobileBERT" (2020), or the mean over the keys attended to of the
    squared difference, after Jiao et al., "TinyBERT" (2020). Models with different numbers of heads are compared by
    the mean of each one's heads, others head by head. Both models are switched to eager attention; [`RelationKD`] needs
    no such switch.

    Args:
        layers (`dict` or `str`, *optional*): `{student layer: teacher layer}`, numbered from 1, or `"uniform"`, `"last"`
            or `"skip"`. By default the layers that `make_student` copied, or uniform.
        distance (`str`, defaults to `"kl"`): `"kl"` or `"mse"`.
        weight (`float` or schedule, defaults to 1.0): factor of this term.
        teacher (`str`, *optional*): the name of the teacher, where there are several.

    Raises:
        ValueError: an unknown distance; at `attach`, a layer out of range, a model that gives no attention
            probabilities, or models that attend over different numbers of positions.

    Example:
        ```python
        >>> from hfkdq import AttentionKD
        >>> AttentionKD(distance="mse", weight=0.1).name
        'attention_kd'

        ```
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attentions"})

    layers: Mapping[int, int] | str | None = None
    distance: Literal["kl", "mse"] = "kl"
    _pairs: tuple[tuple[int, int], ...] = field(init=False, repr=False, compare=False)
    _layers: Sequence[nn.Module] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.distance not in ("kl", "mse"):
            raise ValueError(f"AttentionKD: distance must be 'kl' or 'mse', got {self.distance!r}.")

    def attach(self, student: PreTrainedModel, teacher: PreTrainedModel | Outline | None) -> None:
        super().attach(student, teacher)
        maps, targets = outline_of(student).maps(), outline_of(teacher).maps()
        pairs = layer_map(self.layers, student, len(maps), len(targets))
        for s, t in pairs.items():
            if s == 0 or t == 0:
                raise ValueError(f"layers={self.layers!r}: layer 0 is the embeddings, which attend to nothing.")
            if maps[s - 1][2:] != targets[t - 1][2:]:
                raise ValueError(
                    f"AttentionKD compares position with position: layer {s} of the student gives attentions of shape "
                    f"{maps[s - 1]} (batch, heads, queries, keys), layer {t} of the teacher {targets[t - 1]} for the same "
                    "example. Use a student with as many positions, or objectives that compare examples: LogitKD, RKD."
                )
        read = frozenset(s - 1 for s in pairs), frozenset(t - 1 for t in pairs.values())
        self._keep(_pairs=tuple(pairs.items()), _layers=layers_of(student), _indices={"attentions": read})

    def positions(self, batch: Batch) -> Positions:
        return valid_count(batch, self.state_mask(batch))

    def loss(self, step: TrainingStep) -> torch.Tensor:
        mask = self.state_mask(step.batch)
        values = []
        for s, t in self._pairs:
            ours, theirs = step.student.attentions[s - 1], step.teacher.attentions[t - 1]
            values.append(attention_kl(ours, theirs) if self.distance == "kl" else attention_mse(ours, theirs, mask))
        mean = mean_over_active_layers(torch.stack(values), self._layers, [s for s, _ in self._pairs])
        return masked_mean(mean, mask)
