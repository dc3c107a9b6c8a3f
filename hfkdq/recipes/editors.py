# SPDX-License-Identifier: Apache-2.0
"""The JSON Schema of recipes, for editors that complete and check them, from the same types that recipes are read by."""

from __future__ import annotations

import enum
import inspect
import re
from dataclasses import MISSING, fields, is_dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from transformers import Seq2SeqTrainingArguments

from ..pruning import PruningCallback
from ..quantization import QATCallback
from ..specs import PruningSpec, QuantizationSpec
from .parts import (
    DIVERGENCES,
    LAYER_SCHEDULES,
    OBJECTIVES,
    SCHEDULES,
    arguments_of,
    callback_arguments,
    classes_for,
    data_hint,
    training_fields,
)
from .recipe import Recipe

_TYPES = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null", dict: "object"}
_ARGUMENT = re.compile(r"^([a-z][\w, ]*) \((.*?)\): (.*)$", re.DOTALL)


def json_schema() -> dict[str, Any]:
    """The schema: every section, class and argument with its type, its default and what its documentation says of it."""
    known = {**OBJECTIVES, **DIVERGENCES, **SCHEDULES, **LAYER_SCHEDULES}
    schema = _section(Recipe)
    properties = schema["properties"]
    properties["objectives"]["anyOf"][0]["items"] = _one_of(OBJECTIVES)
    properties["training"] = {**properties["training"], **_training()}
    for name, spec, callback in (
        ("pruning", PruningSpec, PruningCallback), ("quantization", QuantizationSpec, QATCallback),
    ):  # fmt: skip
        arguments = {**arguments_of(spec), **callback_arguments(callback)}
        section = _object(arguments, {**_described(callback), **_described(spec)})
        several = [{"type": "array", "items": section, "minItems": 1}] if name == "pruning" else []
        properties[name] = {**properties[name], "anyOf": [section, *several, {"type": "null"}]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema", "title": "hfkdq recipe", **schema,
        "$defs": {name: _object(arguments_of(cls), _described(cls)) for name, cls in known.items()},
    }  # fmt: skip


def _section(cls: Any) -> dict[str, Any]:
    hints, told = get_type_hints(cls), _described(cls)
    needed = [item.name for item in fields(cls) if item.default is item.default_factory is MISSING]
    found = {
        item.name: {
            **_of(hints[item.name]),
            **({} if item.default in (MISSING, None) else {"default": item.default}),
            **({"description": told[item.name]} if item.name in told else {}),
        }
        for item in fields(cls)
    }
    return {"type": "object", "properties": found, "required": needed, "additionalProperties": False}


def _object(arguments: dict[str, tuple[Any, Any]], told: dict[str, str]) -> dict[str, Any]:
    """The arguments of a class, of which those without a default are required."""
    properties = {
        name: {
            **_of(hint),
            **({"default": default} if isinstance(default, (int, float, str)) else {}),
            **({"description": told[name]} if name in told else {}),
        }
        for name, (hint, default) in arguments.items()
    }
    needed = [name for name, (_, default) in arguments.items() if default in (MISSING, inspect.Parameter.empty)]
    return {"type": "object", "properties": properties, "required": needed, "additionalProperties": False}


def _training() -> dict[str, Any]:
    told = {item.name: item.metadata.get("help") for item in fields(Seq2SeqTrainingArguments)}
    properties = {
        name: {**_of(hint), **({"description": " ".join(text.split())} if (text := told[name]) else {})}
        for name, hint in training_fields().items()
    }
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _of(hint: Any) -> dict[str, Any]:
    """The schema of a type: of data, of objects that a class and its arguments stand for, or of both."""
    if is_dataclass(hint) and isinstance(hint, type) and hint.__module__ == Recipe.__module__:
        return _section(hint)
    classes = classes_for(hint)
    plain = data_hint(hint) if classes else hint
    choices = [] if plain is None else [_plain(plain)]
    if classes:
        choices.append(_one_of(classes))
    return choices[0] if len(choices) == 1 else {"anyOf": choices}


def _plain(hint: Any) -> dict[str, Any]:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return {"anyOf": [_of(kind) for kind in inner]}
    if origin is Literal:
        return {"enum": list(inner)}
    if hasattr(hint, "__metadata__"):  # Annotated
        return _of(inner[0])
    name = getattr(origin, "__name__", "")
    if name in ("list", "tuple", "Sequence"):
        return {"type": "array", **({"items": _of(inner[0])} if inner and inner[0] is not Any else {})}
    if name in ("dict", "Mapping"):
        return {"type": "object", **({} if inner[1] is Any else {"additionalProperties": _of(inner[1])})}
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return {"enum": [member.value for member in hint]}
    return {"type": _TYPES[hint]} if hint in _TYPES else {}


def _one_of(classes: dict[str, type]) -> dict[str, Any]:
    """The name of one of several classes, or that name with its arguments."""
    properties = {name: {"anyOf": [{"$ref": f"#/$defs/{name}"}, {"type": "null"}]} for name in classes}
    named = {
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 1,
    }
    return {"anyOf": [{"enum": [*classes]}, named]}


def _described(cls: type) -> dict[str, str]:
    """What the section `Args:` of a class, or of those it inherits from, says of each argument."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        lines = inspect.cleandoc(vars(base).get("__doc__") or "").split("\nArgs:\n")[-1].split("\n\n")[0]
        for entry in re.split(r"\n(?=    \S)", f"\n{lines}"):
            match = _ARGUMENT.match(" ".join(entry.split()))
            for name in match[1].split(", ") if match else ():
                found[name] = match[3]  # type: ignore[index]
    return found
