# SPDX-License-Identifier: Apache-2.0
"""Fingerprints of a teacher: a fast one for checkpoints, and one over all its weights for cached outputs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..modeling.forwards import base_of

_CHUNK = 2**24
_NOT_OF_THE_MODEL = ("transformers_version", "dtype", "torch_dtype")


def fingerprint(model: nn.Module) -> str:
    """Class of a model and a hash of its parameters: names, and shapes and 16 values of those in floats."""
    return _hashed(model, hashlib.sha256(), model.named_parameters(), sample=16)


def weights_fingerprint(model: nn.Module) -> str:
    """Class of a model and a hash of its configuration and of all its weights and persistent buffers in floats.

    All weights are read, at about a gigabyte per second, because a teacher that was trained a little further may differ
    in any of them. Of those that lie on disk under a `device_map`, only names and shapes count.
    """
    config = json.loads(base_of(model).config.to_json_string(use_diff=False))
    kept = {k: v for k, v in config.items() if not k.startswith("_") and k not in _NOT_OF_THE_MODEL}
    transient = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name not in transient]
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    return _hashed(model, digest, [*model.named_parameters(), *buffers])


def _hashed(model: Any, digest: Any, tensors: Iterable[tuple[str, torch.Tensor]], sample: int | None = None) -> str:
    for name, tensor in tensors:
        digest.update(name.encode())
        # When first used, bitsandbytes repacks weights in integers and casts biases up.
        if not tensor.is_floating_point():
            continue
        digest.update(f" {tuple(tensor.shape)}".encode())
        if tensor.device.type == "meta":
            continue
        values = tensor.detach().reshape(-1)[:: 1 if sample is None else max(tensor.numel() // sample, 1)]
        for chunk in torch.split(values, _CHUNK):
            digest.update(chunk.float().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return f"{type(base_of(model)).__name__} {digest.hexdigest()[:16]}"
