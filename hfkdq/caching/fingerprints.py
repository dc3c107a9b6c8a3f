# SPDX-License-Identifier: Apache-2.0
"""Fingerprints of processors, collators and keys, by which a cache knows again what it depends on."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def processor_fingerprint(processor: Any) -> str | None:
    """Class of a tokenizer, image processor, feature extractor or processor of several, and a hash of what it holds.
    How a tokenizer pads and truncates is left out: calling it changes that, and the rows are tokenized already."""
    if processor is None:
        return None
    return f"{type(processor).__name__} {short_hash(_contents(processor))}"


def _contents(processor: Any) -> Any:
    names = getattr(processor, "attributes", None)
    if isinstance(names, (list, tuple)) and names:
        return {name: _contents(getattr(processor, name)) for name in names if hasattr(processor, name)}
    if hasattr(processor, "get_vocab"):
        backend = getattr(processor, "backend_tokenizer", None)
        found = {} if backend is None else json.loads(backend.to_str())
        found = {key: value for key, value in found.items() if key not in ("padding", "truncation")}
        special = {key: str(value) for key, value in processor.special_tokens_map.items()}
        return {"backend": found, "vocabulary": processor.get_vocab(), "special": special}
    return processor.to_dict() if hasattr(processor, "to_dict") else type(processor).__qualname__


def collator_name(collator: Any) -> str:
    """Where the class of a collator, or the function that it is, was defined."""
    named = collator if hasattr(collator, "__qualname__") else type(collator)
    return f"{named.__module__}.{named.__qualname__}"


def short_hash(contents: Any) -> str:
    """16 hexadecimal digits that stand for contents, which JSON or text can hold."""
    return hashlib.sha256(json.dumps(contents, sort_keys=True, default=str).encode()).hexdigest()[:16]
