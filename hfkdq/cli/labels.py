# SPDX-License-Identifier: Apache-2.0
"""Labels of a data set as the numbers that a classifier has learned for them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from typing import Any

from datasets import ClassLabel, Dataset, Value
from transformers import PretrainedConfig

from .columns import names_of, refuse_gaps, refuse_twins
from .names import LABELS


def label_reader(
    rows: Dataset, config: PretrainedConfig, description: str
) -> Callable[[dict[str, list[Any]]], list[int]]:
    """What reads the labels off rows, as `config.label2id` numbers them. Names, those of a `datasets.ClassLabel` too,
    are looked up in `label2id`. Numbers, and the numbers of a `ClassLabel` whose names the model does not know, are
    taken as they are. Raises `ValueError`: there are none, or the model does not know them."""
    column = column_of(rows, LABELS, description)
    refuse_gaps(rows, [column], description)
    refuse_twins(rows, [column])
    if not isinstance(rows.features[column], (ClassLabel, Value)):
        raise ValueError(
            f"{description} have labels of several kinds or parts in {column}: {names_of(rows)}. A label is a name or a number."
        )
    table = label_table(rows.unique(column), rows.features[column], config, description)
    return lambda batch: [table[label] for label in batch[column]]


def column_of(rows: Dataset, names: tuple[str, ...], description: str) -> str:
    """The first of these columns that there is. Raises `ValueError`: there is none."""
    for name in names:
        if name in rows.column_names:
            return name
    told = ", ".join(name if name == name.strip() else repr(name) for name in rows.column_names)
    raise ValueError(f"{description} have no column {' or '.join(names)}; their columns are {told}.")


def label_table(found: Collection[Any], feature: Any, config: PretrainedConfig, description: str) -> dict[Any, int]:
    """The number in the model of every label that occurs; `feature` is that of one label. Raises `ValueError`: the
    model does not know one."""
    named = sorted((int(number), str(name)) for name, number in (config.label2id or {}).items())
    known = {name: number for number, name in named}
    has_texts, classes = any(isinstance(label, str) for label in found), getattr(feature, "names", [])
    names = {
        label: str(label) if has_texts else classes[label]
        for label in found
        if has_texts or label in range(len(classes))
    }
    unknown = sorted(set(names.values()) - set(known))
    # Of names that the model knows in part, numbers would make others.
    if unknown and (has_texts or any(known.get(name, label) != label for label, name in names.items())):
        raise ValueError(
            f"{description} have the label {unknown[0]!r}, which the model does not know; its label2id has "
            f"{_few(list(known))}."
        )
    if not unknown and names and len(names) == len(found):
        return {label: known[name] for label, name in names.items()}
    # A table with numbers and gaps is often saved with 1.0 in the place of 1.
    numbers = {label: int(label) for label in found if isinstance(label, (int, float)) and label % 1 == 0}
    wrong = [label for label in found if label not in numbers or not 0 <= numbers[label] < config.num_labels]
    if wrong:
        advice = " A split without labels often has -1: name another one, as in DATA:validation." * (wrong[0] == -1)
        raise ValueError(
            f"{description} have the label {wrong[0]!r}; the model has the classes 0 to {config.num_labels - 1}"
            f" ({_few(list(known))}).{advice}"
        )
    if not isinstance(feature, ClassLabel):
        return numbers
    named_by = {number: name for name, number in known.items()}
    pairs = [f"{name} = {named_by.get(number, number)}" for number, name in enumerate(feature.names)]
    sys.stderr.write(f"Labels are taken by their numbers, as the model has other names for them: {_few(pairs)}\n")
    return numbers


def _few(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
