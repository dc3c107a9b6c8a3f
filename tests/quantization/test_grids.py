# SPDX-License-Identifier: Apache-2.0
"""The values that integers stand for, against a search through all of them."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from hfkdq.quantization.grids import (
    Grid,
    compand,
    expand,
    fake_quantize,
    scale_gradient,
    straight_through,
)

CODEBOOK = torch.tensor([-1.0, -0.375, -0.25, 0.0, 0.125, 0.25, 0.5, 1.0])


def values_of(grid: Grid, scale: Fraction, zero_point: int) -> dict[int, Fraction]:
    """Every code of a grid, and the value that its docstring gives it; powers are squares."""
    codes = [code for code in range(grid.low, grid.high + 1) if code or grid.bits > 1]
    if grid.mapping == "linear":
        return {q: scale * (q - zero_point) for q in codes}
    if grid.mapping == "power_law":
        return {q: (1 if q >= zero_point else -1) * (scale * (q - zero_point)) ** 2 for q in codes}
    if grid.mapping == "kmeans":
        return {q: Fraction(CODEBOOK[q].item()) * scale for q in codes}
    sign = {q: (q > 0) - (q < 0) for q in codes}
    return {q: sign[q] * scale * Fraction(2) ** (abs(q) - grid.high) for q in codes}


GRIDS = [
    *(Grid(bits, symmetric) for bits in (8, 6, 4, 3, 2) for symmetric in (True, False)),
    *(Grid(bits, symmetric, "power_law") for bits in (8, 4, 2) for symmetric in (True, False)),
    *(Grid(bits, True, "power_of_two") for bits in (8, 6, 4, 3, 2)),
    Grid(1),
    Grid(3, True, "kmeans"),
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_number_becomes_the_nearest_value_of_the_grid(grid):
    scale, zero_point = Fraction(1, 32), 0 if grid.symmetric else 2**grid.bits // 3
    values = values_of(grid, scale, zero_point)
    tensors = (torch.tensor(float(scale)), torch.tensor(float(zero_point)) if not grid.symmetric else None, CODEBOOK)
    spread = float(max(abs(value) for value in values.values()))
    numbers = (torch.randn(60) * spread * 0.5).tolist()
    for number in numbers:
        code = grid.codes(torch.tensor(number), *tensors).item()
        if grid.mapping == "power_law":  # rounded where it is companded, so that nearest is meant there

            def distance(q, number=number):
                root = abs(number) ** 0.5 * (1 if number > 0 else -1)
                return abs(scale * (q - zero_point) - Fraction(root))
        else:

            def distance(q, number=number):
                return abs(values[q] - Fraction(number))

        assert code == min(values, key=distance)
    for code, value in values.items():
        found = grid.values(torch.tensor(float(code)), *tensors)
        assert found.item() == float(torch.tensor(float(value)))
        assert grid.codes(found, *tensors).item() == code or value == 0, "a value of the grid stays where it is"
    many = torch.tensor(numbers)
    assert torch.equal(grid.quantize(many, *tensors), grid.values(grid.codes(many, *tensors), *tensors))


@pytest.mark.parametrize(
    ("grid", "low", "high", "top"),
    [
        (Grid(8), -127, 127, 127.0),
        (Grid(6), -31, 31, 31.0),
        (Grid(3), -3, 3, 3.0),
        (Grid(2), -1, 1, 1.0),
        (Grid(1), -1, 1, 1.0),
        (Grid(4, False), 0, 15, 15.0),
        (Grid(4, True, "power_of_two"), -7, 7, 1.0),
        (Grid(4, True, "kmeans"), 0, 15, 1.0),
        (Grid(4, True, "power_law"), -7, 7, 7.0),
    ],
)
def test_integers_of_each_width(grid, low, high, top):
    assert (grid.low, grid.high, grid.top) == (low, high, top)


def test_ties_go_to_even_integers_and_to_the_larger_power_of_two():
    one = torch.ones(())
    assert Grid(4).codes(torch.tensor([0.5, 1.5, -2.5, 6.5, 99.0]), one, None).tolist() == [0, 2, -2, 6, 7]
    # Values 1, 1/2 and 1/4; halfway are 3/4, 3/8 and, to zero, 1/8.
    halves = torch.tensor([0.75, 0.375, 0.125, 0.1249, 5.0, -0.375, 0.0])
    assert Grid(3, True, "power_of_two").codes(halves, one, None).tolist() == [3, 2, 1, 0, 3, -2, 0]
    assert Grid(1).codes(torch.tensor([0.0, -0.1]), one, None).tolist() == [1, -1]


@pytest.mark.parametrize("power", [0.25, 0.5, 0.8, 1.0])
def test_companding_has_its_inverse(power):
    values = torch.tensor([-9.0, -0.01, 0.0, 0.3, 100.0])
    expected = [(-1 if value < 0 else 1) * abs(value) ** power for value in values.tolist()]
    torch.testing.assert_close(compand(values, power), torch.tensor(expected))
    torch.testing.assert_close(expand(compand(values, power), power), values)


def test_gradients_that_rounding_does_not_have():
    values = torch.tensor([-3.0, -0.4, 0.6, 9.0], requires_grad=True)
    upstream = torch.tensor([1.0, 2.0, 3.0, 4.0])
    for result, expected in (
        (straight_through(values, values.detach().round()), upstream),
        (straight_through(values, torch.zeros(4)), upstream),
        (straight_through(values, torch.zeros(4), torch.tensor([0.0, 1, 1, 0])), torch.tensor([0.0, 2, 3, 0])),
        (scale_gradient(values, 0.25), upstream / 4),
        (fake_quantize(values, torch.tensor(0.5), torch.tensor(2), 0, 7), torch.tensor([0.0, 2, 3, 0])),
        (fake_quantize(values.view(2, 2), torch.tensor([0.5, 2.0]), torch.tensor([2, 2]).int(), 0, 7).view(4),
         torch.tensor([0.0, 2, 3, 4])),
    ):  # fmt: skip
        (grad,) = torch.autograd.grad(result, values, upstream)
        assert torch.equal(grad, expected)
    assert straight_through(values, values.detach().round()).tolist() == [-3, 0, 1, 9]
    assert torch.equal(scale_gradient(values, 0.25), values)
    assert straight_through(values, torch.ones(4)).tolist() == [1.0] * 4
