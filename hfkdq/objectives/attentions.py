# SPDX-License-Identifier: Apache-2.0
"""Distillation of attention probabilities.

Needs eager attention, the only implementation that computes them; switches both models to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from ..losses import attention_kl, masked_mean
from .base import Objective
from .masks import Batch, Positions, valid_count
from .outline import Outline, layer_map, outline_of


@dataclass(frozen=True, kw_only=True)
class AttentionKD(Objective):
    """KL divergence between attention distributions of matched layers.

    `mean over pairs (s, t) and heads h of KL(A_teacher[t, h, q] || A_student[s, h, q])`, mean over the queries `q`
    attended to. Sun et al., "MobileBERT" (2020). Both models are switched to eager attention.

    Args:
        layers (`dict` or `str`, *optional*): `{student layer: teacher layer}`, numbered from 1, or `"uniform"`. By
            default the layers that `make_student` copied, or uniform.
        weight (`float` or schedule, defaults to 1.0): factor of this term.

    Raises:
        ValueError: at `attach`, a layer out of range, a model that gives no attention probabilities, or different
            numbers of heads.

    Example:
        ```python
        >>> from hfkdq import AttentionKD
        >>> AttentionKD(weight=0.1).name
        'attention_kd'

        ```
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attentions"})

    layers: Mapping[int, int] | str | None = None

    def attach(self, student: PreTrainedModel, teacher: PreTrainedModel | Outline | None) -> None:
        super().attach(student, teacher)
        maps, targets = outline_of(student).maps(), outline_of(teacher).maps()
        pairs = layer_map(self.layers, student, len(maps), len(targets))
        for s, t in pairs.items():
            if s == 0 or t == 0:
                raise ValueError(f"layers={self.layers!r}: layer 0 is the embeddings, which attend to nothing.")
            if maps[s - 1] != targets[t - 1]:
                raise ValueError(
                    f"AttentionKD compares head with head: layer {s} of the student gives attentions of shape "
                    f"{maps[s - 1]} (batch, heads, queries, keys), layer {t} of the teacher "
                    f"{targets[t - 1]}. Use a student with as many heads, or HiddenStateKD alone."
                )
        self._found.update(pairs=tuple(pairs.items()))
        self._found.update(attentions=(frozenset(s - 1 for s in pairs), frozenset(t - 1 for t in pairs.values())))

    def positions(self, batch: Batch) -> Positions:
        return valid_count(batch, self.state_mask(batch))

    def __call__(self, student_out: Any, teacher_out: Any, batch: Batch) -> tuple[torch.Tensor, Positions]:
        divergence = torch.stack(
            [
                attention_kl(student_out.attentions[s - 1], teacher_out.attentions[t - 1])
                for s, t in self._found["pairs"]
            ]
        ).mean(0)  # (batch, queries)
        return masked_mean(divergence, self.state_mask(batch)), self.positions(batch)
