# SPDX-License-Identifier: Apache-2.0
"""The other tasks that a family has a class for, each as an entry with the same configuration and labels of that task."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

from hfkdq.modeling import tasks as hub

from .batches import LABELS, SIZE, Batch
from .entries import Entry


def _of_tokens(batch: Batch) -> Batch:
    ids = batch["input_ids"]
    return {"labels": torch.where(ids > 0, ids % LABELS, -100)}


def _masked(batch: Batch) -> Batch:
    ids = batch["input_ids"]
    return {"labels": torch.where((ids > 0) & (torch.arange(ids.shape[1]) % 3 == 1), ids, -100)}


def _spans(batch: Batch) -> Batch:
    return {**_separated(batch), "start_positions": torch.full((SIZE,), 7), "end_positions": torch.full((SIZE,), 7)}


def _separated(batch: Batch) -> Batch:
    """Ids of two texts, with an end after each and one before the second, as RoBERTa has them."""
    ids = batch["input_ids"].clone()
    ids[:, [3, 4, 7]] = 2
    return {"input_ids": ids}


def _choices(batch: Batch) -> Batch:
    """Two texts for every example: its own and the same backwards."""
    pairs = {
        name: torch.stack([value, value.flip(1)], dim=1) for name, value in {**batch, **_separated(batch)}.items()
    }
    return {**pairs, "labels": torch.arange(SIZE) % 2}


def _next(batch: Batch) -> Batch:
    return {"labels": torch.where(batch["input_ids"] > 0, batch["input_ids"], -100)}


def _classes(batch: Batch) -> Batch:
    return {"labels": torch.arange(SIZE) % LABELS}


def _letters(batch: Batch) -> Batch:
    return {"labels": torch.arange(3 * SIZE).reshape(SIZE, 3) % 8 + 4}


_LABELS: dict[tuple[str, str], Callable[[Batch], Batch]] = {
    ("input_ids", "MASKED_LM"): _masked,
    ("input_ids", "SEQUENCE_CLASSIFICATION"): _classes,
    ("input_ids", "TOKEN_CLASSIFICATION"): _of_tokens,
    ("input_ids", "QUESTION_ANSWERING"): _spans,
    ("input_ids", "MULTIPLE_CHOICE"): _choices,
    ("input_ids", "CAUSAL_LM"): _next,
    ("pixel_values", "IMAGE_CLASSIFICATION"): _classes,
    ("input_values", "AUDIO_CLASSIFICATION"): _classes,
    ("input_features", "AUDIO_CLASSIFICATION"): _classes,
    ("input_values", "CTC"): _letters,
    ("input_features", "CTC"): _letters,
}
"""By the main input and by the table of Transformers in which a class stands."""
TASKS = "tasks"
"""What stands for all of their cells."""
PREFIX = "task "
"""Of the names of their cells."""
ALONE = ("Text encoders", "Text decoders", "Images", "Speech and sound")
"""Groups whose classes of other tasks take the same inputs."""


def other_tasks(entry: Entry) -> dict[str, Entry]:
    """The entries of the other tasks, by their names; none where the installed Transformers has not the family."""
    if not entry.exists or entry.group not in ALONE:
        return {}
    batch = entry.batch()
    if "decoder_input_ids" in batch or getattr(entry.configuration(), "is_encoder_decoder", False):
        return {}
    found: dict[str, Entry] = {}
    for task in hub.TASKS:
        names: Any = getattr(modeling_auto, f"MODEL_FOR_{task.table}_MAPPING_NAMES", {})
        model = names.get(entry.configuration().model_type)
        labels = next((make for (main, table), make in _LABELS.items() if main in batch and table == task.table), None)
        if isinstance(model, str) and labels is not None and model != entry.model and task.name != entry.task:
            found[task.name] = replace(
                entry, model=model, batch=_maker(entry.batch, labels), labels=2 if labels is _spans else LABELS
            )
    return {
        name: replace(other, counts=entry.counts and not _hands_on_what_it_refuses(other))
        for name, other in found.items()
        if other.exists
    }


def _hands_on_what_it_refuses(entry: Entry) -> bool:
    """Whether Trainer takes the class for one that is told how many labels there are, and the class takes it for a mistake."""
    return "deprecated_arguments" in inspect.signature(getattr(transformers, entry.model).forward).parameters


def _maker(make: Callable[[], Batch], labels: Callable[[Batch], Batch]) -> Callable[[], Batch]:
    def batch() -> Batch:
        inputs = {name: value for name, value in make().items() if "label" not in name}
        return {**inputs, **labels(inputs)}

    return batch
