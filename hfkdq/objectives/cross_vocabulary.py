# SPDX-License-Identifier: Apache-2.0
"""Distillation between language models whose tokenizers have nothing in common."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import torch
from transformers import PreTrainedModel

from ..fields import POSITIVE
from ..losses.divergences import in_chunks
from ..losses.relations import sorted_distance
from ..modeling.masks import Batch, Positions, token_mask
from ..modeling.tasks import written
from ..schedules import Schedule
from .base import Objective, TrainingStep
from .model_signature import ModelSignature, signature_of

_ROLES = ("student", "teacher")
_CHUNK = 2**24  # logits of the larger vocabulary, 64 MiB of float32


@dataclass(frozen=True, kw_only=True)
class ULD(Objective):
    """Universal logit distillation: the sorted probabilities of two language models are to be the same.

    `mean over positions of sum_i |p(i) - q(i)|`, where `p(i)` and `q(i)` are the `i`-th largest probabilities of teacher
    and student, the smaller vocabulary filled up with zeros. Boizard et al., "Towards Cross-Tokenizer Distillation: the
    Universal Logit Distillation Loss for LLMs" (2024). Which token is likely it does not say, so add a [`TaskLoss`].

    The `i`-th token of the student's answer is compared with the `i`-th of the teacher's, up to the end of the shorter
    one. The student's answer is where its labels are, else where it attends. What the teacher reads comes in columns
    `teacher_input_ids`, `teacher_attention_mask` and `teacher_labels`, which [`TeacherCollator`] pads; without them it
    reads what the student does. Over large vocabularies it is computed in chunks, and once more in the backward pass.

    Args:
        temperature (`float` or schedule, defaults to 1.0): `T`, larger than 0; probabilities are `softmax(logits / T)`.
        weight, teacher: as of every [`Objective`]; 1.0 and none by default.

    Raises:
        ValueError: a temperature that is not larger than 0; at `attach`, a model that is no language model, or one that
            predicts the next token and one that has an encoder; in training, `teacher_input_ids` without `teacher_labels`
            where the student has labels.

    Example:
        ```python
        >>> from hfkdq import ULD
        >>> ULD(weight=1.5).name
        'uld'

        ```
    """

    schedules: ClassVar[frozenset[str]] = frozenset({"weight", "temperature"})

    temperature: Annotated[float | Schedule, POSITIVE] = 1.0

    def attach(self, student: PreTrainedModel, teacher: PreTrainedModel | ModelSignature | None) -> None:
        super().attach(student, teacher)
        signatures = signature_of(student), signature_of(teacher)
        kinds = [written(signature.names, signature.config) for signature in signatures]
        if None in kinds or kinds[0] != kinds[1]:
            raise ValueError(
                "ULD compares what two language models write, both with an encoder or both without; "
                + " and ".join(f"the {r} is {o.model_class}" for r, o in zip(_ROLES, signatures, strict=True))
                + ". Of models with the same labels LogitKD compares the predictions, whatever their vocabularies."
            )
        if any(signature.temperature is not None for signature in signatures):
            raise ValueError(
                "The likeliest tokens alone were cached of the teacher, and ULD sorts the whole vocabulary. Give the "
                "teacher itself."
            )
        places = [(signature.shape("logits") or (0, 0))[1] for signature in signatures]
        if places[0] != places[1]:
            raise ValueError(
                f"Student and teacher give logits at {places[0]} and {places[1]} positions for as many tokens: one has "
                "virtual tokens, for example of prompt tuning. Train adapters such as LoRA, which have none."
            )

    def positions(self, batch: Batch) -> Positions:
        return self._masks(batch)[0].sum()

    def loss(self, step: TrainingStep) -> torch.Tensor:
        own, theirs = self._masks(step.batch)
        student, teacher = step.student.logits[own], step.teacher.logits[theirs]  # (rows, vocab) each
        temperature = step.at(self.temperature)
        distance, widest = partial(sorted_distance, temperature=temperature), max(student.shape[-1], teacher.shape[-1])
        values = in_chunks(distance, student, teacher, elements=_CHUNK * student.shape[-1] // widest)
        return values.sum() / max(len(values), 1)

    def _masks(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Masks of the compared positions, `(batch, seq)` of student and teacher, as many per row."""
        own = self._answers(batch)
        theirs = self._answers(_of_teacher(batch)) if {"teacher_input_ids", "teacher_labels"} & batch.keys() else own
        shorter = torch.minimum(own.sum(1), theirs.sum(1)).unsqueeze(1)
        return own & (own.cumsum(1) <= shorter), theirs & (theirs.cumsum(1) <= shorter)

    def _answers(self, batch: Batch) -> torch.Tensor:
        shifts = self._shifts_labels
        if "labels" not in batch and not shifts:
            raise ValueError("ULD needs labels, which the decoders of both models are to write; the batch has none.")
        mask = token_mask(batch, shifts)
        if mask is None:
            mask = token_mask({"attention_mask": torch.ones_like(batch["input_ids"])}, shifts)
        return mask  # type: ignore[return-value]


def _of_teacher(batch: Batch) -> Batch:
    """The teacher's columns of a batch, under the names of the student's."""
    names = ("input_ids", "attention_mask", "labels")
    own = {name: batch[f"teacher_{name}"] for name in names if f"teacher_{name}" in batch}
    if "labels" in batch and "labels" not in own:
        raise ValueError(
            "The labels say which tokens of the student are the answer, and nothing says which of teacher_input_ids are, so "
            "ULD would compare an answer with a prompt. Add a column teacher_labels, -100 where the prompt is."
        )
    return own
