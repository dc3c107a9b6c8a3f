# SPDX-License-Identifier: Apache-2.0
"""Checks that a teacher has an embedding for every token id of a data set."""

from __future__ import annotations

from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from transformers.utils import logging

from ..modeling.forwards import TEACHER_PREFIX, base_of

logger = logging.get_logger(__name__)
_COLUMN = "input_ids"


def vocabulary_size(model: Any) -> int | None:
    """How many token ids a model has embeddings for; `None` for one that reads no tokens."""
    base = base_of(model)
    if getattr(base, "main_input_name", None) != _COLUMN:
        return None
    try:
        table = base.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    rows = getattr(table, "num_embeddings", None)
    return rows if isinstance(rows, int) else None


def check_vocabulary(teacher: Any, name: str, dataset: Any, student: Any = None) -> None:
    """Refuses a teacher called `name` that lacks embeddings for token ids of a data set.

    Not needed where `student` has embeddings for no more ids than the teacher. Of data sets that are no
    `datasets.Dataset` nothing is known before the training.

    Raises:
        ValueError: an id that the teacher has no embedding for.
    """
    size, own = vocabulary_size(teacher), None if student is None else vocabulary_size(student)
    if size is None or (own is not None and own <= size):
        return
    column = TEACHER_PREFIX + _COLUMN
    column = column if column in (getattr(dataset, "column_names", None) or ()) else _COLUMN
    largest = _largest(dataset, column)
    if largest is None:
        if own is not None and dataset is not None:
            logger.warning(
                f"{name} has {size:,} token ids and the student {own:,}; whether all ids in train_dataset are below {size:,} could "
                "not be looked up. One that is not ends the training."
            )
    elif largest >= size:
        raise ValueError(
            f"{name} ({type(base_of(teacher)).__name__}) has {size:,} token ids, and {column} of the data set goes up to {largest:,}, so "
            "it cannot read these rows. Take a teacher with the tokenizer that made them; for one with another tokenizer, "
            f"add its own ids as the column {TEACHER_PREFIX + _COLUMN}."
        )


def _largest(dataset: Any, column: str) -> int | None:
    """The largest number in a column of a data set; `None` where nothing tells without running its code."""
    if not isinstance(dataset, datasets.Dataset) or column not in dataset.column_names or not len(dataset):
        return None
    if dataset.format["type"] == "custom":
        return None
    tables = dataset.with_format("arrow", columns=[column]).iter(batch_size=10_000)
    found = [pc.max(_flat(table[column].combine_chunks())).as_py() for table in tables]
    return max((number for number in found if isinstance(number, int)), default=None)


def _flat(array: Any) -> Any:
    is_list = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    while any(test(array.type) for test in is_list):
        array = pc.list_flatten(array)
    return array
