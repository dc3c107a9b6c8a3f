# SPDX-License-Identifier: Apache-2.0
"""Fields of configurations that hold ids of tokens, and their renumbering."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

ID_SUFFIXES = ("_token_id", "_token_ids", "_token_index")
ID_LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids")
ID_TABLES = ("lang_to_id", "task_to_id")


def renumbered_fields(fields: dict[str, Any], renumber: Callable[[int], int]) -> dict[str, Any]:
    """Those of the `fields` of a configuration that hold ids, with `renumber` applied to each."""
    changed: dict[str, Any] = {}
    for name, value in fields.items():
        if value is None or name.startswith("_"):
            continue
        if name.endswith(ID_SUFFIXES) or name in ID_LISTS:
            changed[name] = renumbered(value, renumber)
        elif name in ID_TABLES:
            changed[name] = {key: renumbered(id_, renumber) for key, id_ in value.items()}
        elif name == "forced_decoder_ids":  # pairs of a place and an id
            changed[name] = [[place, renumbered(id_, renumber)] for place, id_ in value]
        elif name == "sequence_bias":
            pairs = value.items() if isinstance(value, dict) else value
            new = [(renumbered(ids, renumber), bias) for ids, bias in pairs]
            changed[name] = (
                {tuple(ids): bias for ids, bias in new} if isinstance(value, dict) else list(map(list, new))
            )
    return changed


def renumbered(value: Any, renumber: Callable[[int], int]) -> Any:
    """`value` with every id in it replaced, in lists of any depth; what is no id stays."""
    if isinstance(value, (list, tuple)):
        return type(value)(renumbered(item, renumber) for item in value)
    return renumber(value) if isinstance(value, int) and not isinstance(value, bool) else value
