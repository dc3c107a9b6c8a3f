# SPDX-License-Identifier: Apache-2.0
"""The weights that an ONNX file or one of OpenVINO stores, of any exporter: how many numbers, in how many bytes, how many of them zero; and how large
it is with them."""

from __future__ import annotations

import glob
import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from ..openvino_runtime import load_openvino

_NO_WEIGHTS = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)  # positions, shapes, masks
_BESIDE = (".scale", ".zero_point", "_scale", "_zero_point", "_scales", "_zero_points")


class StoredTensor(NamedTuple):
    """A weight: its name, how many numbers it has as far as the file tells, its bytes, and the share of zeros where it is one of plain
    numbers."""

    name: str
    numbers: int
    bytes: int
    zeros: float | None


def stored_weights(path: Path) -> list[StoredTensor]:
    """The constants of two axes and more, in the order of the file, without scales and zero points."""
    found = []
    values = _converted(path) if path.suffix == ".xml" else ir.load(path).graph.initializers.values()
    for value in values:
        name, tensor = str(value.name), value.const_value
        if tensor is None or len(tensor.shape) < 2 or name.endswith(_BESIDE) or tensor.dtype in _NO_WEIGHTS:
            continue
        packed = [node for node in value.consumers() if node.op_type == "MatMulNBits"]
        numbers = math.prod(tensor.shape.numpy())
        if packed:
            numbers = packed[0].attributes["K"].as_int() * packed[0].attributes["N"].as_int()
        is_plain = tensor.dtype.is_floating_point() or tensor.dtype == ir.DataType.INT8
        zeros = float(np.mean(tensor.numpy() == 0)) if is_plain and numbers and not packed else None
        found.append(StoredTensor(name, numbers, tensor.nbytes, zeros))
    return found


def _converted(path: Path) -> list[ir.Value]:
    """The constants of a file of OpenVINO."""
    nodes = load_openvino().Core().read_model(str(path)).get_ops()
    names = {node.get_friendly_name(): node.data for node in nodes if node.get_type_name() == "Constant"}
    return [ir.val(name, const_value=ir.tensor(data, name=name)) for name, data in names.items() if data.ndim > 1]


def stored_bytes(paths: Iterable[Path]) -> int:
    """The size of files, with the weights that lie beside them, whatever those are called."""
    found: set[Path] = set()
    for path in paths:
        if path.suffix == ".xml":
            found |= {path.resolve(), path.with_suffix(".bin").resolve()}
            continue
        values = [value for graph in ir.load(path).graphs() for value in graph.initializers.values()]
        tensors = [value.const_value for value in values if isinstance(value.const_value, ir.ExternalTensor)]
        beside = path.parent.glob(f"{glob.escape(path.name)}[._]data*")
        found |= {file.resolve() for file in (path, *beside, *(Path(tensor.path) for tensor in tensors))}
    return sum(file.stat().st_size for file in found)
