# SPDX-License-Identifier: Apache-2.0
"""Scales and zero points against the formulas of their estimators, and against a search through all of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hfkdq.quantization.grids import Grid
from hfkdq.quantization.scales import SAMPLE, find_scale, kmeans_codebook, observed_bounds, scale_of

LINEAR = [Grid(bits, symmetric) for bits in (8, 4, 2) for symmetric in (True, False)]
SEARCHED = [*LINEAR, Grid(1), Grid(4, True, "power_of_two"), Grid(4, True, "power_law"), Grid(3, False, "power_law")]
SHAPES = {
    "normal": lambda: torch.randn(3, 400),
    "heavy": lambda: torch.distributions.StudentT(3.0).sample((3, 400)),
    "positive": lambda: torch.randn(3, 400).relu(),
    "outlier": lambda: torch.cat([torch.randn(3, 4000), torch.full((3, 1), 60.0)], dim=1),
}


def error_of(values, grid, scale, zero_point):
    return (grid.quantize(values, scale, zero_point) - values).square().sum(dim=-1)


@pytest.mark.parametrize("grid", [*LINEAR, Grid(1), Grid(4, True, "power_of_two"), Grid(4, True, "kmeans")], ids=str)
def test_min_max_reaches_from_end_to_end(grid):
    blocks = torch.tensor([[-1.0, 3.0, 0.5], [1.0, 2.0, 1.5], [-2.0, -1.0, -3.0], [0.0, 0.0, 0.0]])
    scale, zero_point = find_scale(blocks, grid, "min_max", 99.9)
    if grid.symmetric:
        largest = 1.0 if grid.mapping != "linear" else max(2.0 ** (grid.bits - 1) - 1, 1.0)
        expected = [size / largest for size in (3.0, 2.0, 3.0)]
        assert zero_point is None
    else:
        expected = [width / (2**grid.bits - 1) for width in (4.0, 2.0, 3.0)]  # zero is always inside
        zeros = [round(1.0 / expected[0]), 0, 2**grid.bits - 1, 0]
        assert zero_point.flatten().tolist() == zeros
    torch.testing.assert_close(scale[:3, 0], torch.tensor(expected))
    assert 0 < scale[3, 0] < 1e-10


@pytest.mark.parametrize("percentile", [60.0, 90.0, 99.0, 99.9])
@pytest.mark.parametrize("symmetric", [True, False])
def test_percentile_leaves_out_the_largest_few(percentile, symmetric):
    blocks = torch.randn(3, 1000)
    scale, zero_point = find_scale(blocks, Grid(4, symmetric), "percentile", percentile)
    for row, found in enumerate(scale.flatten().tolist()):
        ordered = sorted(blocks[row].tolist())
        left_out = 1000 - math.ceil(10 * percentile)
        low, high = min(0.0, ordered[left_out]), max(0.0, ordered[-1 - left_out])
        assert found == pytest.approx(max(-low, high) / 7 if symmetric else (high - low) / 15)
        if not symmetric:
            assert zero_point[row].item() == round(-low / found)
    assert torch.equal(
        find_scale(blocks, Grid(4), "percentile", 100.0)[0], find_scale(blocks, Grid(4), "min_max", 1)[0]
    )


@pytest.mark.parametrize("grid", SEARCHED, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_mse_is_near_the_best_clipping_and_never_worse_than_none(grid, shape):
    values = SHAPES[shape]()
    found = error_of(values, grid, *find_scale(values, grid, "mse", 99.9))
    assert (found <= error_of(values, grid, *find_scale(values, grid, "min_max", 99.9))).all()
    mapped = grid.domain(values)
    low, high = mapped.amin(-1, keepdim=True).clamp(max=0), mapped.amax(-1, keepdim=True).clamp(min=0)
    fractions = np.geomspace(0.006, 1.0, 150).tolist()
    errors = torch.stack([error_of(values, grid, *scale_of(low * f, high * f, grid)) for f in fractions])
    assert (found <= errors.amin(dim=0) * 1.08).all()


def test_mean_abs_is_xnor_net_at_one_bit_and_the_threshold_of_twn_at_two():
    blocks = torch.randn(3, 500)
    one, two = (find_scale(blocks, Grid(bits), "mean_abs", 99.9)[0] for bits in (1, 2))
    for row, values in enumerate(blocks.abs().tolist()):
        mean = sum(values) / 500
        large = [value for value in values if value > 0.7 * mean]
        assert one[row].item() == pytest.approx(mean)
        assert two[row].item() == pytest.approx(sum(large) / len(large))
    # Both are the scale of least squared error, for the signs alone and for those above the threshold.
    best = (error_of(blocks, Grid(1), one * f, None).sum() for f in (0.97, 1.03))
    assert all(error_of(blocks, Grid(1), one, None).sum() < worse for worse in best)


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_mean_abs_is_the_start_of_lsq_at_more_bits(bits):
    blocks = torch.randn(3, 500)
    scale, zero_point = find_scale(blocks, Grid(bits), "mean_abs", 99.9)
    largest = 2 ** (bits - 1) - 1
    torch.testing.assert_close(scale, 2 * blocks.abs().mean(dim=-1, keepdim=True) / largest**0.5)
    assert zero_point is None
    powers = find_scale(blocks, Grid(bits, True, "power_of_two"), "mean_abs", 99.9)[0]
    torch.testing.assert_close(powers, 2 * blocks.abs().mean(dim=-1, keepdim=True))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_mean_abs_counts_no_pruned_weights(bits):
    blocks = torch.randn(2, 64)
    pruned = torch.cat([blocks, torch.zeros(2, 64)], dim=1)
    torch.testing.assert_close(*(find_scale(b, Grid(bits), "mean_abs", 99.9)[0] for b in (blocks, pruned)))


@pytest.mark.parametrize("estimator", ["moving_average", "min_max", "percentile", "mse", "learned", "pact"])
@pytest.mark.parametrize("grid", [Grid(8, False), Grid(4, True), Grid(8, False, "power_law")], ids=str)
def test_observed_range_of_a_batch(estimator, grid):
    values = torch.cat([torch.randn(4, 300), torch.tensor([[30.0]]).expand(4, 1)], dim=1)
    low, high = observed_bounds(values, grid, estimator, 99.0)
    mapped = grid.domain(values).flatten().sort().values
    if estimator == "percentile":
        rank = math.ceil(0.99 * len(mapped))
        assert (low, high) == (mapped[len(mapped) - rank], mapped[rank - 1])
    elif estimator == "mse":
        assert (high / mapped[-1]).item() == pytest.approx((low / mapped[0]).item())
        errors = [
            error_of(values.reshape(1, -1), grid, *scale_of(*(end.reshape(1, 1) for end in ends), grid)).item()
            for ends in ((low, high), (mapped[0], mapped[-1]))
        ]
        assert errors[0] <= errors[1]
        assert high < 30.0 ** (0.5 if grid.mapping == "power_law" else 1.0) or grid.bits == 8
    else:
        assert (low, high) == (mapped[0], mapped[-1])
    assert low.shape == high.shape == ()


@pytest.mark.parametrize("count", [SAMPLE, SAMPLE + 1, 2 * SAMPLE - 1, 3 * SAMPLE])
def test_observers_look_at_no_more_than_their_sample_evenly_spaced(count):
    step = -(-count // SAMPLE)
    values = torch.zeros(count)
    values[::step] = torch.linspace(0, 1, len(values[::step]))
    if step > 1:
        values[1::step] = 5.0  # never looked at
    assert len(values[::step]) <= SAMPLE
    assert observed_bounds(values, Grid(8, False), "percentile", 99.0)[1].item() == pytest.approx(0.99, abs=1e-4)
    assert observed_bounds(values, Grid(8, False), "min_max", 99.0)[1].item() == values.max()


def lloyd(values, entries, steps):
    entries = list(entries)
    for _ in range(steps):
        members = [[] for _ in entries]
        for value in values:
            members[min(range(len(entries)), key=lambda i: abs(entries[i] - value))].append(value)
        entries = sorted(
            sum(group) / len(group) if group else entry for entry, group in zip(entries, members, strict=True)
        )
    return entries


@pytest.mark.parametrize("size", [2, 4, 16])
def test_codebook_is_that_of_lloyd(size):
    values = torch.randn(6, 50).double().float()
    flat = values.double().flatten().tolist()
    start = np.linspace(min(flat), max(flat), size).tolist()
    for steps in (0, 1, 5):
        expected = torch.tensor(lloyd(flat, start, steps))
        torch.testing.assert_close(kmeans_codebook(values, size, steps=steps), expected, rtol=1e-5, atol=1e-6)
    given = torch.linspace(-0.5, 9.0, size)
    found = kmeans_codebook(values, size, given)
    torch.testing.assert_close(found, torch.tensor(lloyd(flat, given.tolist(), 1)), rtol=1e-5, atol=1e-6)
    assert found[-1] == 9.0, "an entry that nothing is nearest to stays"


def test_codebook_steps_never_raise_the_error():
    values, codebook, before = torch.randn(500), None, math.inf
    for _ in range(6):
        codebook = kmeans_codebook(values, 8, codebook)
        error = (values[:, None] - codebook).square().amin(dim=1).sum().item()
        assert error <= before
        before = error
