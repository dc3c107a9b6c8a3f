# SPDX-License-Identifier: Apache-2.0
"""Puts an ONNX operator of one's choice into a graph, whichever of torch's two tracers draws it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _Operator(torch.autograd.Function):
    """A call that the TorchScript tracer writes as one node."""

    @staticmethod
    def forward(ctx: Any, name: str, attributes: dict[str, Any], compute: Callable[..., Tensor], *inputs: Any) -> Any:
        return compute(*inputs)

    @staticmethod
    def symbolic(g: Any, name: str, attributes: dict[str, Any], compute: Callable[..., Tensor], *inputs: Any) -> Any:
        suffixes = {int: "i", float: "f", str: "s"}
        return g.op(name, *inputs, **{f"{key}_{suffixes[type(value)]}": value for key, value in attributes.items()})


def onnx_op(
    name: str, *inputs: Tensor, compute: Callable[..., Tensor], opset: int, **attributes: int | float
) -> Tensor:
    """Calls `compute(*inputs)` in torch, and is one operator of one output in an exported graph.

    `name` has its domain unless that is ONNX's own (`"com.microsoft::MatMulNBits"`), `opset` is the version of the domain.
    `compute` gives the output, or in tracing its shape and type.
    """
    if torch.compiler.is_exporting():
        like = compute(*inputs)
        result: Tensor = torch.onnx.ops.symbolic(
            name, inputs, dict(attributes), dtype=like.dtype, shape=like.shape, version=opset
        )
        return result
    traced: Tensor = _Operator.apply(name, attributes, compute, *inputs)
    return traced
