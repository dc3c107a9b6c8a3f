# SPDX-License-Identifier: Apache-2.0
"""Skips a layer: it returns its input unchanged."""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..protocols import Bypassable

_HOOK = "_bypass_hook"


def bypass_(layer: nn.Module, on: bool) -> None:
    """Bypasses a layer of a stack, or activates it again.

    While it is trained its output still counts, times zero, so that its parameters have gradients of zero and every
    process of a data-parallel run has one for each.
    """
    handle = layer.__dict__.get(_HOOK)
    if on and handle is None:
        # Before those by which Transformers collects hidden states, which may be there already.
        layer.__dict__[_HOOK] = layer.register_forward_hook(_hand_on, with_kwargs=True, prepend=True)
    elif not on and handle is not None:
        handle.remove()
        del layer.__dict__[_HOOK]
    cast(Bypassable, layer).bypassed = on


def _hand_on(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    came = args[0] if args else kwargs[list(inspect.signature(type(layer).forward).parameters)[1]]
    made = output if isinstance(output, Tensor) else output[0]
    passed = came + 0.0 * made.nan_to_num(0.0, 0.0, 0.0) if torch.is_grad_enabled() and made.requires_grad else came
    return passed if isinstance(output, Tensor) else (passed, *output[1:])
