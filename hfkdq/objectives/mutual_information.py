# SPDX-License-Identifier: Apache-2.0
"""Distillation by bounds on the mutual information of the two models' hidden states."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..fields import POSITIVE
from ..losses.features import gaussian_nll, masked_mean
from ..losses.relations import info_nce
from ..modeling.masks import Batch
from .base import TrainingStep
from .layers import LayerObjective, Shape
from .projections import Projection, add_projection
from .samples import SampleObjective


def _check_vectors(name: str, s: int, state: Shape, t: int, target: Shape) -> None:
    if len(state) != 3 or len(target) != 3:
        raise ValueError(
            f"{name} compares hidden states (batch, positions, width); {s} of the student has the shape {state}, {t} of the "
            f"teacher {target}. For feature maps of convolutions use FeatureMapKD or RKD."
        )


def _add_projections(
    kind: type[Projection], student: PreTrainedModel, pairs: Sequence[tuple[int, int]], states: Sequence[Shape],
    targets: Sequence[Shape],
) -> dict[int, int]:  # fmt: skip
    """Index among the student's hidden states of a new projection of each paired layer, by the layer."""
    return {s: add_projection(student, s, partial(kind, states[s][-1], targets[t][-1]), len(states)) for s, t in pairs}


@dataclass(frozen=True, kw_only=True)
class CRD(SampleObjective):
    """Contrastive distillation: from a student's view of an example, tell the teacher's among those of the batch.

    `-log(exp(z_i . t_i / T) / sum_j exp(z_i . t_j / T))`, mean over the examples `i`; `z` is a learned map of the student's
    mean hidden state and `t` the teacher's mean hidden state, both scaled to length 1. Tian et al., "Contrastive
    Representation Distillation" (2020), in the form of InfoNCE (van den Oord et al., "Representation Learning with
    Contrastive Predictive Coding", 2018): the other examples of the micro batch are the negatives, without a memory
    of earlier ones. So batches should be large, and a batch of 1 teaches nothing.

    In the project's own comparison it helped nowhere: docs/results/objectives.md.

    Args:
        temperature (`float`, defaults to 0.07): `T`, larger than 0.
        exclude_same_class (`bool`, defaults to `True`): where labels are one class per example, examples of the same
            class are no negatives of each other, as in the paper. Without such labels all others are.
        layers (`dict` or `str`, *optional*): as of [`HiddenStateKD`], not dynamic; by default the last layers of both.
        weight (`float` or schedule, defaults to 1.0): factor of this term; the paper has 0.8.
        teacher (`str`, *optional*): the name of the teacher, where there are several.

    Raises:
        ValueError: a temperature that is not larger than 0; at `attach`, a layer out of range, or models that return no
            hidden states or feature maps instead.

    Example:
        ```python
        >>> from hfkdq import CRD
        >>> CRD(temperature=0.1, weight=0.8).name
        'crd'

        ```
    """

    temperature: Annotated[float, POSITIVE] = 0.07
    exclude_same_class: bool = True
    _places: Mapping[int, int] = field(init=False, repr=False, compare=False)

    def _check_pair(self, student: PreTrainedModel, s: int, state: Shape, t: int, target: Shape) -> None:
        super()._check_pair(student, s, state, t, target)
        _check_vectors("CRD", s, state, t, target)

    def _attach_pairs(self, student: PreTrainedModel, states: Sequence[Shape], targets: Sequence[Shape]) -> None:
        super()._attach_pairs(student, states, targets)
        # The mean over positions of a linear map is the map of the mean.
        self._keep(_places=_add_projections(Projection, student, self._pairs, states, targets))

    def loss(self, step: TrainingStep) -> torch.Tensor:
        excluded = _same_class(step.batch) if self.exclude_same_class else None
        values = [info_nce(*pair, self.temperature, excluded) for pair in self.represented(step, self._places)]
        return torch.stack(values).mean()


def _same_class(batch: Batch) -> torch.Tensor | None:
    """Mask of pairs of examples with the same label, `(batch, batch)`; `None` without one class per example."""
    labels = batch.get("labels")
    if not isinstance(labels, torch.Tensor) or labels.dim() != 1 or labels.is_floating_point():
        return None
    return (labels.unsqueeze(0) == labels.unsqueeze(1)) & labels.ne(-100)


class GaussianProjection(Projection):
    """A linear map to a mean, and a learned variance per channel: `[mean, log variance]` on the last axis."""

    def __init__(self, width: int, teacher_width: int, variance: float = 5.0, smallest: float = 1e-5) -> None:
        super().__init__(width, teacher_width)
        self.smallest = smallest
        # So that softplus gives `variance` at the start.
        self.spread = nn.Parameter(torch.full((teacher_width,), math.log(math.expm1(variance - smallest))))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        mean = super().forward(states)
        log_variance = (F.softplus(self.spread.float()) + self.smallest).log()
        return torch.cat([mean.float(), log_variance.expand_as(mean)], dim=-1)  # (batch, seq, 2 * teacher_width)


@dataclass(frozen=True, kw_only=True)
class VID(LayerObjective):
    """Variational distillation: how likely the teacher's hidden states are, predicted from the student's.

    `mean over pairs (s, t) and channels c of 1/2 * (log v_c + (h_teacher[t] - W_s h_student[s])_c^2 / v_c)`, mean over the
    positions attended to; `W_s` and one variance `v_c` per channel are learned. Ahn et al., "Variational Information
    Distillation for Knowledge Transfer" (2019). Its negative is, up to the entropy of the teacher, a lower bound of
    the mutual information. The value can become negative.

    In the project's own comparison it helped nowhere: docs/results/objectives.md.

    Args:
        layers (`dict` or `str`, *optional*): as of [`HiddenStateKD`], but not dynamic.
        weight, teacher: as of every [`Objective`]; 1.0 and none by default.

    Raises:
        ValueError: at `attach`, a layer out of range, models that return no hidden states or feature maps instead, or
            states over different numbers of positions.

    Example:
        ```python
        >>> from hfkdq import VID
        >>> VID(layers={1: 2, 2: 4}).name
        'vid'

        ```
    """

    _places: Mapping[int, int] = field(init=False, repr=False, compare=False)

    def _check_pair(self, student: PreTrainedModel, s: int, state: Shape, t: int, target: Shape) -> None:
        _check_vectors("VID", s, state, t, target)
        if state[1] != target[1]:
            raise ValueError(
                f"VID compares position with position: hidden state {s} of the student has the shape {state}, {t} "
                f"of the teacher {target} for the same example. CRD compares examples instead."
            )

    def _attach_pairs(self, student: PreTrainedModel, states: Sequence[Shape], targets: Sequence[Shape]) -> None:
        super()._attach_pairs(student, states, targets)
        self._keep(_places=_add_projections(GaussianProjection, student, self._pairs, states, targets))

    def loss(self, step: TrainingStep) -> torch.Tensor:
        values = []
        for s, t in self._pairs:
            mean, log_variance = step.student.hidden_states[self._places[s]].chunk(2, dim=-1)
            values.append(gaussian_nll(mean, log_variance, step.teacher.hidden_states[t]))
        return masked_mean(torch.stack(values).mean(0), self.state_mask(step.batch))
