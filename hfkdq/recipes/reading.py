# SPDX-License-Identifier: Apache-2.0
"""Reads recipes strictly, and writes them: YAML 1.2's plain values, no key twice, none that nothing reads."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable
from dataclasses import asdict, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args, get_type_hints

import yaml

from ..schema import brief, build, check_depth
from .recipe import Recipe

_Data = TypeVar("_Data")
_LARGEST = 2**20
_TAG = "tag:yaml.org,2002:"
# YAML 1.1, which PyYAML reads, takes `no` for false, `1:30` for 90 and `1e-4` for a text.
_PLAIN = {
    "null": (re.compile(r"~|null|Null|NULL|"), ["~", "n", "N", ""]),
    "bool": (re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF")),
    "int": (re.compile(r"[-+]?[0-9]+|0x[0-9a-fA-F]+|0o[0-7]+"), list("-+0123456789")),
    "float": (
        re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
        list("-+.0123456789"),
    ),
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (as PyYAML declares it)
    yaml_constructors: ClassVar[dict[str | None, Any]] = {  # what JSON has, so that no tag makes anything else
        None: yaml.SafeLoader.construct_undefined,
        f"{_TAG}str": yaml.SafeLoader.construct_yaml_str,
        f"{_TAG}seq": yaml.SafeLoader.construct_yaml_seq,
    }

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, "aliases are not read; write the value out", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        if not isinstance(node, yaml.MappingNode):
            raise yaml.constructor.ConstructorError(None, None, "expected a mapping", node.start_mark)
        found: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key is no single value", key_node.start_mark)
            key = self.construct_object(key_node)
            if key in found:
                told = f"the key {str(key)[:80]!r} is there twice"
                raise yaml.constructor.ConstructorError(None, None, told, key_node.start_mark)
            found[key] = self.construct_object(value_node, deep=True)
        return found

    def _plain(self, node: Any) -> Any:
        text, kind = str(self.construct_scalar(node)), node.tag.removeprefix(_TAG)
        value: Any = None
        if not _PLAIN[kind][0].fullmatch(text):  # with a tag such as !!int
            raise yaml.constructor.ConstructorError(None, None, f"{_short(text)} is no {kind}", node.start_mark)
        if kind == "bool":
            value = text.lower() == "true"
        elif kind == "int":
            value = int(text, 0) if text[:2] in ("0x", "0o") else int(text)
        elif kind == "float":
            value = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        if isinstance(value, float) and not math.isfinite(value):
            raise yaml.constructor.ConstructorError(None, None, f"{text[:40]} is not a finite number", node.start_mark)
        return value


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would take for something else than a text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _kind, (_pattern, _first) in _PLAIN.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _kind, re.compile(f"^(?:{_pattern.pattern})$"), _first)
    _Loader.add_constructor(_TAG + _kind, _Loader._plain)
_Loader.add_constructor(f"{_TAG}map", _Loader.construct_mapping)


def load(path: str | Path) -> dict[str, Any]:
    """The mapping in a file of a recipe, not yet held against the sections.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no YAML mapping; one line says where.
    """
    with open(path, "rb") as file:
        content = file.read(_LARGEST + 1)
    if len(content) > _LARGEST:
        raise ValueError(f"{path} is larger than {_LARGEST:,} bytes, which no recipe is.")
    try:
        data = _parsed(content.decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is no recipe: {brief(error)}.") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} is no recipe: it holds no keys with values, such as `model: bert-base-uncased`.")
    return data


def override(data: dict[str, Any], texts: Iterable[str]) -> dict[str, Any]:
    """`data` with `key=value` applied in order: dotted keys, numbers for the items of lists, YAML values. It is changed.

    Raises:
        ValueError: it is no such text, or the key leads through something that holds no others.
    """
    for text in texts:
        name, equals, value = text.partition("=")
        keys = name.split(".")
        if not equals or not all(re.fullmatch(r"\w+", key) for key in keys):
            raise ValueError(f"{_short(text)} is no key=value, such as training.num_train_epochs=1.")
        try:
            set_at(data, keys, _parsed(value))
        except ValueError as error:
            raise ValueError(f"{_short(text)}: {brief(error)}.") from None
    return data


def set_at(data: dict[str, Any], keys: list[str], value: Any) -> None:
    """Sets the value at a path of keys; sections on the way that are not there are made. Raises `ValueError`: a key
    leads through a single value, or to an item that a list has not."""
    place: Any = data
    for depth, key in enumerate(keys):
        here = ".".join(keys[:depth])
        step: Any = key
        if isinstance(place, list):
            if not key.isdecimal() or int(key) >= len(place):
                raise ValueError(f"{here} has the items 0 to {len(place) - 1}, and not {_short(key)}")
            step = int(key)
        elif not isinstance(place, dict):
            raise ValueError(f"{here} is {_short(place)}, which has nothing called {_short(key)}")
        if depth == len(keys) - 1:
            place[step] = value
        else:
            if isinstance(place, dict) and place.get(step) is None:
                place[step] = {}
            place = place[step]


def read(data: Any, source: str = "the recipe") -> Recipe:
    """The recipe in a mapping.

    Args:
        data (`dict`): as [`load`] and [`override`] give it.
        source (`str`): what errors call it.

    Raises:
        ValueError: an unknown key, which is told with the nearest known one, a value of another type, a number that is not
            finite; one line says where.
    """
    try:
        if not isinstance(data, dict):
            raise ValueError(f"it is {_short(data)}, and no mapping of sections")
        check_depth(data)
        _refuse_unknown_fields(data, Recipe, "")
        return build(Recipe, data, "recipe")
    except ValueError as error:
        text = brief(error).replace("recipe.", "", 1)
        raise ValueError(f"{source}: {text.rstrip('.')}.") from None


def dump(recipe: Recipe, header: str = "") -> str:
    """The recipe as YAML, which [`load`] and [`read`] make the equal recipe of; `header` is a comment on top."""
    data = {name: value for name, value in _without_defaults(recipe).items() if value is not None}
    comment = "".join(f"# {line}\n" for line in header.splitlines())
    return comment + yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def refuse_unknown(given: Iterable[Any], known: Collection[str], where: str) -> None:
    """Raises `ValueError`: a name that is not known, with the nearest known one."""
    for name in given:
        if name not in known:
            near = get_close_matches(str(name)[:100], known, n=1, cutoff=0.5)
            advice = f"did you mean {near[0]}" if near else f"there are {', '.join(sorted(known)[:60])}"
            raise ValueError(f"{f'{where} has' if where else 'there is'} no {_short(name)}; {advice}")


def _refuse_unknown_fields(data: dict[Any, Any], cls: Any, where: str) -> None:
    refuse_unknown(data, [item.name for item in fields(cls)], where)
    for name, hint in get_type_hints(cls).items():
        section = next((kind for kind in (hint, *get_args(hint)) if is_dataclass(kind)), None)
        if section is not None and isinstance(data.get(name), dict):
            _refuse_unknown_fields(data[name], section, name)


def _without_defaults(section: Any) -> dict[str, Any]:
    """The fields of a section; within its sections those that are not as by default, of which there may be none."""
    found = {item.name: getattr(section, item.name) for item in fields(section)}
    for name, value in found.items():
        if is_dataclass(value) and not isinstance(value, type):
            defaults = {item.name: item.default for item in fields(value)}
            found[name] = {key: item for key, item in asdict(value).items() if item != defaults[key]}
    return found


def _parsed(text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        told = error.problem or error.context or ""
        told = f"{error.context}, {told}" if told.startswith("but ") else told  # the second half of a sentence
        told += ". Indent with spaces" if "'\\t'" in told else ""
        raise ValueError(f"{place}{told}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError("it is nested without end" if isinstance(error, RecursionError) else brief(error)) from None


def _short(value: Any) -> str:
    text = brief(ValueError(repr(value)))
    return text if len(text) <= 60 else f"{text[:57]}..."
