# SPDX-License-Identifier: Apache-2.0
"""Skips a layer: it returns its input unchanged."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..protocols import Bypassable

_FORWARD = "_forward_when_active"


def bypass_(layer: nn.Module, on: bool) -> None:
    """Bypasses a layer of a stack, or activates it again.

    While it is trained its output still counts, times zero, so that its parameters have gradients of zero and every
    process of a data-parallel run has one for each.
    """
    own = layer.__dict__
    if on and _FORWARD not in own:
        # No hook: Transformers 4 collects hidden states before those run, as the result of `forward`.
        own[_FORWARD], own["forward"] = own.get("forward"), partial(_hand_on, layer)
    elif not on and _FORWARD in own:
        before = own.pop(_FORWARD)
        if before is None:
            del own["forward"]
        else:
            own["forward"] = before
    cast(Bypassable, layer).bypassed = on


def _hand_on(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    before = layer.__dict__[_FORWARD]
    output = type(layer).forward(layer, *args, **kwargs) if before is None else before(*args, **kwargs)
    came = args[0] if args else kwargs[list(inspect.signature(type(layer).forward).parameters)[1]]
    first: Any = next(iter(output)) if isinstance(output, dict) else 0
    made = output if isinstance(output, Tensor) else output[first]
    passed = came + 0.0 * made.nan_to_num(0.0, 0.0, 0.0) if torch.is_grad_enabled() and made.requires_grad else came
    if isinstance(output, dict):
        return type(output)({**output, first: passed})
    return passed if isinstance(output, Tensor) else (passed, *output[1:])
