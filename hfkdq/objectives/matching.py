# SPDX-License-Identifier: Apache-2.0
"""Matches the object queries of a student with those of its teacher."""

from __future__ import annotations

from typing import Any

import torch
from transformers.image_transforms import center_to_corners_format
from transformers.loss.loss_for_object_detection import generalized_box_iou


def object_probabilities(logits: torch.Tensor, exclusive: bool) -> torch.Tensor:
    """Probability that there is an object, per query: `(batch, queries)`; exclusive classes have "no object" last."""
    return 1.0 - logits.float().softmax(-1)[..., -1] if exclusive else logits.float().sigmoid().amax(-1)


def corners(boxes: torch.Tensor) -> torch.Tensor:
    """Left, top, right and bottom of boxes that are given as centre and size; none is without any area."""
    # Of two boxes without area there is no ratio of areas.
    whole = torch.cat([boxes[..., :2], boxes[..., 2:].clamp(min=1e-5)], dim=-1)
    return center_to_corners_format(whole)  # type: ignore[arg-type, return-value]


@torch.no_grad()
def matched_queries(
    student_out: Any, teacher_out: Any, exclusive: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Matches queries one to one, by classes and boxes.

    The cost of a pair is `sum_c |p_s[c] - p_t[c]| + 5 * |b_s - b_t|_1 - 2 * GIoU(b_s, b_t)`, where the last two count
    as much as the teacher sees an object: weights of Carion et al., "End-to-End Object Detection with Transformers"
    (2020).

    The outputs have `logits` of shape `(batch, queries, classes)` and `pred_boxes` of shape `(batch, queries, 4)`, centres
    and sizes in [0, 1]; numbers of queries may differ. `exclusive` classes exclude one another, with "no object" last.

    Returns:
        Three tensors of shape `(batch, pairs)`: queries of the student, queries of the teacher, and the probability
        with which the teacher sees an object there. Of a teacher with more queries those that see most are matched.
    """
    from scipy.optimize import linear_sum_assignment

    probabilities = [
        (out.logits.float().softmax(-1) if exclusive else out.logits.float().sigmoid())
        for out in (student_out, teacher_out)
    ]
    boxes = [out.pred_boxes.float() for out in (student_out, teacher_out)]
    objects = object_probabilities(teacher_out.logits, exclusive)
    own, theirs = [], []
    for row in range(len(objects)):
        count = min(boxes[0].shape[1], boxes[1].shape[1])
        chosen = objects[row].topk(count).indices
        seen, b_t = objects[row][chosen], boxes[1][row][chosen]
        cost = torch.cdist(probabilities[0][row], probabilities[1][row][chosen], p=1)
        overlap = generalized_box_iou(corners(boxes[0][row]), corners(b_t))
        cost = cost + seen * (5.0 * torch.cdist(boxes[0][row], b_t, p=1) - 2.0 * overlap)
        pairs = linear_sum_assignment(cost.cpu().numpy())
        own.append(torch.as_tensor(pairs[0], device=chosen.device))
        theirs.append(chosen[torch.as_tensor(pairs[1], device=chosen.device)])
    return torch.stack(own), torch.stack(theirs), torch.stack([objects[i][t] for i, t in enumerate(theirs)])
