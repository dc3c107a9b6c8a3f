# SPDX-License-Identifier: Apache-2.0
"""Rotary positions whose frequencies depend on the length of the text, as operators that a file computes at every call."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .inputs import Tensors


@contextmanager
def rope_by_length(model: nn.Module) -> Iterator[None]:
    """Makes the frequencies follow the length of each text while it lasts, without a branch and without a memory of others."""
    modules = [module for module in model.modules() if _kinds(module)]
    for module in modules:
        module.forward = partial(_forward, module)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def beyond_original(model: nn.Module, batches: Sequence[Tensors]) -> list[Tensors]:
    """The batches, and one of a text that is longer than the frequencies stay the same for, where none is."""
    lengths = [_original(module, layer) for module in model.modules() for layer in _kinds(module)]
    known = [batch for batch in batches if "input_ids" in batch]
    longest = max((batch["input_ids"].shape[-1] for batch in known), default=0)
    if not lengths or not known or longest > max(lengths):
        return list(batches)
    ids = known[0]["input_ids"]
    usual = ids.shape[-1]
    times = -(-(max(lengths) + 2) // max(usual - 1, 1))

    def longer(name: str, value: Tensor) -> Tensor:
        if value.shape != ids.shape or name == "position_ids":
            return value[:1]
        return value[:1, : max(usual - 1, 1)].repeat(1, times)

    return [*batches, {name: longer(name, value) for name, value in known[0].items() if name != "position_ids"}]


def _kinds(module: nn.Module) -> dict[str | None, str]:
    """The kind of each layer type of a rotary module, where one depends on the length."""
    kind = getattr(module, "rope_type", None)
    kinds = kind if isinstance(kind, dict) else {None: kind}
    return {layer: str(name) for layer, name in kinds.items() if name == "longrope" or "dynamic" in str(name)}


def _original(module: Any, layer: str | None) -> int:
    """How long a text may be before its frequencies change."""
    config = module.config
    known = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    name = "original_max_position_embeddings"
    given = (known if layer is None else known[layer]).get(name, getattr(config, name, None))
    is_long = _kinds(module)[layer] == "longrope"
    return int(given if is_long and given is not None else config.max_position_embeddings)


def _forward(module: Any, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
    arguments = {} if layer_type is None else {"layer_type": layer_type}
    kind = _kinds(module).get(layer_type)
    own: Any = module
    if kind is not None:
        prefix = "" if layer_type is None else f"{layer_type}_"
        init = getattr(module, "rope_init_fn", None) or ROPE_INIT_FUNCTIONS[kind]
        length = position_ids.max() + 1
        if kind == "longrope":
            original = _original(module, layer_type)
            far, _ = init(module.config, x.device, seq_len=original + 1, **arguments)
            near = getattr(module, f"{prefix}original_inv_freq").to(x.device)
            frequencies = torch.where(length > original, far, near)
        else:
            frequencies, _ = init(module.config, x.device, seq_len=length, **arguments)  # type: ignore[arg-type]
        own = _Instead(module, f"{prefix}inv_freq", frequencies)
    return inspect.unwrap(type(module).forward)(own, x, position_ids, **arguments)


class _Instead:
    """A module with another tensor in the place of one of its own."""

    def __init__(self, module: nn.Module, name: str, value: Tensor) -> None:
        self.__dict__.update({"_module": module, name: value})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
