# SPDX-License-Identifier: Apache-2.0
"""Rows of a dataset as a teacher is given them, and the format that they come in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import DataCollatorWithPadding, default_data_collator
from transformers.utils import find_labels

from ..modeling.forwards import TEACHER_PREFIX, base_of, forward_columns
from .info import CacheInfo


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
        used = (
            self.columns | {TEACHER_PREFIX + name for name in self.columns} | {*labels, "label", "label_ids", "labels"}
        )
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
        _refuse_random(collator, self)

    def features(self, start: int, stop: int) -> list[dict[str, Any]]:
        """Rows as the collator is given them."""
        rows = self.rows.__getitems__(list(range(start, stop)))
        keep = self._keep
        return rows if keep is None else [{k: v for k, v in row.items() if k in keep} for row in rows]


def _refuse_random(collator: Any, source: Source) -> None:
    rows = min(len(source.rows), 8)
    with torch.random.fork_rng(devices=[]):
        once, again = (source.collator(source.features(0, rows)) for _ in range(2))
    names = [name for name, value in once.items() if isinstance(value, torch.Tensor)]
    same = all(once[name].shape == again[name].shape and torch.equal(once[name], again[name]) for name in names)
    if getattr(collator, "mlm", False) or not same:
        raise ValueError(
            f"{type(collator).__name__} draws at random what a model reads, so the teacher would be asked about other inputs "
            "than the student sees. Mask or augment the dataset once with map and use a collator that only pads, or train "
            "with the teacher itself."
        )


def formatted_as(whole: Any, dataset: Any, info: CacheInfo) -> Any:
    """`whole` in the format or with the transform of `dataset`, which leaves the cached columns as they are."""
    form = dataset.format
    if form["type"] == "custom":
        transform = _BesideCached(form["format_kwargs"]["transform"], info.columns)
        return whole.with_transform(transform)
    if form["type"] is None and set(form["columns"]) == set(dataset.column_names):
        return whole
    columns = [*form["columns"], *info.columns]
    return whole.with_format(
        form["type"], columns=columns, output_all_columns=form["output_all_columns"], **form["format_kwargs"]
    )


class _BesideCached:
    """A transform of rows that hands cached columns through."""

    def __init__(self, transform: Callable[[Any], Any], columns: tuple[str, ...]) -> None:
        self.transform, self.columns = transform, columns

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        cached = {name: batch[name] for name in self.columns if name in batch}
        own = {name: values for name, values in batch.items() if name not in cached}
        return {**self.transform(own), **cached}
