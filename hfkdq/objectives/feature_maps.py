# SPDX-License-Identifier: Apache-2.0
"""Distillation of the feature maps of convolutional backbones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from transformers import PreTrainedModel

from ..fields import Rule
from ..losses.features import activation_map_distance
from .base import Objective, TrainingStep
from .layers import LayerObjective, Shape


@dataclass(frozen=True, kw_only=True)
class FeatureMapKD(LayerObjective):
    """Attention transfer: distance between where matched stages of two convolutional models are active.

    `mean over pairs (s, t) of |q_s / |q_s| - q_t / |q_t||^2` with `q = vec(sum over channels c of |F_c|^p)`, mean over the
    examples. Zagoruyko and Komodakis, "Paying More Attention to Attention" (2017). Nothing is learned: numbers of
    channels may differ, and of maps of different size the larger one is pooled to the size of the other.

    Args:
        layers (`dict` or `str`, *optional*): `{student stage: teacher stage}`, numbered from 1, 0 for the stem; or
            `"uniform"`, `"last"` or `"skip"`. By default uniform: stage by stage where both have as many.
        power (`float`, defaults to 2.0): `p`, at least 1; the larger, the more the most active places count.
        weight (`float` or schedule, defaults to 1.0): factor of this term; the paper has 1000 / 2.
        teacher (`str`, *optional*): the name of the teacher, where there are several.

    Raises:
        ValueError: a power below 1; at `attach`, a stage out of range, or hidden states that are no feature maps.

    Example:
        ```python
        >>> from hfkdq import FeatureMapKD
        >>> FeatureMapKD(layers={4: 4}, weight=500.0).name
        'feature_map_kd'

        ```
    """

    power: Annotated[float, Rule("must be at least 1", lambda x: x >= 1)] = 2.0
    positions = Objective.positions  # examples

    def _default_layers(self, student_layers: int, teacher_layers: int) -> str:
        return "uniform"

    def _check_pair(self, student: PreTrainedModel, s: int, state: Shape, t: int, target: Shape) -> None:
        if len(state) != 4 or len(target) != 4:
            raise ValueError(
                f"FeatureMapKD compares feature maps (batch, channels, height, width); hidden state {s} of the student "
                f"has the shape {state}, {t} of the teacher {target}. Use HiddenStateKD for Transformers, RKD "
                "between a Transformer and a convolutional model."
            )

    def loss(self, step: TrainingStep) -> torch.Tensor:
        pairs = ((step.student.hidden_states[s], step.teacher.hidden_states[t]) for s, t in self._pairs)
        return torch.stack([activation_map_distance(*pair, self.power) for pair in pairs]).mean()
