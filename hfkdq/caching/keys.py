# SPDX-License-Identifier: Apache-2.0
"""What cached outputs depend on, as short texts that can be compared later."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..modeling.forwards import base_of

_CHUNK = 2**24
_NOT_OF_THE_MODEL = ("transformers_version", "dtype", "torch_dtype")


def weights_fingerprint(model: nn.Module) -> str:
    """Class of a model and a hash of its configuration and of all its weights and persistent buffers in floats.

    All weights are read, at about a gigabyte per second, because a teacher that was trained a little further may differ
    in any of them. Of weights in integers only the names count: bitsandbytes repacks them when they are first used. Of
    those that lie on disk under a `device_map`, names and shapes do.
    """
    digest = hashlib.sha256()
    base = base_of(model)
    config = json.loads(base.config.to_json_string(use_diff=False))
    kept = {k: v for k, v in config.items() if not k.startswith("_") and k not in _NOT_OF_THE_MODEL}
    digest.update(json.dumps(kept, sort_keys=True).encode())
    for name, tensor in _weights(model):
        digest.update(f"{name} {tuple(tensor.shape)}".encode() if tensor.is_floating_point() else name.encode())
        if not tensor.is_floating_point() or tensor.device.type == "meta":
            continue
        for part in torch.split(tensor.detach().reshape(-1), _CHUNK):
            digest.update(part.float().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return f"{type(base).__name__} {digest.hexdigest()[:16]}"


def _weights(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    transient = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name not in transient]
    return [*model.named_parameters(), *buffers]


def processor_fingerprint(processor: Any) -> str | None:
    """Class of a tokenizer, image processor, feature extractor or processor of several, and a hash of what it holds.

    How a tokenizer pads and truncates is left out: calling it changes that, and the rows are tokenized already.
    """
    if processor is None:
        return None
    text = json.dumps(_contents(processor), sort_keys=True, default=str)
    return f"{type(processor).__name__} {hashlib.sha256(text.encode()).hexdigest()[:16]}"


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


def short_hash(key: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that stand for a key."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def refuse_other_key(folder: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises `ValueError` where what lies in a folder was made for another key, naming what differs."""
    differ = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    if differ:
        told = "; ".join(f"{name} was {then.get(name)!r} and is {now.get(name)!r}" for name in differ)
        raise ValueError(
            f"{folder} holds teacher outputs that were cached for something else: {told}. Give another folder, delete "
            "this one, or leave folder out: then each such key has its own."
        )
