# SPDX-License-Identifier: Apache-2.0
"""Finds the scale and zero point with which a tensor is quantized, from its values. Pure functions of tensors; blocks
of values that share a scale lie along the last axis."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .grids import SMALLEST_SCALE, Grid

# Fractions of the widest range that the search tries: even steps to a half, then down to a 200th, because a few outliers
# may lie that far out. The error is then within a few percent of the best.
SHRINK = (*(1.0 - 0.025 * i for i in range(21)), *(0.5 * 0.88**i for i in range(1, 36)))
# More values say nothing more of a range; a fixed stride takes them, so that the result is reproducible.
SAMPLE = 1 << 16


def find_scale(blocks: Tensor, grid: Grid, estimator: str, percentile: float) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of blocks of weights, float32 of shape `(..., values)`, by an estimator of a scheme. Both
    are float32 of shape `(..., 1)`; the zero point is `None` for symmetric grids."""
    values = grid.domain(blocks)
    if estimator == "mean_abs":
        return _mean_abs(values, grid).clamp(min=SMALLEST_SCALE), None
    low, high = _bounds(values, percentile if estimator == "percentile" else 100.0)
    if estimator == "mse" and grid.mapping != "kmeans":
        low, high = search_bounds(blocks, low, high, grid)
    return scale_of(low, high, grid)


def scale_of(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point for values in [low, high], a range that includes 0; bounds in the grid's domain."""
    if grid.symmetric:
        return (torch.maximum(-low, high) / grid.top).clamp(min=SMALLEST_SCALE), None
    scale = ((high - low) / grid.high).clamp(min=SMALLEST_SCALE)
    return scale, (-low / scale).round().clamp(0, grid.high)


def smallest_and_largest(values: Tensor, dim: int | None = None) -> tuple[Tensor, Tensor]:
    """Minimum and maximum, of all values or along an axis that is kept."""
    axes = () if dim is None else (dim,)
    if values.device.type == "cpu":  # there two passes are faster than aminmax
        return values.amin(axes, keepdim=dim is not None), values.amax(axes, keepdim=dim is not None)
    return values.aminmax() if dim is None else values.aminmax(dim=dim, keepdim=True)


def _bounds(values: Tensor, percentile: float) -> tuple[Tensor, Tensor]:
    """Smallest and largest value, or the percentiles of both ends, widened to include 0."""
    if percentile < 100.0:
        count = values.shape[-1]
        rank = max(1, math.ceil(count * percentile / 100.0))
        high = values.kthvalue(rank, dim=-1, keepdim=True).values
        low = values.kthvalue(count - rank + 1, dim=-1, keepdim=True).values
    else:
        low, high = smallest_and_largest(values, dim=-1)
    return low.clamp(max=0.0), high.clamp(min=0.0)


# Unrolled into a graph for every tensor, the search would take minutes to compile.
@torch.compiler.disable
def search_bounds(blocks: Tensor, low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The fraction of [low, high] whose quantization of each block has the least squared error."""
    best = torch.full_like(low, torch.inf)
    found = torch.ones_like(low)
    for fraction in SHRINK:
        scale, zero_point = scale_of(low * fraction, high * fraction, grid)
        error = (grid.quantize(blocks, scale, zero_point) - blocks).square().sum(dim=-1, keepdim=True)
        better = error < best
        best, found = torch.where(better, error, best), torch.where(better, fraction, found)
    return low * found, high * found


def _mean_abs(values: Tensor, grid: Grid) -> Tensor:
    sizes = values.abs()
    # Weights that are zero do not count, so that removing pruned ones changes nothing.
    mean = sizes.sum(dim=-1, keepdim=True) / (sizes > 0).sum(dim=-1, keepdim=True).clamp(min=1)
    if grid.bits == 1 or grid.mapping == "kmeans":
        return mean
    if grid.high == 1:
        large = sizes > 0.7 * mean
        return (sizes * large).sum(dim=-1, keepdim=True) / large.sum(dim=-1, keepdim=True).clamp(min=1)
    # A grid of powers of two reaches no further than its scale.
    return 2.0 * mean if grid.mapping == "power_of_two" else 2.0 * mean / math.sqrt(grid.high)


def observed_bounds(values: Tensor, grid: Grid, estimator: str, percentile: float) -> tuple[Tensor, Tensor]:
    """The range of a batch of activations, scalars that include 0, in the grid's domain. `"percentile"` and `"mse"`
    look at 65,536 values at most, evenly spaced."""
    if estimator not in ("percentile", "mse"):
        low, high = smallest_and_largest(grid.domain(values))
        return low.clamp(max=0.0), high.clamp(min=0.0)
    flat = values.reshape(-1)
    values = flat[:: max(1, -(-flat.numel() // SAMPLE))]
    low, high = _bounds(grid.domain(values).reshape(1, -1), percentile if estimator == "percentile" else 100.0)
    if estimator == "mse":
        low, high = search_bounds(values.reshape(1, -1), low, high, grid)
    return low.reshape(()), high.reshape(())


def kmeans_codebook(normalised: Tensor, size: int, codebook: Tensor | None = None, steps: int = 1) -> Tensor:
    """A codebook of k-means in one dimension (Lloyd, "Least Squares Quantization in PCM", 1982): `(size,)`, ascending.
    It starts from `codebook`, or evenly spaced from the smallest to the largest value, as "Deep Compression" (2016)
    found best, and takes `steps` iterations of assigning and averaging. An entry that nothing is nearest to stays."""
    values = normalised.reshape(-1)
    if codebook is None:
        fraction = torch.linspace(0.0, 1.0, size, device=values.device)
        codebook = values.amin() + fraction * (values.amax() - values.amin())
    for _ in range(steps):
        nearest = torch.bucketize(values, (codebook[1:] + codebook[:-1]) / 2)
        # Not bincount, whose size torch.compile cannot foresee.
        count, total = torch.zeros(2, size, dtype=torch.float64, device=values.device)
        count = count.scatter_add(0, nearest, torch.ones_like(values, dtype=torch.float64))
        total = total.scatter_add(0, nearest, values.double())
        means = (total / count.clamp(min=1)).float()
        codebook = torch.where(count > 0, means, codebook).sort().values
    return codebook
