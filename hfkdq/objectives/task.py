# SPDX-License-Identifier: Apache-2.0
"""The student's own loss on the labels, as one objective among others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..modeling.masks import Batch, Positions, batch_size
from .base import Objective, TrainingStep


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

    def positions(self, batch: Batch) -> Positions:
        labels = batch.get("labels")
        if not isinstance(labels, torch.Tensor) or labels.is_floating_point():
            return batch_size(batch)
        if labels.dim() > 1 and self._shifts_labels:
            labels = labels[..., 1:]
        return labels.ne(-100).sum()

    def loss(self, step: TrainingStep) -> torch.Tensor:
        return step.student.loss
