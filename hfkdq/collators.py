# SPDX-License-Identifier: Apache-2.0
"""Batches for two models that read the same examples by tokenizers of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .modeling.forwards import TEACHER_PREFIX


@dataclass
class TeacherCollator:
    """Collates the columns of the student and those of the teacher, each by a collator of its own.

    Columns whose names begin with `teacher_` are the teacher's: `teacher_collator` gets them without the prefix, and what
    it returns gets the prefix again. Rows without such columns, as those of an evaluation set may be, are left to
    `collator` alone.

    Args:
        collator (callable): from a list of rows to a batch of the student, such as `DataCollatorWithPadding(tokenizer)`.
        teacher_collator (callable): the same for the teacher, with its tokenizer.

    Raises:
        ValueError: when called: columns of the teacher in some rows only.

    Example:
        ```python
        >>> import torch
        >>> from transformers import default_data_collator
        >>> from hfkdq.collators import TeacherCollator
        >>> collator = TeacherCollator(default_data_collator, default_data_collator)
        >>> batch = collator([{"input_ids": [5, 6], "teacher_input_ids": [7, 8, 9]}])
        >>> {name: tuple(value.shape) for name, value in batch.items()}
        {'input_ids': (1, 2), 'teacher_input_ids': (1, 3)}

        ```
    """

    collator: Callable[[list[Any]], Any]
    teacher_collator: Callable[[list[Any]], Any]

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch of both, from a list of rows."""
        prefix = TEACHER_PREFIX
        own = [{name: value for name, value in row.items() if not name.startswith(prefix)} for row in features]
        theirs = [{k.removeprefix(prefix): v for k, v in row.items() if k.startswith(prefix)} for row in features]
        lacking = sum(not row for row in theirs)
        if 0 < lacking < len(theirs):
            raise ValueError(
                f"{lacking} of the {len(theirs)} rows of a batch have no columns that begin with {TEACHER_PREFIX!r}, the others "
                "have. Tokenize the whole dataset for the teacher, or none of it."
            )
        batch = dict(self.collator(own))
        if not lacking:
            batch.update({TEACHER_PREFIX + name: value for name, value in self.teacher_collator(theirs).items()})
        return batch
