# SPDX-License-Identifier: Apache-2.0
"""Heads of models by task: the predictions to compare, their positions and classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch.nn.functional import interpolate, normalize
from transformers.image_transforms import center_to_corners_format
from transformers.loss.loss_for_object_detection import box_iou, generalized_box_iou

from ..losses.divergences import binary_logits
from ..modeling.masks import Batch, Positions, attended_mask, position_mask, refuse_two_texts, token_mask, valid_count


@dataclass(frozen=True)
class Prediction:
    """Logits of both models side by side, `(batch, ..., classes)`. `target` is the class on the label, int64 of shape
    `(batch, ...)`, -100 for none; or float probabilities of a soft label, shaped as the logits."""

    student: torch.Tensor
    teacher: Any  # or `TopLogits`
    mask: torch.Tensor | None = None  # the positions that count, bool of shape `(batch, ...)`
    valid_classes: torch.Tensor | None = None  # the classes that are possible, bool, shaped as the logits
    target: torch.Tensor | None = None
    position_weights: torch.Tensor | None = None  # how much each position of an example counts, `(batch, ...)`


class Head:
    """A class per example.

    Class attributes:
        axes (`int`): number of axes of the logits for a batch.
        softmax (`bool`): whether classes exclude one another.
        refused (`frozenset` of `str`): divergences that make no sense for it.
        per_position (`bool`): whether an example has several predictions.
        outputs (tuple of `str`): the outputs that it compares.
        class_axis (`int`, *optional*): the axis of the classes, which both models must have as many of.
    """

    axes: ClassVar[int] = 2
    softmax: ClassVar[bool] = True
    refused: ClassVar[frozenset[str]] = frozenset()
    per_position: ClassVar[bool] = False
    outputs: tuple[str, ...] = ("logits",)
    class_axis: ClassVar[int | None] = -1

    def predictions(self, student_out: Any, teacher_out: Any, batch: Batch) -> list[Prediction]:
        """The predictions to compare; the loss is the mean over the list."""
        labels, logits = batch.get("labels"), student_out.logits
        if isinstance(labels, torch.Tensor) and labels.is_floating_point() and not _is_soft(labels, logits.shape):
            raise ValueError(
                f"The labels are {labels.dtype} and no probabilities of one class per example: regression or several labels at "
                "once, but the configurations say neither. Set config.problem_type of student and teacher to "
                "'multi_label_classification' or 'regression'."
            )
        return [Prediction(logits, teacher_out.logits, target=labels)]

    def mask(self, batch: Batch) -> torch.Tensor | None:
        """The positions that count, `(batch, ...)`; `None` where each does, or an example is one."""
        return None

    def positions(self, batch: Batch) -> Positions:
        return valid_count(batch, self.mask(batch))


def _is_soft(labels: torch.Tensor, shape: torch.Size) -> bool:
    """Whether labels are probabilities of the classes, as mixing two examples or smoothing makes them."""
    return labels.shape == shape and bool((labels.min() >= 0) & ((labels.sum(-1) - 1.0).abs().max() < 1e-2))


class MultiLabelHead(Head):
    """Any number of labels per example, each with its own sigmoid; the mean over the labels."""

    refused = frozenset({"dist"})

    def predictions(self, student_out: Any, teacher_out: Any, batch: Batch) -> list[Prediction]:
        labels = batch.get("labels")
        student, teacher = binary_logits(student_out.logits), binary_logits(teacher_out.logits)
        position_weights = student.new_full(student.shape[:-1], 1.0 / student.shape[1])
        return [Prediction(student, teacher, target=_yes_first(labels), position_weights=position_weights)]


def _yes_first(labels: torch.Tensor | None) -> torch.Tensor | None:
    """The class of a label of 1 or 0 among the two of `binary_logits`; -100 stays."""
    return None if labels is None else (labels < 0.5).long().masked_fill(labels < 0, -100)


class RegressionHead(Head):
    """Numbers, which have no distribution."""

    softmax = False

    def predictions(self, student_out: Any, teacher_out: Any, batch: Batch) -> list[Prediction]:
        return [Prediction(student_out.logits, teacher_out.logits)]


class TokenHead(Head):
    """A class per token: tags, masked language models."""

    axes = 3
    per_position = True

    def __init__(self, shifts_labels: bool = False) -> None:
        self.shifts_labels = shifts_labels

    def predictions(self, student_out: Any, teacher_out: Any, batch: Batch) -> list[Prediction]:
        labels: torch.Tensor | None = batch.get("labels")
        target = labels.roll(-1, dims=1) if self.shifts_labels and labels is not None else labels
        return [Prediction(student_out.logits, teacher_out.logits, self.mask(batch), target=target)]

    def mask(self, batch: Batch) -> torch.Tensor | None:
        refuse_two_texts(batch, "LogitKD of tokens")
        return token_mask(batch, self.shifts_labels)


class DecoderHead(TokenHead):
    """A class per token of a decoder; `attention_mask` is of the encoder's input."""

    def mask(self, batch: Batch) -> torch.Tensor | None:
        return token_mask({**batch, "attention_mask": batch.get("decoder_attention_mask")}, shifts_labels=False)


class DetectedTokenHead(TokenHead):
    """Yes or no per token, attended to or not: whether it was replaced, as in ELECTRA, or belongs to an answer."""

    axes = 2
    refused = frozenset({"dist"})

    def predictions(self, student_out: Any, teacher_out: Any, batch: Batch) -> list[Prediction]:
        student, teacher = binary_logits(student_out.logits), binary_logits(teacher_out.logits)
        return [Prediction(student, teacher, self.mask(batch), target=_yes_first(batch.get("labels")))]

    def mask(self, batch: Batch) -> torch.Tensor | None:
        return attended_mask(batch)


class SpanHead(Head):
    """Start and end of an answer: two distributions over the positions of the text."""

    axes = 2
    refused = frozenset({"dist"})  # a position is not the same class in every text
    outputs = ("start_logits", "end_logits")

    def predictions(self, student_out: Any, teacher_out: Any, batch: Batch) -> list[Prediction]:
        valid_classes, found = attended_mask(batch), []
        for part in ("start", "end"):
            student, teacher = student_out[f"{part}_logits"], teacher_out[f"{part}_logits"]  # (batch, seq)
            target = batch.get(f"{part}_positions")
            if target is not None:  # outside of the text where the answer was cut off, below 0 where there is no label
                target = target.reshape(-1).clamp(max=student.shape[1] - 1)
            found.append(Prediction(student, teacher, valid_classes=valid_classes, target=target))
        return found


class FrameHead(Head):
    """A symbol per frame of sound, for CTC: the blank is one of them."""

    axes = 3
    per_position = True
    refused = frozenset({"dkd"})  # a frame has no label

    def __init__(self, lengths: Callable[[torch.Tensor], torch.Tensor] | None) -> None:
        self.lengths = lengths

    def predictions(self, student_out: Any, teacher_out: Any, batch: Batch) -> list[Prediction]:
        return [Prediction(student_out.logits, teacher_out.logits, self.mask(batch))]

    def mask(self, batch: Batch) -> torch.Tensor | None:
        return position_mask(batch, self.lengths)


class PixelHead(Head):
    """A class per pixel, at the size of the student's map; the mean over the pixels of an image that have a label."""

    axes = 4
    class_axis = 1
    refused = frozenset({"dist"})

    def __init__(self, ignored: int) -> None:
        self.ignored = ignored

    def predictions(self, student_out: Any, teacher_out: Any, batch: Batch) -> list[Prediction]:
        student, teacher, labels = student_out.logits, teacher_out.logits, batch.get("labels")
        size = student.shape[2:]  # (batch, classes, height, width)
        if teacher.shape[2:] != size:
            teacher = interpolate(teacher.float(), size=size, mode="bilinear", align_corners=False)
        weights, target = torch.ones_like(student[:, 0]), None
        if labels is not None:
            labels = interpolate(labels.unsqueeze(1).float(), size=size, mode="nearest").squeeze(1).long()
            target = labels.masked_fill(labels == self.ignored, -100)
            weights = weights * target.ne(-100)
        weights = weights / weights.sum((1, 2), keepdim=True).clamp(min=1)
        return [Prediction(student.movedim(1, -1), teacher.movedim(1, -1), target=target, position_weights=weights)]


class EmbeddingHead(Head):
    """A vector per example, which has meaning by its likeness to others: the classes are the other examples of the
    batch. Their logits are `cos(x_i, x_j) / 0.07`, with the temperature of Radford et al., "Learning Transferable
    Visual Models From Natural Language Supervision" (2021). So the models may differ in width, and a batch of 1
    teaches nothing."""

    refused = frozenset({"dkd", "dist"})
    class_axis = None

    def __init__(self, output: str) -> None:
        self.outputs = (output,)

    def predictions(self, student_out: Any, teacher_out: Any, batch: Batch) -> list[Prediction]:
        vectors = (normalize(out[self.outputs[0]].float(), dim=-1) for out in (student_out, teacher_out))
        student, teacher = (x @ x.T / 0.07 for x in vectors)
        others = ~torch.eye(len(student), dtype=torch.bool).to(student.device)
        return [Prediction(student, teacher, valid_classes=others)]


class PairHead(Head):
    """Which image of the batch belongs to which text, and the other way round; yes or no of each pair if not `exclusive`."""

    refused = frozenset({"dkd", "dist"})
    outputs = ("logits_per_image",)
    class_axis = None

    def __init__(self, exclusive: bool) -> None:
        self.exclusive = exclusive

    def predictions(self, student_out: Any, teacher_out: Any, batch: Batch) -> list[Prediction]:
        student, teacher = student_out.logits_per_image, teacher_out.logits_per_image  # (images, texts)
        if self.exclusive:
            return [Prediction(student, teacher), Prediction(student.T, teacher.T)]
        weights = torch.full_like(student, 1.0 / student.shape[1])
        return [Prediction(binary_logits(student), binary_logits(teacher), position_weights=weights)]


class DetectionHead(Head):
    """A class per object query. Queries of the student are matched with those of the teacher, one to one. The match
    has the smallest sum of costs, as for the labels in training (Carion et al., "End-to-End Object Detection with
    Transformers", 2020), with the teacher's predictions in their place (Chang et al., "DETRDistill", 2022). A query
    counts by the probability with which the teacher sees an object there, and background by `BACKGROUND` of that.

    Where classes do not exclude one another, a score says how well the box fits too (Zhang et al., "VarifocalNet", 2021): the
    student is taught the teacher's probability times the IoU of their boxes, not to be sure of a box that is elsewhere. No
    probability falls below `NOTHING` by that, as the logit of 0 is far from all that models say."""

    axes = 3
    refused = frozenset({"dkd", "dist"})
    outputs = ("logits", "pred_boxes")
    BACKGROUND: ClassVar[float] = 0.1
    NOTHING: ClassVar[float] = 0.01

    def __init__(self, exclusive: bool) -> None:
        if find_spec("scipy") is None:
            raise ValueError("Matching the queries of detectors needs scipy: pip install scipy.")
        self.exclusive = exclusive

    def predictions(self, student_out: Any, teacher_out: Any, batch: Batch) -> list[Prediction]:
        logits, teacher = student_out.logits, teacher_out.logits  # (batch, queries, classes)
        own, theirs, objects = matched_queries(student_out, teacher_out, self.exclusive)
        logits = logits.gather(1, own.unsqueeze(-1).expand(-1, -1, logits.shape[-1]))
        teacher = teacher.gather(1, theirs.unsqueeze(-1).expand(-1, -1, teacher.shape[-1]))
        position_weights = self.BACKGROUND + (1.0 - self.BACKGROUND) * objects
        position_weights = position_weights / position_weights.sum(-1, keepdim=True)
        if self.exclusive:
            return [Prediction(logits, teacher, position_weights=position_weights)]
        position_weights = (position_weights / logits.shape[-1]).unsqueeze(-1).expand_as(logits)
        pairs = ((student_out.pred_boxes, own), (teacher_out.pred_boxes, theirs))
        edges = [corners(boxes.detach().float().gather(1, at.unsqueeze(-1).expand(-1, -1, 4))) for boxes, at in pairs]
        overlaps = torch.stack([box_iou(*pair)[0].diagonal() for pair in zip(*edges, strict=True)])
        scores = teacher.float().sigmoid()
        scores = torch.maximum(scores * overlaps.unsqueeze(-1), scores.clamp(max=self.NOTHING))
        teacher = torch.logit(scores, eps=1e-6).to(teacher.dtype)
        return [Prediction(binary_logits(logits), binary_logits(teacher), position_weights=position_weights)]


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

    both = [out.logits.float() for out in (student_out, teacher_out)]
    probabilities = [logits.softmax(-1) if exclusive else logits.sigmoid() for logits in both]
    boxes = [out.pred_boxes.float() for out in (student_out, teacher_out)]
    objects = 1.0 - probabilities[1][..., -1] if exclusive else probabilities[1].amax(-1)  # (batch, queries)
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
