# SPDX-License-Identifier: Apache-2.0
"""Whether a teacher has an embedding for every token id that it will be given."""

from __future__ import annotations

from collections.abc import Iterator
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
    """Refuses a teacher for which the ids of a data set are too large.

    Args:
        teacher (`PreTrainedModel`): the teacher.
        name (`str`): what it is called in the message.
        dataset (`datasets.Dataset`): what it will be run on; of others nothing is known but the first batches.
        student (`PreTrainedModel`, *optional*): a model for which they are not; one with no more ids needs no look.

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
    found = [pc.max(array).as_py() for array in _numbers(dataset, column)]
    numbers = [number for number in found if isinstance(number, int)]
    return max(numbers, default=None)


def _numbers(dataset: datasets.Dataset, column: str) -> Iterator[Any]:
    plain = dataset.with_format("arrow", columns=[column])
    for table in plain.iter(batch_size=10_000):
        array = table[column].combine_chunks()
        while (
            pa.types.is_list(array.type)
            or pa.types.is_large_list(array.type)
            or pa.types.is_fixed_size_list(array.type)
        ):
            array = pc.list_flatten(array)
        yield array
