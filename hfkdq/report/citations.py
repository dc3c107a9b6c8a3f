# SPDX-License-Identifier: Apache-2.0
"""The papers of the methods that a report says were used, as the documentation of their classes names them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from .. import losses, objectives
from ..losses.divergences import DIVERGENCES
from ..specs import PruningSpec, QuantizationSpec
from ..specs.quantization import QuantizationScheme

_PAPER = re.compile(r'((?:[Vv]an den )?[A-Z]\w+(?: and [A-Z]\w+| et al\.)?), "([^"]+)",?\)? \(?(?:\w+, )?(\d{4})')
_ARGUMENT = re.compile(r"(?:^|(?<= ))([a-z]\w*) \((?=[`c])")
_OPTION = re.compile(r'`"([\w:]+)"`')


def citations(facts: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Authors, title and year of the papers of recorded facts, each once, in the order of their years."""
    found = [paper for cls, settings in _used(facts) for paper in _papers(cls, settings)]
    return sorted(dict.fromkeys(found), key=lambda paper: (paper[2], paper))


def _used(facts: Mapping[str, Any]) -> Iterator[tuple[type, Mapping[str, Any]]]:
    """The classes that were at work, with those of their settings that stand for methods."""
    for entry in facts.get("distillation", {}).get("objectives", []):
        yield from _objective(entry)
    pruning = facts.get("pruning", {})
    for fact in [*pruning.get("earlier", []), pruning]:
        spec = fact.get("spec", {})
        by_likeness = spec.get("criterion") == "activation" and spec.get("structure") == "layer"
        yield PruningSpec, {"": "layer" if by_likeness else spec.get("criterion")}
    spec = facts.get("quantization", {}).get("spec")
    if spec:
        observed = spec.get("activation_bits") is not None
        if observed:
            yield QuantizationSpec, {}
        names = ["weight_mapping", *(["activation_mapping", "range_estimator"] if observed else [])]
        names += ["weight_estimator"] if spec.get("weight_estimator") == "learned" else []
        yield QuantizationScheme, {name: spec.get(name) for name in names}


def _objective(entry: Mapping[str, Any]) -> Iterator[tuple[type, Mapping[str, Any]]]:
    cls = getattr(objectives, str(entry.get("name")), None)
    if isinstance(cls, type):
        yield cls, entry
    for value in entry.values():
        if isinstance(value, Mapping):
            yield from _objective(value)
    divergence = str(entry.get("divergence", ""))
    known = DIVERGENCES.get(divergence) or getattr(losses, divergence.partition("(")[0], None)
    if isinstance(known, type):
        yield known, {}


def _papers(cls: type, settings: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The papers that a docstring names of a class itself, and of the settings that it had."""
    head, _, rest = " ".join((cls.__doc__ or "").split()).partition(" Args: ")
    texts = [_OPTION.split(head)[0], *_of_option(head, settings.get(""))]
    parts = _ARGUMENT.split(rest.partition(" Raises: ")[0])
    for name, told in zip(parts[1::2], parts[2::2], strict=True):
        value = settings.get(name)
        texts += [told] if value is True else _of_option(told, value)
    return [(authors, title, year) for text in texts for authors, title, year in _PAPER.findall(text)]


def _of_option(text: str, option: Any) -> list[str]:
    """What a text says of an option after naming it, up to the next one."""
    parts = _OPTION.split(text)
    return [told for name, told in zip(parts[1::2], parts[2::2], strict=True) if name == option]
