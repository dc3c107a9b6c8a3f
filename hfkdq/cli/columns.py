# SPDX-License-Identifier: Apache-2.0
"""What the columns of a data set hold, by their features."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from datasets import Dataset, LargeList, List, Value

from .names import LABELS

_NUMBERS = re.compile(r"(^|_)(id|idx|ids|index|guid|uid|uuid)$", re.IGNORECASE)
MASKS = re.compile("mask|label|annotation|segment", re.IGNORECASE)
"""Names of columns whose images are no pictures, but the class of each pixel."""


def strings_of(rows: Dataset) -> list[str]:
    """Columns of texts: of strings that are no labels and no names of rows."""
    return [
        name
        for name, feature in rows.features.items()
        if is_string(feature) and name not in LABELS and not _NUMBERS.search(name)
    ]


def is_string(feature: Any) -> bool:
    """Whether a column holds one text a row."""
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def refuse_gaps(rows: Dataset, columns: Iterable[str], description: str) -> None:
    """Raises `ValueError`: a row has no value in one of the columns; says which, and of how many."""
    for name in columns:
        gaps = rows.with_format("arrow")[:].column(name).is_null().to_pylist()
        if any(gaps):
            raise ValueError(
                f"{description} lack a value of {name} in row {row_of(rows, gaps.index(True))} ({sum(gaps)} of {len(gaps)} rows). Leave "
                "such rows out. Of CSV files NA, None and null are read as no value; JSON lines have them as words."
            )


def row_of(rows: Dataset, number: int) -> int:
    """The number in its file of a row, which may have been drawn at random."""
    drawn = rows._indices
    return number if drawn is None else int(drawn.column(0)[number].as_py())


def refuse_twins(rows: Dataset, names: Iterable[str]) -> None:
    """Raises `ValueError`: a table has several columns of one of the names, of which pandas calls the second `NAME.1`."""
    for name in names:
        if f"{name}.1" in rows.column_names:
            raise ValueError(
                f"There are two columns {name}, of which the second is read as {name}.1. Leave one, or rename it."
            )


def lists_of(feature: Any) -> Any:
    """The feature of the elements of a column of lists; `None` for another column."""
    return feature.feature if isinstance(feature, (List, LargeList)) else None


def only(rows: Dataset, kind: type, what: str, model: Any) -> str:
    """The one column of a kind, such as `datasets.Image`.

    Raises:
        ValueError: there are none or several, or a row has none.
    """
    found: list[str] = [name for name, feature in rows.features.items() if isinstance(feature, kind)]
    found = [name for name in found if not MASKS.search(name)] if len(found) > 1 else found
    if len(found) != 1:
        raise ValueError(
            f"{type(model).__name__} reads one column of {what} (datasets.{kind.__name__}); there are {len(found)} of them in "
            f"{names_of(rows)}."
        )
    if rows.data.column(found[0]).null_count:
        refuse_gaps(rows, found, "The rows")
    return found[0]


def names_of(rows: Dataset) -> str:
    """The columns with their types, for an error."""
    kinds = {
        name: feature.dtype if isinstance(feature, Value) else type(feature).__name__
        for name, feature in rows.features.items()
    }
    return ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
