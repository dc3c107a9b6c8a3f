# SPDX-License-Identifier: Apache-2.0
"""Distillation of the boxes that a detector draws around its objects."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel
from transformers.loss.loss_for_object_detection import generalized_box_iou

from .base import Objective, TrainingStep
from .finding import find_head
from .heads import DetectionHead, corners, matched_queries
from .model_signature import ModelSignature


@dataclass(frozen=True, kw_only=True)
class BoxKD(Objective):
    """Distance between the boxes of matched object queries, where the teacher sees an object.

    `sum_q o_q * (5 * |b_s - b_t|_1 + 2 * (1 - GIoU(b_s, b_t))) / sum_q o_q` per image, with `o_q` the probability with
    which the teacher sees an object at query `q`; mean over the images. The weights 5 and 2 are those of the box losses
    of Carion et al., "End-to-End Object Detection with Transformers" (2020), the teacher's predictions in place of labels
    as in Chang et al., "DETRDistill" (2022). For the classes of the same queries there is `LogitKD`.

    Args:
        weight, teacher: as of every [`Objective`]; 1.0 and none by default.

    Raises:
        ValueError: at `attach`, models that do not both detect objects of the same classes.

    Example:
        ```python
        >>> from hfkdq import BoxKD
        >>> BoxKD(weight=0.5).name
        'box_kd'

        ```
    """

    _head: DetectionHead = field(init=False, repr=False, compare=False)

    def attach(self, student: PreTrainedModel, teacher: PreTrainedModel | ModelSignature | None) -> None:
        super().attach(student, teacher)
        head = find_head(student, teacher)
        if not isinstance(head, DetectionHead):
            raise ValueError(
                f"BoxKD compares the boxes of detectors of the DETR family; {type(student).__name__} draws none. Use "
                "LogitKD()."
            )
        self._keep(_head=head)

    def loss(self, step: TrainingStep) -> torch.Tensor:
        own, theirs, objects = matched_queries(step.student, step.teacher, self._head.exclusive)
        pairs = ((step.student.pred_boxes, own), (step.teacher.pred_boxes, theirs))
        boxes = [b.float().gather(1, at.unsqueeze(-1).expand(-1, -1, 4)) for b, at in pairs]  # (batch, pairs, 4)
        lengths = (boxes[0] - boxes[1]).abs().sum(-1)
        edges = [corners(b) for b in boxes]
        overlaps = torch.stack([generalized_box_iou(s, t).diagonal() for s, t in zip(*edges, strict=True)])
        distance = 5.0 * lengths + 2.0 * (1.0 - overlaps)
        per_image: torch.Tensor = (objects * distance).sum(-1) / objects.sum(-1).clamp(min=1e-12)
        return per_image.mean()
