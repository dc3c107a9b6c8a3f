# SPDX-License-Identifier: Apache-2.0
"""Encodes the outputs of one example as cells of a table, and decodes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import datasets
import numpy as np

from .info import CachedOutput

# Values of more than one axis are bytes: lists of them take longer to read than a small teacher to run.
_BYTES: dict[str, Any] = {"float16": np.dtype("<f2"), "int8": np.dtype("u1"), "int32": np.dtype("<i4")}
_LISTS = {"float16": "float16", "int8": "uint8", "int32": "int32"}


def features_of(output: CachedOutput) -> dict[str, Any]:
    """The types of the columns of an output. One axis per example is a list; more are the bytes of the values,
    little-endian, the last axis fastest. Of int8 there is a scale and a minimum in float32 for every vector along the
    last axis."""
    kind = datasets.Value("binary") if output.shape else datasets.List(datasets.Value(_LISTS[output.dtype]))
    found = {output.column: kind}
    scales = datasets.List(datasets.Value("float32"))
    return {**found, **dict.fromkeys(output.columns[1:], scales)}


def encode(output: CachedOutput, values: np.ndarray) -> dict[str, Any]:
    """The cells of one example from its values, which are finite but for minus infinity in float16, `(positions,
    *output.shape)`, in float32 or int32. float16 keeps 11 bits (a relative error up to 2^-11); int8 is off by half a
    scale at most, `(maximum - minimum) / 510`. Raises `OverflowError`: values beyond the range of float16."""
    more: dict[str, Any] = {}
    if output.dtype == "int8":
        values, scale, minimum = quantize(values)
        more = {output.columns[1]: scale.reshape(-1), output.columns[2]: minimum.reshape(-1)}
    elif output.dtype == "float16":
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if not np.isfinite(half[np.isfinite(values)]).all():
            raise OverflowError(f"values up to {np.abs(values[np.isfinite(values)]).max():g}")
        values = half
    cell = np.ascontiguousarray(values, dtype=_BYTES[output.dtype])
    return {output.column: cell.tobytes() if output.shape else cell, **more}


def decode(output: CachedOutput, row: Mapping[str, Any]) -> np.ndarray:
    """The values of one example, `(positions, *output.shape)`: float16, float32 where they were int8, or int64. Raises
    `ValueError`: the bytes are no whole number of positions."""
    cell = row[output.column]
    if output.shape:
        flat = np.frombuffer(bytes(cell), dtype=_BYTES[output.dtype])
        per_position = int(np.prod(output.shape))
        if flat.size % per_position:
            raise ValueError(
                f"A cell of {output.column!r} has {flat.size} values, no multiple of {per_position}: something cut it, such "
                "as the numpy format of datasets, which drops zeros at the end of bytes. Use the python or torch format."
            )
        values: np.ndarray = flat.reshape(-1, *output.shape)
    else:
        values = np.asarray(cell).astype(_BYTES[output.dtype])
    if output.dtype == "int32":
        return values.astype(np.int64, copy=False)
    if output.dtype == "float16":
        return values
    scale, minimum = (np.asarray(row[column], dtype=np.float32) for column in output.columns[1:])
    leading = values.shape[:-1]
    return values.astype(np.float32) * scale.reshape(*leading, 1) + minimum.reshape(*leading, 1)


def quantize(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes from 0 to 255 with `values = codes * scale + minimum` up to half a scale, for vectors along the last axis.

    Of values of shape `(..., n)` returns codes `(..., n)` in uint8, and scale and minimum `(...)` in float32. The scale of
    equal values is 0.
    """
    values = values.astype(np.float32)
    minimum = values.min(axis=-1)
    scale = (values.max(axis=-1) - minimum) / np.float32(255)
    steps = np.where(scale > 0, scale, np.float32(1))
    codes = np.rint((values - minimum[..., None]) / steps[..., None]).clip(0, 255).astype(np.uint8)
    return codes, scale.astype(np.float32), minimum
