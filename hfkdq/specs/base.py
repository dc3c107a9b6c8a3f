# SPDX-License-Identifier: Apache-2.0
"""The common base of specs: the grammar of module names, and their dictionaries."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from typing import Any, TypeVar

ModulePatterns = str | Sequence[str] | None


def as_text(*parts: Any) -> str:
    """The parts side by side: how descriptions write code where nothing else is asked for."""
    return "".join(map(str, parts))


_Spec = TypeVar("_Spec", bound="Serializable")


def module_matches(name: str, patterns: ModulePatterns) -> bool:
    """Whether a module name matches `patterns`, in the grammar of PEFT's `target_modules`.

    Args:
        name (`str`): dotted module name, as `model.named_modules()` gives it.
        patterns (`str` or list of `str`, *optional*): a string is a regular expression for the full name; a list
            holds names or their last parts (`"query"` matches `"encoder.layer.0.attention.self.query"`).

    Returns:
        `bool`: `False` for `None`.
    """
    if patterns is None:
        return False
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def unmatched(patterns: ModulePatterns, names: Collection[str]) -> list[str]:
    """The patterns that match none of `names`; a regular expression is one pattern."""
    single = {patterns: patterns} if isinstance(patterns, str) else {one: [one] for one in patterns or ()}
    return [one for one, pattern in single.items() if not any(module_matches(name, pattern) for name in names)]


class Serializable:
    """`to_dict` and `from_dict` for the specs below; unknown keys are refused."""

    def to_dict(self) -> dict[str, Any]:
        """The spec as JSON-ready data; `from_dict` gives the equal spec back."""
        data = asdict(self)  # type: ignore[call-overload]
        return {key: list(value) if isinstance(value, tuple) else value for key, value in data.items()}

    @classmethod
    def from_dict(cls: type[_Spec], data: dict[str, Any]) -> _Spec:
        """The spec that `to_dict` described. Raises `ValueError`: a key that is no field of this spec."""
        if not isinstance(data, dict):
            raise ValueError(f"{cls.__name__} is described by a dictionary, got {data!r:.80}.")
        known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(map(str, set(data) - known))
        if unknown:
            names = ", ".join(sorted(known))
            raise ValueError(f"{cls.__name__} has no field {', '.join(unknown)}. Its fields are: {names}.")
        return cls(**data)

    @classmethod
    def given(cls: type[_Spec], spec: Any, who: str) -> _Spec:
        """The spec that was given to `who`, as it is or as a dictionary. Raises `TypeError`: it is neither."""
        spec = cls.from_dict(spec) if isinstance(spec, dict) else spec
        if not isinstance(spec, cls):
            raise TypeError(f"{who} takes a {cls.__name__}, got {type(spec).__name__}: {who}({cls.__name__}(...)).")
        return spec

    def differs(self, then: Sequence[dict[str, Any]], strict: bool) -> str:
        """In words, that a checkpoint was trained with another spec, or with several of which none is this one; empty
        where it was not. Raises `ValueError`: it was, and `strict`."""
        if self in [self.from_dict(each) for each in then]:
            return ""
        told = f"The checkpoint was trained with {type(self).__name__}.from_dict({then[0]}), not with {self}."
        if strict:
            raise ValueError(
                f"{told} Resume with the same spec, give strict_resume=False to go on with the new one, or start "
                "a new training from the weights."
            )
        return f"{told} Training goes on with the new one."

    @classmethod
    def describe_rest(cls, settings: Mapping[str, Any], covered: Collection[str], code: Callable[..., str]) -> str:
        """The recorded settings that are not in `covered` and not as by default, as the end of a sentence."""
        defaults = {field.name: field.default for field in fields(cls)}  # type: ignore[arg-type]
        rest = [name for name, v in settings.items() if name not in covered and v != defaults.get(name, MISSING)]
        return f"; {', '.join(code(name, '=', settings[name]) for name in rest)}" if rest else ""


def freeze_patterns(spec: Any) -> None:
    """Makes the patterns of a spec immutable, and refuses those that are none."""
    for name in ("target_modules", "exclude_modules"):
        value = getattr(spec, name)
        if value is None:
            continue
        if isinstance(value, str):
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"{name}={value!r} is not a regular expression: {error}.") from error
        elif not isinstance(value, (list, tuple, set, frozenset)) or not all(isinstance(item, str) for item in value):
            raise TypeError(f"{name} must be a regular expression or a list of module names, got {value!r}.")
        else:
            object.__setattr__(spec, name, tuple(value))
