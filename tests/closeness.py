# SPDX-License-Identifier: Apache-2.0
"""Comparisons that hold on every processor: sums in another order, and roundings that then fall to the other side.

Three ways, the strictest first: in float64, where what rounding does is far below what a fault does (`doubled`); float32 within a
bound that follows from the sum (`assert_same_sum`); quantized runs that are equal but at ties (`Codes`, `assert_same_but_at_ties`).
Knows how PyTorch computes and what a fake quantizer is given; nothing of any test.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from hfkdq.quantization import activation_quantizers

UNIT = 2.0**-24
"""What one rounding to float32 changes at most, as a share of the number."""
NEAR = 1e-3
"""How near to a tie, in steps, a number may round either way: up to 255 steps with the relative errors of some layers, 4e-6."""
DOUBLE = 1e-9
"""What float64 may change of the largest number: a million times its unit of 2**-53, and what 1/60 of one in float32 would."""

ROUNDED_NORMS = 16 * UNIT
"""Of float64 where norms round to float32 inside: two or three roundings in each of the about seven norms of a tiny model."""


class _Doubled(TorchFunctionMode):
    """Makes float64 of every float32 that a model asks for by name, as norms and softmax do."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        return func(*args, **{k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()})


def doubled(model: Any) -> Any:
    """A copy of `model` in float64. Run it within `in_double`, as `Family.outputs` does.

    Two ways to the same numbers then differ by at most `DOUBLE` of the largest, and what differs by more is no rounding.
    """
    return copy.deepcopy(model).double()


@contextmanager
def in_double(model: Any) -> Iterator[None]:
    """Where a model of float64 computes in float64 throughout; for a model of another kind it changes nothing."""
    if model.dtype != torch.float64:
        yield
        return
    torch.set_default_dtype(torch.float64)
    try:
        with _Doubled():
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def batch_for(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """`batch` with its floating-point tensors in the precision of `model`."""
    return {k: v.to(model.dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in batch.items()}


def assert_same_in_double(found: torch.Tensor, expected: torch.Tensor, share: float = DOUBLE) -> None:
    """Two ways to the same float64 numbers differ by `share` of the largest at most."""
    assert found.dtype == expected.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=0, atol=share * max(1.0, float(expected.abs().max())))


def assert_same_sum(found: torch.Tensor, expected: torch.Tensor, terms: torch.Tensor, length: int) -> None:
    """Both are sums of `length` float32 terms in whatever order, and `terms` is the sum of their sizes.

    Each rounding changes a partial sum, which is at most `terms`, by `UNIT` of it: `length` products and additions make each side
    differ from the true sum by at most `length * UNIT * terms`, and the two sides from one another by twice that.
    """
    difference, bound = (found.double() - expected.double()).abs(), 2 * length * UNIT * terms.double()
    worst = (difference - bound).argmax()
    assert (difference <= bound).all(), f"{difference.flatten()[worst]} where {bound.flatten()[worst]} is allowed"


class Codes(list):
    """What every activation quantizer of `model` was given, in steps, and the integers it made of it: one pair a call, in order."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.handles = [q.register_forward_hook(self._see) for q in activation_quantizers(model).values()]

    def _see(self, quantizer: Any, args: Any, output: torch.Tensor) -> None:
        scale, zero = quantizer.qparams()
        steps = args[0].detach().double() / scale.double()
        codes = (torch.round(args[0].detach().float() * (1.0 / scale)) + zero).clamp(0, quantizer.maximum_code)
        self.append((steps.numpy(), codes.detach().numpy()))

    def taken(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """The pairs so far, which are then forgotten."""
        pairs = list(self)
        self.clear()
        return pairs


def assert_same_but_at_ties(
    found: Any, expected: Any, codes: list, others: list, *, atol: float, near: float = NEAR
) -> int:
    """Two runs of one quantized model, whose first axis is of rows that do not look at one another, give the same outputs.

    Rows whose integers are all equal have outputs that differ by `atol` at most. In any other row the first quantizer whose integers
    differ was given numbers within `near` of a tie there, and they differ by one; what comes after it is another number's.

    Args:
        codes, others: pairs of steps and integers (`Codes.taken`), one for each quantizer, in the order in which they ran.

    Returns:
        How many rows had no tie: at least one, or nothing would have been compared.
    """
    assert len(codes) == len(others) > 0
    found, expected = (np.asarray(x.detach() if torch.is_tensor(x) else x) for x in (found, expected))
    flipped = np.zeros(len(expected), bool)
    for (_, ours), (steps, theirs) in zip(codes, others, strict=True):
        ours, steps, theirs = (array.reshape(len(expected), -1) for array in (ours, steps, theirs))
        wrong = ours != theirs
        for row in np.flatnonzero(wrong.any(-1) & ~flipped):
            between = steps[row][wrong[row]]
            assert np.abs(between - np.floor(between) - 0.5).max() < near, f"row {row} differs where no tie is"
            assert np.abs(ours[row] - theirs[row]).max() == 1
        flipped |= wrong.any(-1)
    equal = int((~flipped).sum())
    assert equal, "every row has a tie, and so nothing was compared; give more rows"
    np.testing.assert_allclose(found[~flipped], expected[~flipped], rtol=0, atol=atol)
    return equal


def assert_same_tokens(found: torch.Tensor, expected: torch.Tensor, logits: torch.Tensor, near: float) -> None:
    """Tokens of `(rows, length)` that the largest of `logits` chose are equal up to where the two largest are about equal.

    `near` is how near, as a share of the largest logit: what one integer that rounds to the other side moves. The first token of
    some row must have been compared.
    """
    compared = 0
    for ours, theirs, row in zip(found, expected, logits, strict=True):
        for one, other, chances in zip(ours.tolist(), theirs.tolist(), row, strict=True):
            first, second = chances.topk(2).values.tolist()
            if first - second < near * float(chances.abs().max()):
                break  # either may be chosen, and what follows is another text
            assert one == other
            compared += 1
    assert compared
