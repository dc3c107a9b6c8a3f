# SPDX-License-Identifier: Apache-2.0
"""Checks the values of dataclass fields against their declared types, and numbers and schedules against their rules."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from numbers import Integral, Real
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

_WORDS: dict[Any, str] = {bool: "True or False", int: "an integer", float: "a number"}
_WORDS |= {str: "a text", type(None): "None"}


class Rule(NamedTuple):
    """In `Annotated`: what is to be said of the number of a setting, in words and as a test; a schedule at every point."""

    words: str
    holds: Callable[[Any], bool]


MOST_THREADS = 1024
"""More are a slip of the finger, and no machine could start them."""
POSITIVE = Rule("must be larger than 0", lambda x: x > 0)
NOT_NEGATIVE = Rule("must not be negative", lambda x: not x < 0)
COUNT = Rule("must be a positive integer", lambda x: isinstance(x, int) and x > 0)
SHARE = Rule("must be in [0, 1]", lambda x: 0 <= x <= 1)


def value_at(value: float | Callable[[float], float], progress: float) -> float:
    """The number that `value` stands for at `progress`: itself, or what the schedule gives."""
    return float(value(progress)) if callable(value) else float(value)


def extremes(value: float | Callable[[float], float], samples: int = 101) -> tuple[float, float]:
    """Smallest and largest number that `value` takes over `samples` points of progress, for validation up front. Both
    are NaN if one of them is. Raises `ValueError`: it gives no number."""
    places = [i / (samples - 1) for i in range(samples)] if callable(value) else [0.0]
    values = []
    for place in places:
        try:
            values.append(value_at(value, place))
        except (TypeError, ValueError) as error:
            told = f"{value!r} is neither a number nor a function of progress that gives one"
            raise ValueError(f"{told}: {error}.") from error
        if math.isnan(values[-1]):
            return math.nan, math.nan
    return min(values), max(values)


@cache
def _hints(owner: type) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for cls in reversed(owner.__mro__):
        with contextlib.suppress(NameError):  # types that were defined where nobody finds them
            found |= get_type_hints(cls, include_extras=True)
    return found


def check_rules(owner: Any) -> None:
    """Refuses values of dataclass fields that no `Literal` has, and numbers and schedules that break a [`Rule`]. Raises
    `ValueError`: saying which, what came and what was expected."""
    kind: Any = type(owner)
    for name, hint in _hints(kind).items():
        value: Any = getattr(owner, name, None)
        said = None
        if get_origin(hint) is Literal and value not in get_args(hint):
            said = f"must be {' or '.join(map(repr, get_args(hint)))}"
        for rule in get_args(hint)[1:] if get_origin(hint) is Annotated and value is not None else ():
            bounds = extremes(value)
            if not all(map(rule.holds, bounds if callable(value) else (value,))):
                said = rule.words
        if said is not None:
            advice = f" Write one of them for {name}={value!r}." if get_origin(hint) is Literal else ""
            raise ValueError(f"{kind.__name__}: {name} {said}, got {value!r}.{advice}")


def check_fields(owner: Any) -> None:
    """Refuses values of dataclass fields of another type than declared, and numbers that are not finite. Fields of
    other types than numbers, texts and truth values are left to their owner. Raises `ValueError`: saying which, what
    came and what was expected."""
    kind: Any = type(owner)
    for field in fields(owner):
        if not field.init:
            continue
        name, value = f"{type(owner).__name__}: {field.name}", getattr(owner, field.name)
        hint = _hints(kind).get(field.name)
        hint = get_args(hint)[0] if get_origin(hint) is Annotated else hint
        kinds = set(get_args(hint)) if get_origin(hint) in (Union, UnionType) else {hint}
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value!r}.")
        if kinds <= _WORDS.keys() and not _is_of(value, kinds):
            raise ValueError(f"{name} must be {' or '.join(_WORDS[kind] for kind in kinds)}, got {value!r}.")


def _is_of(value: Any, kinds: set[Any]) -> bool:
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return type(value) in kinds
    return isinstance(value, Integral if float not in kinds else Real) and bool(kinds & {int, float})
