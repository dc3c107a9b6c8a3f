# SPDX-License-Identifier: Apache-2.0
"""Holds JSON that may be damaged or hostile against the types that it should have."""

from __future__ import annotations

import enum
import json
import math
import re
import types
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints, is_typeddict

_Data = TypeVar("_Data")
_DEEPEST = 50
_LARGEST = 2**63
_LONGEST = 10_000
# Control characters, line breaks, halves of characters, and what turns the direction of the text round.
_UNPRINTED = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\u202a-\u202e\u2066-\u2069]")
_NAME = re.compile(r"[\w.:/-]{1,500}")


class FreeText(str):
    """In types: a text that may have line breaks and other characters, as what people have written has."""


def _is_name(value: str, where: str) -> None:
    if not _NAME.fullmatch(value):
        raise ValueError(
            f"{where} is {shortened(value)}, expected the name of a module: letters, digits and _ . : / - alone, as there are "
            "no patterns in a record"
        )


def _is_count(value: int, where: str) -> None:
    if not 0 <= value < 2**48:
        raise ValueError(f"{where} is {value}, expected a number from 0 on")


Name = Annotated[str, _is_name]
"""The name of a module or a tensor, never a pattern."""
Count = Annotated[int, _is_count]
"""A number of things, or their size."""


def read_json(text: str) -> dict[str, Any]:
    """The object in a JSON text, without numbers that are none, keys that occur twice, or endless nesting. Raises
    `ValueError`: it is no such text; one line says why."""
    try:
        data = json.loads(text, object_pairs_hook=_object, parse_constant=_no_number, parse_float=_float)
    except RecursionError:
        raise ValueError("it is nested without end") from None
    except ValueError as error:
        raise ValueError(brief(error)) from None
    if not isinstance(data, dict):
        raise ValueError(f"it is {_called(data)}, not an object")
    check_depth(data)
    return data


def read_file(path: str | Path) -> dict[str, Any]:
    """As [`read_json`], of a file; errors name it."""
    try:
        return read_json(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError is one too
        raise ValueError(f"{path} is damaged: {error}. Write it again.") from None


def brief(error: BaseException) -> str:
    """What an error says, on one line that can be printed, of at most 300 characters: it may quote damaged data."""
    return _UNPRINTED.sub(" ", " ".join(str(error)[:2000].split()))[:300]


def check(value: Any, hint: Any, where: str) -> None:
    """Refuses a value from JSON that is not of the type `hint`, as dataclasses and typed dictionaries have it; `where` is
    what it is called, such as `"engines[0].size"`. Raises `ValueError`: one line says where, what came and what was
    expected."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return
    if origin is Annotated:
        check(value, inner[0], where)
        for rule in inner[1:]:
            rule(value, where)
        return
    if origin in (Union, types.UnionType):
        _check_union(value, inner, where)
    elif is_dataclass(hint) or is_typeddict(hint):
        _check_fields(value, hint, where)
    elif origin is Literal:
        if value not in inner:
            raise ValueError(f"{where} is {_called(value)}, expected {' or '.join(map(repr, inner))}")
    elif origin in (list, tuple):
        _expect(value, (list, tuple), "a list", where)
        for number, item in enumerate(value):
            check(item, inner[0], f"{where}[{number}]")
    elif origin is dict:
        _expect(value, dict, "an object", where)
        for key, item in value.items():
            check(key, inner[0], f"the name {shortened(key)} in {where}")
            check(item, inner[1], f"{where}.{shortened(key)}")
    else:
        _check_scalar(value, hint, where)


def build(cls: type[_Data], data: Any, where: str) -> _Data:
    """A dataclass from checked data, with the dataclasses within it."""
    check(data, cls, where)
    hints = _hints(cls)  # type: ignore[arg-type]
    return cls(**{name: _built(value, hints[name], f"{where}.{name}") for name, value in data.items()})


def _built(value: Any, hint: Any, where: str) -> Any:
    inner = get_args(hint)
    if get_origin(hint) is tuple:
        return tuple(_built(item, inner[0], where) for item in value)
    candidates = [hint, *inner] if get_origin(hint) in (Union, types.UnionType) else [hint]
    cls = next((item for item in candidates if is_dataclass(item) and isinstance(item, type)), None)
    return build(cls, value, where) if cls is not None and value is not None else value


def _check_union(value: Any, hints: tuple[Any, ...], where: str) -> None:
    if value is None and type(None) in hints:
        return
    kinds = [hint for hint in hints if hint is not type(None)]
    fitting = [hint for hint in kinds if _is_alike(value, hint)]
    check(value, (fitting or kinds)[0], where)


def _is_alike(value: Any, hint: Any) -> bool:
    kind = dict if get_origin(hint) is dict or is_typeddict(hint) else hint
    kind = list if get_origin(hint) in (list, tuple) else kind
    kind = str if kind is FreeText else kind
    return isinstance(kind, type) and isinstance(value, kind)


def _check_fields(value: Any, cls: Any, where: str) -> None:
    _expect(value, dict, "an object", where)
    hints = _hints(cls)
    if is_dataclass(cls):
        unknown = sorted(set(value) - set(hints))
        if unknown:
            names = ", ".join(shortened(name).strip("'") or "''" for name in unknown[:8])
            raise ValueError(
                f"{where} has no field {names}; its fields are {', '.join(sorted(hints))}. Was it written by another "
                "version of hfkdq?"
            )
        needed = {item.name for item in fields(cls) if item.default is item.default_factory is MISSING}
    else:
        needed = set(cls.__required_keys__)
    missing = sorted(needed - set(value))
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    for name, hint in hints.items():
        if name in value:
            check(value[name], hint, f"{where}.{name}")


@cache
def _hints(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)


def _check_scalar(value: Any, hint: Any, where: str) -> None:
    words = {int: "an integer", float: "a number", str: "a text", FreeText: "a text", bool: "true or false"}
    kinds = {float: (int, float), FreeText: str}
    members: Any = hint if isinstance(hint, enum.EnumMeta) else ()
    named = " or ".join(str(member.value) for member in members) or str(hint)
    _expect(value, kinds.get(hint, hint), words.get(hint, named), where)
    if hint is not bool and isinstance(value, bool):
        raise ValueError(f"{where} is {_called(value)}, expected {words[hint]}")
    if hint in (int, float) and not (abs(value) < _LARGEST and math.isfinite(value)):
        raise ValueError(f"{where} is not a number of a sane size")
    if hint is str and (len(value) > _LONGEST or _UNPRINTED.search(value)):
        raise ValueError(f"{where} is a text with line breaks or control characters, or far too long")


def _expect(value: Any, kind: Any, words: str, where: str) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{where} is {_called(value)}, expected {words}")


def _called(value: Any) -> str:
    return {dict: "an object", list: "a list", type(None): "null"}.get(type(value)) or shortened(value)


def shortened(value: Any) -> str:
    """The `repr` of a value, of at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(
            f"the name {shortened(next(n for n in names if names.count(n) > 1))} occurs twice in an object"
        )
    return data


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number in JSON")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{shortened(text)} is too large a number")
    return value


def check_depth(data: Any) -> None:
    """Refuses what is nested without end, and what is no JSON."""
    level = [data]
    for _ in range(_DEEPEST):
        below = [item for part in level for item in (part.values() if isinstance(part, dict) else part)]
        level = [item for item in below if isinstance(item, (dict, list))]
        if not level:
            return
    raise ValueError(f"it is nested more than {_DEEPEST} deep")
