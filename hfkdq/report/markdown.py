# SPDX-License-Identifier: Apache-2.0
"""Text that comes from elsewhere, as text in Markdown: it makes no heading, link, code, table or markup."""

from __future__ import annotations

import re
from typing import Any

_SIGNS = re.compile(r"[\\`*\[\]<>|~]|(?<!\w)_|_(?!\w)|&(?=#?\w+;)|@(?=\w)|\$(?=\S)")
_ENTITIES = {"<": "&lt;", ">": "&gt;"}
_BEGINNING = re.compile(r"^(?:[#>=+-](?!\d)|\d+(?=[.)](?:\s|$)))")
_ADDRESS = re.compile(r"(?<=:)//|(?i:(?<=www)\.)")
_SPACE = re.compile("[\\s\\x00-\\x1f\\x7f-\\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]+")
# Harmless in a code span, but then only a reader who knows where it ends can tell.
_UNSAFE = re.compile(r"[`<>]|\]\(|//|\{\{|\{%|(?i:www)\.")


class Markdown(str):
    """A text that is Markdown already."""


class _Escaping:
    """A value from elsewhere that any formatting escapes."""

    def __format__(self, spec: str) -> str:
        return escape(unwrapped(self))

    def __str__(self) -> str:
        return escape(unwrapped(self))


class _EscapingText(_Escaping, str):
    pass


class _EscapingList(_Escaping, list[Any]):
    pass


class _EscapingObject(_Escaping, dict[Any, Any]):
    pass


def one_line(value: Any) -> str:
    """A text in one line, without control characters and signs that turn its direction round."""
    return _SPACE.sub(" ", str(unwrapped(value))).strip()


def escape(value: Any) -> Markdown:
    """A text as Markdown shows it letter by letter, also in a table; what is Markdown stays."""
    if isinstance(value, Markdown):
        return value
    text = _SIGNS.sub(lambda match: _ENTITIES.get(match[0], f"\\{match[0]}"), one_line(value))
    text = _ADDRESS.sub(lambda match: "".join(f"\\{sign}" for sign in match[0]), text)
    return Markdown(_BEGINNING.sub(lambda match: f"{match[0]}\\" if match[0][-1].isdigit() else f"\\{match[0]}", text))


def is_unsafe(text: str) -> bool:
    """Whether a text that is shown as code could be taken for markup."""
    return _UNSAFE.search(text) is not None


def code(value: Any) -> Markdown:
    """A text in a code span; what looks like markup is escaped text instead."""
    text = one_line(value)
    return escape(text) if not text or is_unsafe(text) else Markdown(f"`{text}`")


def escaping(value: Any) -> Any:
    """Data from elsewhere, to be compared as it is and escaped wherever it is formatted."""
    if isinstance(value, dict):
        return _EscapingObject({key: escaping(item) for key, item in value.items()})
    if isinstance(value, (list, tuple)):
        return _EscapingList(escaping(item) for item in value)
    return _EscapingText(value) if isinstance(value, str) else value


def unwrapped(value: Any) -> Any:
    """A value without the wrapping of `escaping`."""
    if isinstance(value, dict):
        return {unwrapped(key): unwrapped(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [unwrapped(item) for item in value]
    return str.__str__(value)[:] if isinstance(value, str) else value
