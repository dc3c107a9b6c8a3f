# SPDX-License-Identifier: Apache-2.0
"""Heads of models by task: the predictions to compare, their positions and classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar

import torch

from ..losses.divergences import binary_logits
from ..modeling.forwards import base_of
from ..modeling.masks import Batch, Positions, attended_mask, frame_lengths, position_mask, token_mask, valid_count
from ..modeling.tasks import DECODED, is_listed
from .matching import matched_queries
from .model_signature import ModelSignature, signature_of


@dataclass(frozen=True)
class Prediction:
    """Logits of both models side by side.

    Attributes:
        student (`torch.Tensor` of shape `(batch, ..., classes)`): logits of the student.
        teacher (`torch.Tensor` of shape `(batch, ..., classes)`): logits of the teacher, or [`TopLogits`].
        mask (`torch.BoolTensor` of shape `(batch, ...)`, *optional*): the positions that count.
        valid_classes (`torch.BoolTensor`, *optional*): the classes that are possible, shaped as the logits.
        target (`torch.LongTensor` of shape `(batch, ...)`, *optional*): the class on the label.
        position_weights (`torch.Tensor` of shape `(batch, ...)`, *optional*): how much each position of an example counts.
    """

    student: torch.Tensor
    teacher: Any
    mask: torch.Tensor | None = None
    valid_classes: torch.Tensor | None = None
    target: torch.Tensor | None = None
    position_weights: torch.Tensor | None = None


class Head:
    """A class per example.

    Class attributes:
        axes (`int`): number of axes of the logits for a batch.
        softmax (`bool`): whether classes exclude one another.
        refused (`frozenset` of `str`): divergences that make no sense for it.
        per_position (`bool`): whether an example has several predictions.
    """

    axes: ClassVar[int] = 2
    softmax: ClassVar[bool] = True
    refused: ClassVar[frozenset[str]] = frozenset()
    per_position: ClassVar[bool] = False
    outputs: ClassVar[tuple[str, ...]] = ("logits",)

    def predictions(self, student_out: Any, teacher_out: Any, batch: Batch) -> list[Prediction]:
        """The predictions to compare; the loss is the mean over the list."""
        labels = batch.get("labels")
        if isinstance(labels, torch.Tensor) and labels.is_floating_point():
            raise ValueError(
                f"The labels are {labels.dtype}: regression or several labels at once, but the configurations say "
                "neither. Set config.problem_type of student and teacher to 'multi_label_classification' or 'regression'."
            )
        return [Prediction(student_out.logits, teacher_out.logits, target=labels)]

    def mask(self, batch: Batch) -> torch.Tensor | None:
        """The positions that count, `(batch, ...)`; `None` where each does, or an example is one."""
        return None

    def positions(self, batch: Batch) -> Positions:
        """Number of positions that the mean is taken over."""
        return valid_count(batch, self.mask(batch))


class MultiLabelHead(Head):
    """Any number of labels per example, each with its own sigmoid; the mean over the labels."""

    refused = frozenset({"dist"})

    def predictions(self, student_out: Any, teacher_out: Any, batch: Batch) -> list[Prediction]:
        labels = batch.get("labels")
        # The class "yes" stands first.
        target = None if labels is None else (labels < 0.5).long()
        student, teacher = binary_logits(student_out.logits), binary_logits(teacher_out.logits)
        position_weights = student.new_full(student.shape[:-1], 1.0 / student.shape[1])
        return [Prediction(student, teacher, target=target, position_weights=position_weights)]


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
        return [Prediction(student_out.logits, teacher_out.logits, self.mask(batch), target=self._target(batch))]

    def mask(self, batch: Batch) -> torch.Tensor | None:
        return token_mask(batch, self.shifts_labels)

    def _target(self, batch: Batch) -> torch.Tensor | None:
        labels: torch.Tensor | None = batch.get("labels")
        if labels is None:
            return None
        labels = labels.clamp(min=0)
        return labels.roll(-1, dims=1) if self.shifts_labels else labels


class DecoderHead(TokenHead):
    """A class per token of a decoder; `attention_mask` is of the encoder's input."""

    def mask(self, batch: Batch) -> torch.Tensor | None:
        return token_mask({**batch, "attention_mask": batch.get("decoder_attention_mask")}, shifts_labels=False)


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
            if target is not None:  # outside of the text where the answer was cut off
                target = target.reshape(-1).clamp(0, student.shape[1] - 1)
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


class DetectionHead(Head):
    """A class per object query. Queries of the student are matched with those of the teacher, one to one.

    The match has the smallest sum of costs, as for the labels in training (Carion et al., "End-to-End Object Detection
    with Transformers", 2020), with the teacher's predictions in their place (Chang et al., "DETRDistill", 2022). A query
    counts by the probability with which the teacher sees an object there, and background by `BACKGROUND` of that.
    """

    axes = 3
    refused = frozenset({"dkd", "dist"})
    outputs = ("logits", "pred_boxes")
    BACKGROUND: ClassVar[float] = 0.1

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
        return [Prediction(binary_logits(logits), binary_logits(teacher), position_weights=position_weights)]


def find_head(student: Any, teacher: Any) -> Head:
    """The head that two models have in common, checked.

    Raises:
        ValueError: heads that differ, or none that is known.
    """
    signatures = {"student": signature_of(student), "teacher": signature_of(teacher)}
    kinds = {role: _kind(signature) for role, signature in signatures.items()}
    if kinds["student"] != kinds["teacher"]:
        raise ValueError(
            "Student and teacher predict different things: "
            + " and ".join(f"{o.model_class} gives {kinds[role]}" for role, o in signatures.items())
            + ". LogitKD needs the same task in both; load the student as the teacher's class, or leave LogitKD out."
        )
    head = _make(kinds["student"], base_of(student))
    shapes = {role: _shapes(role, signature, head) for role, signature in signatures.items()}
    if head.per_position and shapes["student"][0][1] != shapes["teacher"][0][1]:
        raise ValueError(
            f"Student and teacher give logits at {shapes['student'][0][1]} and {shapes['teacher'][0][1]} positions for the "
            "same input, so they cannot be compared: one has virtual tokens, for example of prompt tuning, or frames of "
            "another length. Train adapters such as LoRA, which have none."
        )
    last = {role: [shape[-1] for shape in found] for role, found in shapes.items()}
    if last["student"] != last["teacher"]:
        raise ValueError(
            f"Student and teacher predict different things: the last axes of their logits are {last['student'][0]} and "
            f"{last['teacher'][0]}. LogitKD needs the same labels or vocabulary in both; load the student with the "
            "teacher's num_labels or tokenizer, or leave LogitKD out. For language models of two vocabularies there is ULD."
        )
    _check_label_names(signatures["student"], signatures["teacher"])
    return head


_CAUSAL, _DECODED, _TOKENS = "next tokens", "the tokens of a decoder", "a class per token"
_KINDS: dict[str, tuple[str, ...]] = {
    _CAUSAL: ("CAUSAL_LM",),
    _DECODED: DECODED,
    _TOKENS: ("MASKED_LM", "TOKEN_CLASSIFICATION"),
    "the span of an answer": ("QUESTION_ANSWERING",),
    "a symbol per frame": ("CTC",),
    "objects": ("OBJECT_DETECTION",),
}


def _kind(signature: ModelSignature) -> str:
    for kind, tasks in _KINDS.items():
        if is_listed(signature.model_class, *tasks):
            return kind
    config = signature.config
    problem = getattr(config, "problem_type", None)
    if problem == "multi_label_classification":
        return "several labels at once"
    single = signature.model_class.endswith("Classification") and getattr(config, "num_labels", None) == 1
    return "numbers" if problem == "regression" or single else "a class per example"


def _make(kind: str, student: Any) -> Head:
    if kind in (_CAUSAL, _TOKENS):
        return TokenHead(shifts_labels=kind == _CAUSAL)
    if kind == "a symbol per frame":
        return FrameHead(frame_lengths(student, adapter=True))
    if kind == "objects":
        # Detectors trained with a focal loss have no class for the background.
        return DetectionHead(signature_of(student).shape("logits")[-1] == student.config.num_labels + 1)  # type: ignore[index]
    heads: dict[str, type[Head]] = {
        _DECODED: DecoderHead,
        "the span of an answer": SpanHead,
        "several labels at once": MultiLabelHead,
        "numbers": RegressionHead,
    }
    return heads.get(kind, Head)()


def _shapes(role: str, signature: ModelSignature, head: Head) -> list[tuple[int, ...]]:
    found = [signature.shape(name) for name in head.outputs]
    axes = [head.axes] + [3 if name == "pred_boxes" else head.axes for name in head.outputs[1:]]
    if any(shape is None or len(shape) != count for shape, count in zip(found, axes, strict=True)):
        given = "no logits" if found[0] is None else f"{found[0]}"
        raise ValueError(
            f"LogitKD looks for {' and '.join(head.outputs)} with {head.axes} axes; the {role} {signature.model_class} "
            f"gives {given} for one example. It knows class logits per example, per token and per frame, spans, numbers "
            "and object queries; for anything else write an objective of your own."
        )
    return [shape for shape in found if shape is not None]


def _check_label_names(student: ModelSignature, teacher: ModelSignature) -> None:
    names = []
    for signature in (student, teacher):
        labels = getattr(signature.config, "id2label", None) or {}
        # Read from JSON the keys are strings.
        names.append([str(labels[key]) for key in sorted(labels, key=int)])
    unnamed = any(all(name.startswith("LABEL_") for name in group) for group in names)
    named = student.model_class.endswith(("Classification", "ObjectDetection"))
    if named and not unnamed and names[0] != names[1]:
        raise ValueError(
            f"Student and teacher give the same number of classes in another order or under other names: {names[0]} and "
            f"{names[1]}. Set the student's config.id2label and label2id to the teacher's, and encode labels by them."
        )
