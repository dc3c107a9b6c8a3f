# SPDX-License-Identifier: Apache-2.0
"""Finds what two models predict, by the tables in which Transformers lists their classes, and the head for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from ..modeling.forwards import EMBEDDINGS, base_of
from ..modeling.masks import frame_lengths
from ..modeling.tasks import DETECTING, TASKS, written
from . import heads
from .model_signature import ModelSignature, signature_of

CAUSAL, DECODED = "next tokens", "the tokens of a decoder"
_TOKENS, _SPAN, DETECTED = "a class per token", "the span of an answer", "yes or no per token"
_EXAMPLE, SYMBOLS, _OBJECTS, PIXELS = "a class per example", "a symbol per frame", "objects", "a class per pixel"
_SEARCHED = "ZERO_SHOT_OBJECT_DETECTION"
_KINDS: dict[str, tuple[str, ...]] = {
    _TOKENS: ("MASKED_LM", "TOKEN_CLASSIFICATION"), _SPAN: ("QUESTION_ANSWERING", "DOCUMENT_QUESTION_ANSWERING"),
    SYMBOLS: ("CTC", "AUDIO_FRAME_CLASSIFICATION"), _OBJECTS: ("OBJECT_DETECTION", _SEARCHED),
    PIXELS: ("SEMANTIC_SEGMENTATION",), "a choice": ("MULTIPLE_CHOICE",),
}  # fmt: skip


def find_head(student: Any, teacher: Any, common_ids: bool = False) -> heads.Head:
    """The head that two models have in common, checked; vocabularies of other sizes only where their `common_ids`
    count. Raises `ValueError`: heads that differ, or none that is known."""
    signatures = {"student": signature_of(student), "teacher": signature_of(teacher)}
    kinds = {role: kind_of(signature) for role, signature in signatures.items()}
    for role, other in (("student", "teacher"), ("teacher", "student")):
        may_be = kinds[role] == _EXAMPLE and kinds[other] in (CAUSAL, _TOKENS, SYMBOLS, PIXELS)
        if may_be and _is_own(signatures[role]) and _axes(signatures[role]) == _axes(signatures[other]):
            kinds[role] = kinds[other]  # nothing else says what a class of the user's own predicts
    if kinds["student"] != kinds["teacher"]:
        raise ValueError(
            "Student and teacher predict different things: "
            + " and ".join(f"{o.model_class} gives {kinds[role]}" for role, o in signatures.items())
            + ". LogitKD needs the same task in both; load the student as the teacher's class, or leave LogitKD out."
        )
    kind = kinds["student"]
    head = _make(kind, base_of(student), signatures["student"])
    shapes = {role: _shapes(role, signature, head) for role, signature in signatures.items()}
    positions = [shapes[role][0][1] for role in shapes]
    if head.per_position and positions[0] != positions[1] and not signatures["teacher"].is_apart:
        raise ValueError(
            f"Student and teacher give logits at {positions[0]} and {positions[1]} positions for the "
            "same input, so they cannot be compared: one has virtual tokens, for example of prompt tuning, or frames of "
            "another length. Train adapters such as LoRA, which have none."
        )
    axis = head.class_axis
    last = [0, 0] if axis is None else [shapes[role][0][axis] for role in shapes]
    vocabularies = kind in (CAUSAL, DECODED) or signatures["student"].is_listed("MASKED_LM")
    if last[0] != last[1] and not (vocabularies and common_ids):
        raise ValueError(
            f"Student and teacher predict different things: the last axes of their logits are {last[0]} and "
            f"{last[1]}. LogitKD needs the same labels or vocabulary in both; "
            + (
                "if one tokenizer is padded to two sizes, LogitKD(common_ids=True) compares the ids that both have, and "
                f"student.resize_token_embeddings({last[1]}) makes them alike. For language models of two vocabularies there is ULD."
                if vocabularies
                else "load the student with the teacher's num_labels, or leave LogitKD out."
            )
        )
    _check_label_names(signatures["student"], signatures["teacher"])
    return head


def kind_of(signature: ModelSignature) -> str:
    """What a model predicts, in words."""
    if (words := written(signature.names, signature.config)) is not None:
        return words
    for kind, tasks in _KINDS.items():
        if signature.is_listed(*tasks):
            return kind
    if not {*DETECTING}.isdisjoint(signature.names):
        return DETECTED
    config = signature.config
    problem = getattr(config, "problem_type", None)
    if problem == "multi_label_classification":
        return "several labels at once"
    single = signature.model_class.endswith("Classification") and getattr(config, "num_labels", None) == 1
    return "numbers" if problem == "regression" or single else _EXAMPLE


def _axes(signature: ModelSignature) -> int:
    return len(signature.shape("logits") or ())


def _is_own(signature: ModelSignature) -> bool:
    """Whether the class is one of the user's own, which Transformers lists for no task."""
    return not any(task.does(name) for task in TASKS for name in signature.names) and not signature.is_listed(
        "SEMANTIC_SEGMENTATION"
    )


def _make(kind: str, student: Any, signature: ModelSignature) -> heads.Head:
    if kind == SYMBOLS:
        return heads.FrameHead(frame_lengths(student, adapter=True))
    if kind == PIXELS:
        return heads.PixelHead(getattr(student.config, "semantic_loss_ignore_index", 255))
    if kind == _OBJECTS:
        # Detectors trained with a focal loss have no class for the background, nor have those that look for texts.
        classes: Any = signature.shape("logits")
        return heads.DetectionHead(classes[-1] == student.config.num_labels + 1 and not signature.is_listed(_SEARCHED))
    kinds: dict[str, Callable[[], heads.Head]] = {
        CAUSAL: partial(heads.TokenHead, shifts_labels=True), _TOKENS: heads.TokenHead, DECODED: heads.DecoderHead,
        _SPAN: heads.SpanHead, DETECTED: heads.DetectedTokenHead, "several labels at once": heads.MultiLabelHead,
        "numbers": heads.RegressionHead,
    }  # fmt: skip
    logits = signature.shape("logits")
    if kind in kinds or (logits is not None and len(logits) == 2):
        return kinds.get(kind, heads.Head)()
    if logits is not None and len(logits) == 3 and _is_own(signature):
        return heads.TokenHead() if student.main_input_name == "input_ids" else heads.FrameHead(None)
    if logits is None and signature.shape("logits_per_image") is not None:
        return heads.PairHead(exclusive=not hasattr(student, "logit_bias"))  # SigLIP has one sigmoid for each pair
    vector = next((name for name in EMBEDDINGS if logits is None and len(signature.shape(name) or ()) == 2), None)
    return heads.Head() if vector is None else heads.EmbeddingHead(vector)


def _shapes(role: str, signature: ModelSignature, head: heads.Head) -> list[tuple[int, ...]]:
    found = [signature.shape(name) for name in head.outputs]
    axes = [head.axes] + [3 if name == "pred_boxes" else head.axes for name in head.outputs[1:]]
    if any(shape is None or len(shape) != count for shape, count in zip(found, axes, strict=True)):
        given = "no logits" if found[0] is None else f"{found[0]}"
        raise ValueError(
            f"LogitKD looks for {' and '.join(head.outputs)} with {head.axes} axes; the {role} {signature.model_class} "
            f"gives {given} for its example. It knows class logits per example, token, frame and pixel, spans, numbers, "
            "object queries and vectors of examples; for anything else write an objective of your own."
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
