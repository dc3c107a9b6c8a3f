# SPDX-License-Identifier: Apache-2.0
"""Comparisons that hold on every processor: sums in another order, and roundings that then fall to the other side.

The strictest first: in float64, where what rounding does is far below what a fault does (`doubled`); float32 within a bound
that follows from the sum (`assert_same_sum`); tokens that are equal up to where two are about as likely (`assert_same_tokens`).
Integers that are equal but at ties are in `tests/export/test_ties.py`.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from hfkdq.modeling.proof import in_double  # noqa: F401 - for whoever compares

UNIT = 2.0**-24
"""What one rounding to float32 changes at most, as a share of the number."""
DOUBLE = 1e-9
"""What float64 may change of the largest number: a million times its unit of 2**-53, and what 1/60 of one in float32 would."""

ROUNDED_NORMS = 16 * UNIT
"""Of float64 where norms round to float32 inside: two or three roundings in each of the about seven norms of a tiny model."""


def doubled(model: Any) -> Any:
    """A copy of `model` in float64. Run it within `in_double`, as `Family.outputs` does.

    Two ways to the same numbers then differ by at most `DOUBLE` of the largest, and what differs by more is no rounding.
    """
    return copy.deepcopy(model).double()


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
