# SPDX-License-Identifier: Apache-2.0
"""Distillation of attention probabilities. Needs eager attention, the only implementation that computes them; switches
both models to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from transformers import PreTrainedModel

from ..losses.features import attention_kl, attention_mse, masked_mean
from .base import Objective, TrainingStep
from .layers import LayerObjective, Shape
from .model_signature import ModelSignature, signature_of


@dataclass(frozen=True, kw_only=True)
class AttentionKD(LayerObjective):
    """Distance between attention distributions of matched layers.

    `mean over pairs (s, t) and heads h of D(A_teacher[t, h, q], A_student[s, h, q])`, mean over the queries `q` attended
    to. `D` is `KL(teacher || student)`, of Sun et al., "MobileBERT" (2020), or the mean over the keys attended to of the
    squared difference, after Jiao et al., "TinyBERT" (2020). Models with different numbers of heads are compared by
    the mean of each one's heads, others head by head. Both models are switched to eager attention; [`RelationKD`] needs
    no such switch.

    In the project's own comparison it helped nowhere: docs/results/objectives.md.

    Args:
        layers (`dict` or `str`, *optional*): as of [`HiddenStateKD`], from 1 on and not dynamic.
        distance (`str`, defaults to `"kl"`): `"kl"` or `"mse"`.
        weight, teacher: as of every [`Objective`]; 1.0 and none by default.

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

    distance: Literal["kl", "mse"] = "kl"

    def attach(self, student: PreTrainedModel, teacher: PreTrainedModel | ModelSignature | None) -> None:
        Objective.attach(self, student, teacher)
        # Layer 0, the embeddings, has none.
        self._attach_pairs(student, ((), *signature_of(student).maps()), ((), *signature_of(teacher).maps()))
        read = frozenset(s - 1 for s, _ in self._pairs), frozenset(t - 1 for _, t in self._pairs)
        self._keep(_indices={"attentions": read})

    def _check_pair(self, student: PreTrainedModel, s: int, state: Shape, t: int, target: Shape) -> None:
        if s == 0 or t == 0:
            raise ValueError(f"layers={self.layers!r}: layer 0 is the embeddings, which attend to nothing.")
        if state[2:] != target[2:]:
            raise ValueError(
                f"AttentionKD compares position with position: layer {s} of the student gives attentions of shape "
                f"{state} (batch, heads, queries, keys), layer {t} of the teacher {target} for the same example. Use a "
                "student with as many positions, or objectives that compare examples: LogitKD, RKD."
            )

    def loss(self, step: TrainingStep) -> torch.Tensor:
        mask = self.state_mask(step.batch)
        pairs = [(step.student.attentions[s - 1], step.teacher.attentions[t - 1]) for s, t in self._pairs]
        values = [attention_kl(*pair) if self.distance == "kl" else attention_mse(*pair, mask) for pair in pairs]
        return masked_mean(self._mean_over_pairs(values), mask)
