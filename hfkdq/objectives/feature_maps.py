# SPDX-License-Identifier: Apache-2.0
"""Distillation of the feature maps of convolutional backbones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from transformers import PreTrainedModel

from ..losses.features import activation_map_distance
from .base import Objective, TrainingStep
from .outline import Outline, layer_map, outline_of


@dataclass(frozen=True, kw_only=True)
class FeatureMapKD(Objective):
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

    needs: ClassVar[frozenset[str]] = frozenset({"hidden_states"})

    layers: Mapping[int, int] | str | None = None
    power: float = 2.0
    _pairs: tuple[tuple[int, int], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.power >= 1:
            raise ValueError(f"FeatureMapKD: power must be at least 1, got {self.power!r}.")

    def attach(self, student: PreTrainedModel, teacher: PreTrainedModel | Outline | None) -> None:
        super().attach(student, teacher)
        states, targets = outline_of(student).states(), outline_of(teacher).states()
        layers = "uniform" if self.layers is None else self.layers
        pairs = layer_map(layers, student, len(states) - 1, len(targets) - 1)
        for s, t in pairs.items():
            if len(states[s]) != 4 or len(targets[t]) != 4:
                raise ValueError(
                    f"FeatureMapKD compares feature maps (batch, channels, height, width); hidden state {s} of the student "
                    f"has the shape {states[s]}, {t} of the teacher {targets[t]}. Use HiddenStateKD for Transformers, RKD "
                    "between a Transformer and a convolutional model."
                )
        read = frozenset(pairs), frozenset(pairs.values())
        self._keep(_pairs=tuple(pairs.items()), _indices={"hidden_states": read})

    def loss(self, step: TrainingStep) -> torch.Tensor:
        values = [
            activation_map_distance(step.student.hidden_states[s], step.teacher.hidden_states[t], self.power)
            for s, t in self._pairs
        ]
        return torch.stack(values).mean()
