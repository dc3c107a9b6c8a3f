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
        named = {f"{key}_{suffixes[type(value)]}": value for key, value in attributes.items() if key != "outputs"}
        return g.op(name, *inputs, **named, outputs=attributes.get("outputs", 1))


def onnx_op(
    name: str, *inputs: Tensor, compute: Callable[..., Any], opset: int, outputs: int = 1,
    **attributes: int | float | str,
) -> Any:  # fmt: skip
    """Calls `compute(*inputs)` in torch, and is one operator in an exported graph.

    `name` has its domain unless that is ONNX's own (`"com.microsoft::MatMulNBits"`), `opset` is the version of the domain.
    `compute` gives the output, a tuple where there are several `outputs`; in tracing only its shape and type matter.
    """
    if torch.compiler.is_exporting():
        like = compute(*inputs)
        call: tuple[Any, ...] = (name, inputs, dict(attributes))
        if outputs == 1:
            return torch.onnx.ops.symbolic(*call, dtype=like.dtype, shape=like.shape, version=opset)
        dtypes, shapes = [one.dtype for one in like], [one.shape for one in like]
        return torch.onnx.ops.symbolic_multi_out(*call, dtypes=dtypes, shapes=shapes, version=opset)
    return _Operator.apply(name, {**attributes, "outputs": outputs}, compute, *inputs)
