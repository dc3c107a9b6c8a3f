# SPDX-License-Identifier: Apache-2.0
"""Checks the values of dataclass fields against their declared types."""

from __future__ import annotations

import math
from dataclasses import fields
from numbers import Integral, Real
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

_WORDS: dict[Any, str] = {
    bool: "True or False",
    int: "an integer",
    float: "a number",
    str: "a text",
    type(None): "None",
}


def check_fields(owner: Any) -> None:
    """Refuses values of dataclass fields of another type than declared, and numbers that are not finite. Fields of
    other types than numbers, texts and truth values are left to their owner. Raises `ValueError`: saying which, what
    came and what was expected."""
    try:
        hints = get_type_hints(type(owner))
    except NameError:  # types that were defined where nobody finds them
        hints = {}
    for field in fields(owner):
        if not field.init:
            continue
        name, value = f"{type(owner).__name__}: {field.name}", getattr(owner, field.name)
        hint = hints.get(field.name)
        kinds = set(get_args(hint)) if get_origin(hint) in (Union, UnionType) else {hint}
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value!r}.")
        if kinds <= _WORDS.keys() and not _is_of(value, kinds):
            raise ValueError(f"{name} must be {' or '.join(_WORDS[kind] for kind in kinds)}, got {value!r}.")


def _is_of(value: Any, kinds: set[Any]) -> bool:
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return type(value) in kinds
    return isinstance(value, Integral if float not in kinds else Real) and bool(kinds & {int, float})
