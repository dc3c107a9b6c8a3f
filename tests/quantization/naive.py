# SPDX-License-Identifier: Apache-2.0
"""Quantization in loops over single numbers, after the formulas of the specs, to compare the library with.

Knows numpy and the fields of a scheme; nothing of how the library computes.
"""

from __future__ import annotations

import numpy as np
import torch

F32 = np.float32
ALLOWED = [
    (bits, symmetric, mapping)
    for bits in (8, 6, 4, 3, 2, 1)
    for symmetric in (True, False)
    for mapping in ("linear", "power_law", "power_of_two", "kmeans")
    if (symmetric or (bits > 1 and mapping in ("linear", "power_law"))) and (bits > 1 or mapping == "linear")
]
"""Width, symmetry and mapping of weights that have a meaning together."""


def root(value):
    """`sign(x) sqrt(|x|)` of a float32: the power law with p = 0.5."""
    return F32(np.sign(value)) * np.sqrt(np.abs(value))


def square(value):
    """The inverse of `root`."""
    return F32(np.sign(value)) * F32(np.abs(value) * np.abs(value))


def scale_of(block, bits, symmetric, mapping, estimator=None):
    """Scale and zero point of the weights in `block` by minimum and maximum, or the mean size at 2 and 1 bits."""
    block = [root(value) for value in block] if mapping == "power_law" else block
    if not symmetric:
        low, high = min(F32(0), *block), max(F32(0), *block)
        scale = max(F32(high - low) / F32(2**bits - 1), F32(1e-12))
        return scale, int(np.clip(np.rint(-low / scale), 0, 2**bits - 1))
    sizes = [abs(value) for value in block]
    used = [float(size) for size in sizes if size > 0]
    mean = F32(sum(used)) / F32(max(len(used), 1))
    if bits == 1 and estimator != "min_max":
        return mean, 0
    if bits == 2 and mapping != "kmeans" and estimator != "min_max":
        large = [float(size) for size in sizes if size > F32(0.7) * mean]
        return F32(sum(large)) / F32(max(len(large), 1)), 0
    steps = 1 if mapping in ("power_of_two", "kmeans") else max(2 ** (bits - 1) - 1, 1)
    return max(max(sizes) / F32(steps), F32(1e-12)), 0


def code_of(value, scale, zero_point, bits, symmetric, mapping, codebook=None):
    """The integer of one weight."""
    largest = 2 ** (bits - 1) - 1
    if mapping == "kmeans":
        return int(np.argmin([abs(float(value / scale) - float(entry)) for entry in codebook]))
    if mapping == "power_of_two":
        grid = {0: 0.0}
        for code in range(1, largest + 1):
            grid[code] = 2.0 ** (code - largest)
            grid[-code] = -grid[code]
        return min(grid, key=lambda code: (abs(float(value / scale) - grid[code]), -abs(code)))
    if bits == 1:
        return 1 if value >= 0 else -1
    value = root(value) if mapping == "power_law" else value
    code = int(np.rint(F32(value * (F32(1) / scale)))) + zero_point
    return min(max(code, -largest if symmetric else 0), largest if symmetric else 2**bits - 1)


def value_of(code, scale, zero_point, bits, mapping, codebook=None):
    """The number that an integer stands for."""
    if mapping == "kmeans":
        return F32(codebook[code]) * scale
    if mapping == "power_of_two":
        return F32(np.sign(code) * float(scale) * 2.0 ** (abs(code) - (2 ** (bits - 1) - 1)))
    value = F32(code - zero_point) * scale
    return square(value) if mapping == "power_law" else value


def quantize_weight(weight, bits, symmetric=True, mapping="linear", *, blocks=None, codebook=None, estimator=None):
    """Integers and values of a weight, as tensors of its shape.

    `blocks` is how many blocks of neighbouring weights have a scale of their own; one for each row by default.
    """
    flat = weight.detach().float().reshape(blocks or len(weight), -1).numpy()
    codes, values = [], []
    for block in flat:
        scale, zero_point = scale_of(list(block), bits, symmetric, mapping, estimator)
        for number in block:
            code = code_of(number, scale, zero_point, bits, symmetric, mapping, codebook)
            codes.append(code)
            values.append(value_of(code, scale, zero_point, bits, mapping, codebook))
    return (
        torch.tensor(codes).reshape(weight.shape),
        torch.tensor(np.array(values, dtype=F32)).reshape(weight.shape).to(weight.dtype),
    )


def quantize_activation(values, scale, zero_point, bits, mapping="linear"):
    """Values on the unsigned grid of an activation, and their integers, as tensors."""
    scale, codes, found = F32(scale), [], []
    for number in values.detach().float().reshape(-1).numpy():
        number = root(number) if mapping == "power_law" else number
        code = int(min(max(int(np.rint(F32(number * (F32(1) / scale)))) + zero_point, 0), 2**bits - 1))
        codes.append(code)
        value = F32(code - zero_point) * scale
        found.append(square(value) if mapping == "power_law" else value)
    return torch.tensor(codes).reshape(values.shape), torch.tensor(np.array(found, dtype=F32)).reshape(values.shape)
