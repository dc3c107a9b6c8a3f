# SPDX-License-Identifier: Apache-2.0
"""Layers whose weights the code of a model reads itself, without a call of the layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ...modeling.forwards import hooked
from ...quantization import QuantizedModule, quantized_modules
from ...quantization.layers import swap_out_
from ..verify import run_torch

logger = logging.get_logger(__name__)


def leave_read_weights_(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> None:
    """Takes the fake quantizers off layers that `batch` never calls and whose weights are read, as WavLM's attention does.

    What reads them computes with the weights in floating point, in torch as in the file.
    """
    modules = quantized_modules(model)
    called: set[int] = set()
    read: set[int] = set()

    def found(self: Any, name: str) -> Any:
        if name == "weight":
            read.add(id(self))
        return nn.Module.__getattr__(self, name)

    handles = [m.register_forward_pre_hook(lambda m, _: called.add(id(m))) for m in modules.values()]
    QuantizedModule.__getattr__ = found  # type: ignore[method-assign]
    try:
        with hooked(handles):
            run_torch(model, [dict(batch)])  # type: ignore[arg-type]
    finally:
        del QuantizedModule.__getattr__
    left = {name: module for name, module in modules.items() if id(module) in read - called}
    for module in left.values():
        swap_out_(module)
    if left:
        logger.warning(
            f"{type(model).__name__} never calls {len(left)} of its layers, such as {next(iter(left))}, but computes with their "
            "weights itself: they are in floating point, in the model as in the file."
        )
