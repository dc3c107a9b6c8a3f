# SPDX-License-Identifier: Apache-2.0
"""The student's own loss on the labels, as one objective among others."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from transformers import PreTrainedModel

from ..modeling.forwards import base_of
from ..modeling.masks import Batch, Positions, attended_mask, batch_size, valid_count
from .base import Objective, TrainingStep
from .finding import DETECTED, PIXELS, SYMBOLS, kind_of
from .model_signature import ModelSignature, signature_of


@dataclass(frozen=True, kw_only=True)
class TaskLoss(Objective):
    """The loss that the plain `Trainer` would train on: the model's own, or label smoothing, or `compute_loss_func`.

    Args:
        weight (`float` or schedule, defaults to 1.0): factor of this term.

    Example:
        ```python
        >>> from hfkdq import TaskLoss
        >>> from hfkdq.schedules import Linear
        >>> TaskLoss(weight=Linear(1, 0)).name
        'task_loss'

        ```
    """

    needs: ClassVar[frozenset[str]] = frozenset({"loss"})
    uses_teacher: ClassVar[bool] = False

    _kind: str = field(default="", init=False, repr=False, compare=False)
    _ignored: int = field(default=-100, init=False, repr=False, compare=False)

    def attach(self, student: PreTrainedModel, teacher: PreTrainedModel | ModelSignature | None) -> None:
        super().attach(student, teacher)
        config, kind = base_of(student).config, kind_of(signature_of(student))
        ignored = getattr(config, "semantic_loss_ignore_index", 255) if kind == PIXELS else -100
        is_sum = kind == SYMBOLS and getattr(config, "ctc_loss_reduction", None) == "sum"
        self._keep(_kind=kind, _ignored=ignored, is_sum=is_sum)

    def positions(self, batch: Batch) -> Positions:
        labels = batch.get("labels")
        if not isinstance(labels, torch.Tensor) or labels.is_floating_point() or self._kind == SYMBOLS:
            return batch_size(batch)
        if self._kind == DETECTED:
            mask = attended_mask(batch)
            return valid_count(batch, torch.ones_like(labels) if mask is None else mask)
        if labels.dim() > 1 and self._shifts_labels:
            labels = labels[..., 1:]
        return labels.ne(self._ignored).sum()

    def loss(self, step: TrainingStep) -> torch.Tensor:
        return step.student.loss
