# SPDX-License-Identifier: Apache-2.0
"""Distillation of logits: of a class per example, a class per token, or the next token.

Finds out at `attach` which of these the pair of models predicts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)

from ..forwards import base_of
from ..losses import logit_kl, masked_mean
from ..schedules import Schedule, extremes
from .base import Batch, Objective, batch_size, token_mask
from .probe import probe

_DECODED = {*MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values(), *MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES.values()}
_PER_TOKEN = {
    *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(),
    *MODEL_FOR_MASKED_LM_MAPPING_NAMES.values(),
    *MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES.values(),
    *_DECODED,
}


@dataclass(frozen=True, kw_only=True)
class LogitKD(Objective):
    """Forward KL divergence between the softened predictions of teacher and student.

    `T^2 * KL(softmax(teacher / T) || softmax(student / T))`, mean over examples, or over tokens with a label (those
    attended to where there are no labels). Hinton et al., "Distilling the Knowledge in a Neural Network" (2015).

    Args:
        temperature (`float` or schedule, defaults to 2.0): `T`, larger than 0.
        weight (`float` or schedule, defaults to 1.0): factor of this term.

    Raises:
        ValueError: a temperature that is not larger than 0; at `attach`, classes or vocabularies that differ, or a
            head that this release cannot distil (several labels at once, regression, question answering, detection).

    Example:
        ```python
        >>> from hfkdq import LogitKD
        >>> LogitKD(temperature=4.0, weight=0.5)
        LogitKD(weight=0.5, temperature=4.0)

        ```
    """

    temperature: float | Schedule = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not extremes(self.temperature)[0] > 0:
            raise ValueError(f"LogitKD: temperature must be larger than 0, got {self.temperature!r}.")

    def attach(self, student: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
        super().attach(student, teacher)
        shapes = {}
        for role, model in (("student", student), ("teacher", teacher)):
            _check_head(role, model)
            logits = getattr(probe(model), "logits", None)
            per_token = type(base_of(model)).__name__ in _PER_TOKEN
            if not isinstance(logits, torch.Tensor) or logits.dim() != (3 if per_token else 2):
                raise ValueError(
                    f"LogitKD distils class logits per example or per token; the {role} {type(model).__name__} gives "
                    f"{'no logits' if logits is None else f'logits of shape {tuple(logits.shape)}'} for one example."
                )
            shapes[role] = logits.shape
        if len(shapes["student"]) == len(shapes["teacher"]) == 3 and shapes["student"][1] != shapes["teacher"][1]:
            raise ValueError(
                f"Student and teacher give logits at {shapes['student'][1]} and {shapes['teacher'][1]} positions for the "
                "same text, so they cannot be compared: one has virtual tokens, for example of prompt tuning. Train "
                "adapters such as LoRA, which have none."
            )
        if shapes["student"] != shapes["teacher"]:
            raise ValueError(
                f"Student and teacher predict different things: the last axes of their logits are "
                f"{tuple(shapes['student'][1:])} and {tuple(shapes['teacher'][1:])}. LogitKD needs the same labels or "
                "vocabulary in both; load the student with the teacher's num_labels or tokenizer, or leave LogitKD out."
            )
        _check_label_names(student, teacher)
        self._found.update(per_token=len(shapes["student"]) == 3, decoded=type(base_of(student)).__name__ in _DECODED)

    def _mask(self, batch: Batch) -> torch.Tensor | None:
        if self._found["decoded"]:  # `attention_mask` is of the encoder's input
            batch = {**batch, "attention_mask": batch.get("decoder_attention_mask")}
        return token_mask(batch, self._found["shifts_labels"]) if self._found["per_token"] else None

    def positions(self, batch: Batch) -> torch.Tensor | int:
        if not self._found["per_token"]:
            return batch_size(batch)
        mask = self._mask(batch)
        return batch_size(batch) if mask is None else mask.sum()

    def __call__(self, student_out: Any, teacher_out: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | int]:
        labels = batch.get("labels")
        if isinstance(labels, torch.Tensor) and labels.is_floating_point():
            raise ValueError(
                f"LogitKD compares softmax distributions, but the labels are {labels.dtype}: regression or several "
                "labels at once. Leave LogitKD out for this task."
            )
        student, teacher = student_out.logits, teacher_out.logits
        if self._found["per_token"] and self._found["shifts_labels"]:
            student, teacher = student[:, :-1], teacher[:, :-1]  # (batch, seq - 1, vocab)
        divergence = logit_kl(student, teacher, self.current(self.temperature))
        return masked_mean(divergence, self._mask(batch)), self.positions(batch)


def _check_head(role: str, model: Any) -> None:
    model = base_of(model)
    config: Any = getattr(model, "config", None)
    if getattr(config, "problem_type", None) in ("multi_label_classification", "regression") or (
        type(model).__name__.endswith("Classification") and getattr(config, "num_labels", None) == 1
    ):
        raise ValueError(
            f"LogitKD compares softmax distributions over classes; the {role} {type(model).__name__} is configured for "
            f"{config.problem_type or 'regression (num_labels=1)'}. Leave LogitKD out for this task."
        )


def _check_label_names(student: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
    names = []
    for model in (student, teacher):
        labels = getattr(getattr(model, "config", None), "id2label", None) or {}
        names.append([str(labels[key]) for key in sorted(labels)])
    unnamed = any(all(name.startswith("LABEL_") for name in group) for group in names)
    if type(base_of(student)).__name__.endswith("Classification") and not unnamed and names[0] != names[1]:
        raise ValueError(
            f"Student and teacher give the same number of classes in another order or under other names: {names[0]} and "
            f"{names[1]}. Set the student's config.id2label and label2id to the teacher's, and encode labels by them."
        )
