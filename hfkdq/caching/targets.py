# SPDX-License-Identifier: Apache-2.0
"""Sequence-level distillation: a dataset whose labels are what a teacher writes."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from transformers.utils import logging

from ..metrics import WordErrorRate
from ..metrics.base import IGNORED
from ..modeling.forwards import base_of
from ..teachers import load_teacher
from .info import ROW_CHECK, CachedOutput, CacheInfo
from .shards import assemble, prepare_folder, write_shards
from .writer import Source, cache_key, default_collator

logger = logging.get_logger(__name__)
_WRITTEN = CachedOutput("labels", None, (), "int32")


def generate_targets(
    teacher: Any,
    dataset: datasets.Dataset,
    *,
    processing_class: Any = None,
    data_collator: Callable[[Any], Any] | None = None,
    folder: str | os.PathLike[str] | None = None,
    batch_size: int = 32,
    max_wer: float | None = None,
    accelerator: Accelerator | None = None,
    **generation: Any,
) -> datasets.Dataset:
    """Lets a teacher write the text of every row, and returns the dataset with these texts as its labels.

    Sequence-level distillation: the student learns the likeliest text of the teacher rather than that of the data, which is
    more regular. Kim and Rush, "Sequence-Level Knowledge Distillation" (2016). With `max_wer` rows whose text the teacher
    gets wrong are left out: Gandhi et al., "Distil-Whisper" (2023). Under `accelerate launch` every process writes its share;
    shards of 1,024 rows are kept as they are finished, so that a run that was killed goes on where it was, and the same
    call reads what is there.

    Args:
        teacher (`PreTrainedModel` or `str`): an encoder-decoder, or its name or folder.
        dataset (`datasets.Dataset`): the rows, as they will be trained on. Labels are needed with `max_wer` alone.
        processing_class (tokenizer or processor, *optional*): pads the rows, and decodes texts for `max_wer`.
        data_collator (callable, *optional*): that of the training; as of `Trainer` by default.
        folder (`str` or `PathLike`, *optional*): where the shards lie, on a disk that all processes share. By default a
            folder of their own below the cache of `datasets`.
        batch_size (`int`, defaults to 32): rows that the teacher is given at once.
        max_wer (`float`, *optional*): the largest word error rate of the teacher's text against that of the labels, case and
            punctuation counted; rows beyond it are left out. 0.1 is one word in ten.
        accelerator (`Accelerator`, *optional*): processes, device and mixed precision.
        generation: as for `teacher.generate`, such as `num_beams=5` or `max_new_tokens=128`; else its
            `generation_config` holds. Samples are drawn alike at every call.

    Returns:
        `datasets.Dataset`: the rows, with token ids of the teacher, the end token included, as `labels`.

    Raises:
        ValueError: no encoder-decoder, or shards of something else in `folder`, or `max_wer` without labels or tokenizer.
        TypeError: no `datasets.Dataset`.

    Example:
        ```python
        train = generate_targets(teacher, train, processing_class=tokenizer, num_beams=5, folder="out/targets")
        trainer = Seq2SeqDistillationTrainer(student, args, train_dataset=train, teacher_model=teacher, ...)
        ```
    """
    if not isinstance(dataset, datasets.Dataset):
        kind = type(dataset).__name__
        raise TypeError(f"generate_targets needs a datasets.Dataset, whose rows have places, got {kind}.")
    accelerator = accelerator or Accelerator()
    teacher = load_teacher(teacher) if isinstance(teacher, str) else teacher
    model = base_of(teacher)
    if not getattr(model.config, "is_encoder_decoder", False) or not model.can_generate():
        raise ValueError(
            f"generate_targets needs an encoder-decoder, which writes a text for its input, got {type(model).__name__}. A language "
            "model writes the rest of a text: use OnPolicyKD, or add the texts that it writes to your data."
        )
    decode: Any = getattr(getattr(processing_class, "tokenizer", processing_class), "batch_decode", None)
    if max_wer is not None and ("labels" not in dataset.column_names or decode is None):
        raise ValueError(
            "max_wer compares with the labels of the dataset, and decodes both: give labels, and processing_class=."
        )
    collator = data_collator or default_collator(processing_class)
    source = Source(dataset, collator, teacher, True)
    settings = {**model.generation_config.to_diff_dict(), **generation}
    said = {name: str(value) for name, value in sorted(settings.items()) if name != "transformers_version"}
    key = cache_key(teacher, dataset, collator, processing_class, accelerator, generation=said)
    info = CacheInfo((_WRITTEN,), (), {}, key)
    place = prepare_folder(folder, info, accelerator)

    def write(first: int, last: int) -> list[dict[str, Any]]:
        batch = collator(source.features(first, last))
        given = {name: value for name, value in batch.items() if name != "labels" and not name.startswith("decoder_")}
        with torch.no_grad(), torch.random.fork_rng(), accelerator.autocast():
            torch.manual_seed(first)
            tokens = model.generate(**send_to_device(given, accelerator.device), **generation)
        stop = model.generation_config.eos_token_id
        ends = np.atleast_1d([] if stop is None else stop)
        return [{_WRITTEN.column: _text_of(row, ends), ROW_CHECK: 0} for row in tokens.cpu().numpy()]

    was_training = teacher.training
    try:
        teacher.eval().to(accelerator.device)
        write_shards(write, info, place, batch_size, accelerator)
    finally:
        teacher.train(was_training)
    whole = assemble(dataset, info, place, accelerator).remove_columns(ROW_CHECK)
    if max_wer is not None:
        whole = _agreeing(whole, decode, max_wer)
    whole = whole.remove_columns("labels") if "labels" in whole.column_names else whole
    return whole.rename_column(_WRITTEN.column, "labels")


def _text_of(tokens: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """What was written behind the token that starts, up to its end."""
    written = tokens[1:]
    found = np.flatnonzero(np.isin(written, ends))
    return written[: found[0] + 1 if len(found) else len(written)].astype(np.int32)


def _agreeing(whole: datasets.Dataset, decode: Callable[..., list[str]], max_wer: float) -> datasets.Dataset:
    """The rows whose two texts differ by no more than that."""
    kept, rows = [], whole.select_columns(["labels", _WRITTEN.column])
    for number, row in enumerate(rows):
        ids = [[token for token in row[name] if token != IGNORED] for name in (_WRITTEN.column, "labels")]
        said, true = (text.strip() for text in decode(ids, skip_special_tokens=True))
        wrong = float(said != "") if not true else WordErrorRate.score([said], [true])["wer"]
        if wrong <= max_wer:
            kept.append(number)
    left = f"{len(whole) - len(kept):,} of {len(whole):,} rows"
    logger.warning(f"{left} are left out: their word error rate is above {max_wer}.")
    return whole.select(kept)
