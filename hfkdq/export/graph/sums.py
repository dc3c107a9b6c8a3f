# SPDX-License-Identifier: Apache-2.0
"""Rounds what convolutions add up, so that whole blocks compute with bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ..defaults import neutral
from ..runtime import open_quietly
from .convolutions import Array, constant


def round_sums(model: ir.Model, path: Path, batches: Sequence[Mapping[str, Array]]) -> int:
    """Has an `Add` of what convolutions of integers give add rounded values, in place, so that whole blocks compute with bytes.

    A term that a convolution reads too, and the largest values of windows before one, lie on the trained grid of that
    convolution; others get a grid of 256 values from their smallest to their largest on `batches`, arrays by the names of
    inputs. Returns how many got one. `path` is a file to write and run.
    """
    graph = model.graph
    for node in [node for node in graph if node.op_type == "QuantizeLinear"]:
        value, readers = node.inputs[0], list(node.outputs[0].consumers())
        before = None if value is None else value.producer()
        if value is None or before is None or len(readers) != 1 or not _computes_with_codes(readers[0].outputs[0]):
            continue
        pooled = before.inputs[0] if before.op_type == "MaxPool" else None
        if pooled is not None and pooled.producer() is not None and pooled.producer().op_type != "DequantizeLinear":
            # The largest of rounded values is the rounded largest.
            _reroute(pooled, _grid(graph, pooled, *(constant(each) for each in node.inputs[1:3])), "MaxPool")
        _reroute(value, readers[0].outputs[0], "Add")
    terms = [value for node in graph if _adds(node) for value in node.inputs if _is_of_codes(value)]
    for value, (low, high) in _ranges(model, path, list(dict.fromkeys(terms)), batches).items():
        scale = np.float32(max(high - low, 1e-12) / 255)
        _reroute(value, _grid(graph, value, scale, np.uint8(round(-low / float(scale)))), *_ADDING)
    graph.sort()
    return len(set(terms))


_ADDING = ("Add", "GlobalAveragePool", "ReduceMean")


def _adds(node: ir.Node) -> bool:
    """Whether this adds up what convolutions give: a sum, or the pooling of a whole image, which keeps its axes."""
    return node.op_type in _ADDING and (node.op_type != "ReduceMean" or node.attributes.get_int("keepdims", 1) == 1)


def _computes_with_codes(value: ir.Value) -> bool:
    """Whether convolutions alone read a dequantized value."""
    return all(node.op_type == "Conv" for node in value.consumers())


def _is_of_codes(value: ir.Value | None) -> bool:
    """Whether a value is what a convolution of codes gives, or a norm and an activation after it."""
    node = None if value is None else value.producer()
    for kinds in (("Relu", "Clip"), ("BatchNormalization",)):
        if node is not None and node.op_type in kinds:
            node = None if node.inputs[0] is None else node.inputs[0].producer()
    if node is None or node.op_type != "Conv":
        return False
    given = [None if each is None else each.producer() for each in node.inputs[:2]]
    return all(each is not None and each.op_type == "DequantizeLinear" for each in given)


def _ranges(
    model: ir.Model, path: Path, values: Sequence[ir.Value], batches: Sequence[Mapping[str, Array]]
) -> dict[ir.Value, tuple[float, float]]:
    """The smallest and the largest of each value and zero, as ONNX Runtime computes them."""
    if not values:
        return {}
    kept = list(model.graph.outputs)
    model.graph.outputs.extend(value for value in values if value not in kept)
    for value in values:
        value.type = ir.TensorType(ir.DataType.FLOAT)
    ir.save(model, path)
    model.graph.outputs[len(kept) :] = []
    session = open_quietly(str(path))
    taken = [each.name for each in session.get_inputs()]
    found = dict.fromkeys(values, (0.0, 0.0))
    for batch in batches:
        inputs = {name: batch[name] if name in batch else neutral(name, batch) for name in taken}
        results = session.run([value.name for value in values], inputs)
        for value, result in zip(values, results, strict=True):
            low, high = found[value]
            found[value] = (min(low, float(result.min())), max(high, float(result.max())))
    path.unlink()
    return found


def _grid(graph: ir.Graph, value: ir.Value, scale: Any, zero: Any) -> ir.Value:
    """A value on a grid."""
    constants = []
    for name, number in (("scale", scale), ("zero_point", zero)):
        name = f"{value.name}.{name}"
        constants.append(ir.val(name, const_value=ir.tensor(np.asarray(number), name=name)))
        graph.register_initializer(constants[-1])
    quantizer = ir.node("QuantizeLinear", [value, *constants], name=f"{value.name}.quantizer")
    reader = ir.node("DequantizeLinear", [quantizer.outputs[0], *constants], name=f"{value.name}.dequantizer")
    for node, word in ((quantizer, "codes"), (reader, "rounded")):
        node.outputs[0].name = f"{value.name}.{word}"
    graph.insert_after(value.producer(), [quantizer, reader])
    return reader.outputs[0]


def _reroute(value: ir.Value, rounded: ir.Value, *kinds: str) -> None:
    """Has operators of some kinds read the rounded value."""
    for user, index in list(value.uses()):
        if user.op_type in kinds:
            user.replace_input_with(index, rounded)
