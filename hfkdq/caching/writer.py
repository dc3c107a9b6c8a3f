# SPDX-License-Identifier: Apache-2.0
"""Runs a teacher once over a dataset, and returns the dataset with its outputs as columns."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list, send_to_device
from transformers import DataCollatorWithPadding, default_data_collator
from transformers.utils import find_labels

from ..modeling.examples import NoExample, tried_on
from ..modeling.forwards import TEACHER_PREFIX, base_of, forward_columns
from ..modeling.own_modules import as_pretrained_
from ..teachers import FrozenTeacher, check_vocabulary, fingerprint, load_teacher, weights_fingerprint
from .info import FORMAT_VERSION, ROW_CHECK, CacheInfo, cache_info, collator_name, processor_fingerprint, with_info
from .plan import Plan, checked_inputs, make_plan, row_checks
from .shards import assemble, encode, prepare_folder, write_shards

SHARD_ROWS = 1024
"""Rows in a shard, which is what a killed run loses at most."""


def cache_teacher_outputs(
    teacher: Any,
    dataset: datasets.Dataset,
    *,
    data_collator: Callable[[Any], Any] | None = None,
    processing_class: Any = None,
    folder: str | os.PathLike[str] | None = None,
    batch_size: int = 32,
    top_k: int | Literal["auto"] | None = "auto",
    temperature: float = 1.0,
    hidden_states: Sequence[int] = (),
    dtype: Literal["float16", "int8"] = "float16",
    remove_unused_columns: bool = True,
    accelerator: Accelerator | None = None,
) -> datasets.Dataset:
    """Runs a teacher once over a dataset and returns the dataset with its outputs as columns.

    Training on it needs no teacher in memory. Under `accelerate launch` every process computes its share. Shards of
    1,024 rows are kept as they are finished: a run that was killed goes on where it was, with any number of processes, and a
    later call with the same teacher and data reads what is there.

    Outputs are kept without padding. Class logits are in `teacher_logits`, those of spans in `teacher_start_logits` and
    `teacher_end_logits`, of detectors in `teacher_logits` and `teacher_pred_boxes`; of large vocabularies the log
    probabilities of the likeliest tokens and of all others together are in `teacher_top_log_probabilities`, and which
    they are in `teacher_top_indices`. `cache_info(dataset)` describes the columns.

    Args:
        teacher (`PreTrainedModel`, `PeftModel` or `str`): the teacher, or its name or folder. It is frozen, put into
            eval mode and moved to the device of this process.
        dataset (`datasets.Dataset`): the rows, as they will be trained on.
        data_collator (callable, *optional*): that of the training; as of `Trainer` by default.
        processing_class (tokenizer, image processor, feature extractor or processor, *optional*): that of the training.
        folder (`str` or `PathLike`, *optional*): where the shards lie, on a disk that all processes share. By default a
            folder of their own below the cache of `datasets`.
        batch_size (`int`, defaults to 32): rows that the teacher is given at once.
        top_k (`int`, *optional*, defaults to `"auto"`): keep the likeliest `k` classes and the rest as one; `None` for all
            logits; `"auto"` for 64 where there are more than 1,024 classes per token, else all.
        temperature (`float`, defaults to 1.0): `T` of the probabilities of the likeliest classes, larger than 0:
            `LogitKD` must have the same. Logits have none.
        hidden_states (list of `int`, *optional*): layers whose outputs are kept too; 0 is the embeddings.
        dtype (`str`, defaults to `"float16"`): `"float16"`, with a relative error up to 2^-11; or `"int8"`, with one up
            to `(maximum - minimum) / 510` of the values of a position, which has a scale of its own.
        remove_unused_columns (`bool`, defaults to `True`): give the collator the columns that the teacher takes alone, as
            `Trainer` does with the argument of that name.
        accelerator (`Accelerator`, *optional*): processes, device and mixed precision.

    Returns:
        `datasets.Dataset`: the rows and columns of `dataset`, and the outputs.

    Raises:
        ValueError: a `folder` with outputs of another teacher, dataset or settings; a collator that draws at random; a
            teacher whose outputs this release does not know; impossible settings; or outputs that are NaN, infinite or
            beyond the range of `dtype`.
        TypeError: no `datasets.Dataset`.

    Example:
        ```python
        >>> import tempfile
        >>> from datasets import Dataset
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from hfkdq import cache_teacher_outputs
        >>> datasets.disable_progress_bars()
        >>> config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, num_labels=3)
        >>> rows = Dataset.from_dict({"input_ids": [[1, 2], [3, 4]], "attention_mask": [[1, 1], [1, 1]]})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cached = cache_teacher_outputs(BertForSequenceClassification(config), rows, folder=folder)
        >>> cached.column_names
        ['input_ids', 'attention_mask', 'teacher_logits', 'teacher_row_check']

        ```
    """
    _check_arguments(dataset, batch_size, top_k, temperature, dtype)
    accelerator = accelerator or Accelerator()
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            "Processes cache different numbers of batches, and a teacher sharded by FSDP or DeepSpeed runs in all of them at "
            "once. Call cache_teacher_outputs in a run without them; a teacher too large for a GPU can be loaded with "
            'device_map="auto" in a single process.'
        )
    teacher = load_teacher(teacher) if isinstance(teacher, str) else teacher
    check_vocabulary(as_pretrained_(teacher), "The teacher", dataset)
    collator = data_collator or default_collator(processing_class)
    source = Source(dataset, collator, teacher, remove_unused_columns)
    batch = collator(source.features(0, 1))
    try:
        plan = make_plan(teacher, top_k, temperature, hidden_states, dtype)
    except NoExample:
        with tried_on(batch, student=None):
            plan = make_plan(teacher, top_k, temperature, hidden_states, dtype)
    inputs = checked_inputs(batch, source.columns, plan.decodes_labels)
    settings: dict[str, Any] = {"top_k": plan.top_k, "temperature": plan.temperature if plan.top_k else None}
    settings |= {"hidden_states": list(plan.layers), "dtype": dtype}
    key = cache_key(teacher, dataset, collator, processing_class, accelerator, **settings)
    # By this one checkpoints know the teacher, so that a run that was begun beside it may go on with its cache.
    described = {**plan.outline.to_dict(), "fingerprint": fingerprint(teacher)}
    info = CacheInfo(plan.outputs, inputs, described, key)
    info = CacheInfo.from_json(info.to_json())  # as it will be read
    place = prepare_folder(folder, info, accelerator)
    write_shards(_Cells(teacher, source, plan, inputs, accelerator), info, place, batch_size, accelerator)
    whole = assemble(dataset, info, place, accelerator)
    return with_info(formatted_as(whole, dataset, info), info)


def _check_arguments(dataset: Any, batch_size: int, top_k: Any, temperature: float, dtype: str) -> None:
    if not isinstance(dataset, datasets.Dataset):
        raise TypeError(
            f"cache_teacher_outputs needs a datasets.Dataset, whose rows have places, got {type(dataset).__name__}. Of a "
            "DatasetDict give one split at a time; of an iterable dataset make one with Dataset.from_generator."
        )
    if not len(dataset):
        raise ValueError("The dataset has no rows.")
    if ROW_CHECK in dataset.column_names or cache_info(dataset) is not None:
        raise ValueError(
            "The dataset holds cached teacher outputs already. Remove them first: "
            "dataset.remove_columns(cache_info(dataset).columns)."
        )
    whole = isinstance(top_k, int) and not isinstance(top_k, bool) and top_k > 0
    for name, value, fine, expected in (
        ("batch_size", batch_size, batch_size >= 1, "at least 1"),
        ("top_k", top_k, top_k is None or top_k == "auto" or whole, "'auto', None or a positive integer"),
        ("temperature", temperature, 0 < temperature < math.inf, "larger than 0 and finite"),
        ("dtype", dtype, dtype in ("float16", "int8"), "'float16' or 'int8'"),
    ):
        if not fine:
            raise ValueError(f"{name} must be {expected}, got {value!r}.")


class _Runner(FrozenTeacher):
    """Leaves it to the writer to check outputs, which can name the rows."""

    def _check_finite(self, logits: torch.Tensor | None, step: int) -> None: ...


@dataclass
class _Cells:
    """The cells of rows, computed by the teacher when they are asked for."""

    teacher: Any
    source: Source
    plan: Plan
    inputs: tuple[str, ...]
    accelerator: Accelerator

    @cached_property
    def _runner(self) -> _Runner:
        # A process that finds all of its shards written moves no model.
        return _Runner(self.teacher, self.accelerator, label_columns(self.teacher))

    def __call__(self, first: int, last: int) -> list[dict[str, Any]]:
        features = self.source.features(first, last)
        batch = self.source.collator(features)
        checks = row_checks(batch, self.inputs, len(features), self.source.collator)
        batch = send_to_device(dict(batch), self.accelerator.device)
        out = self._runner(batch, self.plan.needs, {"hidden_states": frozenset(self.plan.layers)}, step=0)
        values = self.plan.cut(out, batch, features)
        _refuse_not_finite(values, first, rules_out=self.plan.outputs[0].dtype == "float16")
        return [{ROW_CHECK: check, **self._encoded(values, row, first)} for row, check in enumerate(checks)]

    def _encoded(self, values: dict[str, list[np.ndarray]], row: int, first: int) -> dict[str, Any]:
        cell: dict[str, Any] = {}
        for output in self.plan.outputs:
            try:
                cell |= encode(output, values[output.column][row])
            except OverflowError as error:
                raise ValueError(
                    f"{output.column} of row {first + row} has {error}, more than float16 can hold. Use dtype='int8', which "
                    "has a scale for every position."
                ) from error
        return cell


def cache_key(
    teacher: Any, dataset: Any, collator: Any, processor: Any, accelerator: Accelerator, **settings: Any
) -> dict[str, Any]:
    """What a teacher's outputs depend on, as the main process sees it: models and rows, and `settings` of the caller."""
    key = {
        "version": FORMAT_VERSION, "teacher": weights_fingerprint(teacher),
        "precision": f"{base_of(teacher).dtype}, autocast {accelerator.mixed_precision}".replace("torch.", ""),
        "processor": processor_fingerprint(processor), "dataset": dataset._fingerprint, "rows": len(dataset),
        "collator": collator_name(collator), **settings, "part_rows": SHARD_ROWS,
    }  # fmt: skip
    # A dataset made by a function that cannot be hashed has another fingerprint in every process.
    shared = broadcast_object_list([key])[0] if accelerator.num_processes > 1 else key
    if shared["rows"] != len(dataset):
        raise ValueError(f"This process has a dataset of {len(dataset)} rows, the main one of {shared['rows']}.")
    return shared


def _refuse_not_finite(values: dict[str, list[np.ndarray]], first: int, rules_out: bool) -> None:
    """Refuses what is not finite; where the type `rules_out` a class, by minus infinity, one class must be left."""
    for column, rows in values.items():
        told = [row.max(-1) if rules_out and row.ndim and row.shape[-1] else row for row in rows]
        bad = [first + i for i, row in enumerate(told) if not np.isfinite(row).all()]
        if bad:
            named = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
            raise ValueError(
                f"{column} is NaN or infinite for rows {named}, so there is nothing to learn from them. Check the teacher's "
                "weights and these rows; a teacher in float16 may overflow, try bfloat16 or float32."
            )


def default_collator(processing_class: Any) -> Any:
    """The collator that `Trainer` takes where it is given none."""
    return DataCollatorWithPadding(processing_class) if hasattr(processing_class, "pad") else default_data_collator


def label_columns(model: Any) -> list[str]:
    """The columns that a model takes as labels."""
    return list(find_labels(type(base_of(model))))


class Source:
    """Rows of a dataset as the teacher is given them."""

    def __init__(self, dataset: Any, collator: Any, teacher: Any, remove_unused: bool) -> None:
        labels = label_columns(teacher)
        self.collator, self.rows = collator, dataset
        self.columns = forward_columns(teacher) - set(labels)
        teachers = {TEACHER_PREFIX + name for name in self.columns}
        used = self.columns | teachers | {*labels, "label", "label_ids", "labels"}
        self._keep = used if remove_unused else None
        if remove_unused and dataset.format["type"] != "custom":
            kept = [name for name in dataset.column_names if name in used]
            if not kept:
                raise ValueError(
                    f"None of the columns {dataset.column_names} is among those that {type(base_of(teacher)).__name__} takes: "
                    f"{sorted(self.columns)}. Tokenize the dataset first, or give remove_unused_columns=False and a "
                    "data_collator that does."
                )
            self.rows = dataset.select_columns(kept)
        rows = min(len(self.rows), 8)
        with torch.random.fork_rng(devices=[]):
            once, again = (collator(self.features(0, rows)) for _ in range(2))
        names = [name for name, value in once.items() if isinstance(value, torch.Tensor)]
        same = all(once[name].shape == again[name].shape and torch.equal(once[name], again[name]) for name in names)
        if getattr(collator, "mlm", False) or not same:
            raise ValueError(
                f"{type(collator).__name__} draws at random what a model reads, so the teacher would be asked about other inputs "
                "than the student sees. Mask or augment the dataset once with map and use a collator that only pads, or train "
                "with the teacher itself."
            )

    def features(self, start: int, stop: int) -> list[dict[str, Any]]:
        rows = self.rows.__getitems__(list(range(start, stop)))
        keep = self._keep
        return rows if keep is None else [{k: v for k, v in row.items() if k in keep} for row in rows]


def formatted_as(whole: Any, dataset: Any, info: CacheInfo) -> Any:
    """`whole` in the format or with the transform of `dataset`, which leaves the cached columns as they are."""
    form = dataset.format
    if form["type"] == "custom":
        return whole.with_transform(_BesideCached(form["format_kwargs"]["transform"], info.columns))
    if form["type"] is None and set(form["columns"]) == set(dataset.column_names):
        return whole
    more = {"columns": [*form["columns"], *info.columns], "output_all_columns": form["output_all_columns"]}
    return whole.with_format(form["type"], **more, **form["format_kwargs"])


class _BesideCached:
    """A transform of rows that hands cached columns through."""

    def __init__(self, transform: Callable[[Any], Any], columns: tuple[str, ...]) -> None:
        self.transform, self.columns = transform, columns

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        cached = {name: batch[name] for name in self.columns if name in batch}
        own = {name: values for name, values in batch.items() if name not in cached}
        return {**self.transform(own), **cached}
