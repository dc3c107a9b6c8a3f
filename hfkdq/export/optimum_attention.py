# SPDX-License-Identifier: Apache-2.0
"""Operations as a tracer should see them: attention as two matrix products, a constant scale, one softmax."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Optimum puts a function of its own in the place of `F.scaled_dot_product_attention`, which calls this one.
_FUSED = torch._C._nn.scaled_dot_product_attention


class PlainAttention(TorchFunctionMode):
    """While active, `scaled_dot_product_attention` is computed by `plain_attention`.

    The tracer's own translation computes the scale from shapes at every call, applies it twice, and guards against rows
    that attend to nothing.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        return (plain_attention if func is _FUSED else func)(*args, **(kwargs or {}))


class CountedFromTheFront(TorchFunctionMode):
    """While active, dimensions are permuted by numbers from 0 on, as ONNX has no others and the tracer writes what it gets."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in (Tensor.permute, torch.permute) and not kwargs:
            dims = args[1] if len(args) == 2 else args[1:]
            args = (args[0], [dim % args[0].ndim for dim in dims])
        return func(*args, **(kwargs or {}))


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """`softmax(query @ key.T * scale + mask) @ value`, with the arguments of `F.scaled_dot_product_attention`.

    A query that may attend to nothing gets the mean of the values, as with eager attention, instead of zeros. Nothing is
    dropped; keys and values with fewer heads than the queries are shared.
    """
    groups = int(query.shape[-3]) // int(key.shape[-3])
    if groups > 1:
        key, value = (each.repeat_interleave(groups, dim=-3) for each in (key, value))
    scores = (query * (int(query.shape[-1]) ** -0.5 if scale is None else scale)) @ key.transpose(-2, -1)
    if is_causal:
        rows = torch.arange(query.shape[-2], device=query.device).unsqueeze(-1)
        attn_mask = rows >= torch.arange(key.shape[-2], device=query.device)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            # Not infinity: a row of it would become NaN.
            zero = torch.zeros((), dtype=scores.dtype, device=scores.device)
            attn_mask = torch.where(attn_mask, zero, torch.finfo(scores.dtype).min)
        scores = scores + attn_mask  # (..., heads, length, positions)
    return scores.softmax(-1) @ value
