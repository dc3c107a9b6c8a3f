# SPDX-License-Identifier: Apache-2.0
"""Convolutions in the form that ONNX Runtime computes as the model does, in few operators."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

Array = np.ndarray[Any, Any]


def constant(value: ir.Value | None) -> Array | None:
    """The numbers of a constant, `None` of what is none."""
    return None if value is None or value.const_value is None else value.const_value.numpy()


def only_consumer(value: ir.Value) -> ir.Node | None:
    """The node that reads a value, where that is its only use."""
    return next(iter(value.consumers())) if len(value.uses()) == 1 and not value.is_graph_output() else None


def fold_pads(model: ir.Model) -> None:
    """Gives zeros around a picture to the convolution after them, which has an attribute for such, in place.

    A zero lies on the grid of every quantizer, so one between the two changes nothing. Unfolded, they keep ONNX Runtime from
    fusing the quantizer into the convolution before them.
    """
    known: dict[ir.Value, Array | None] = {}
    for node in [node for node in model.graph if node.op_type == "Pad"]:
        amounts = _evaluated(node.inputs[1], known)
        filled = _evaluated(node.inputs[2], known) if len(node.inputs) > 2 and node.inputs[2] is not None else 0
        mode = node.attributes["mode"].as_string() if "mode" in node.attributes else "constant"
        if amounts is None or filled is None or mode != "constant" or np.any(filled) or len(node.inputs) > 3:
            continue
        readers, between = _convolutions_after(node.outputs[0])
        ends = np.asarray(amounts).reshape(2, -1)
        if not readers or ends[:, :2].any() or (ends < 0).any():
            continue
        for conv in readers:
            own = conv.attributes["pads"].as_ints() if "pads" in conv.attributes else [0] * ends[:, 2:].size
            pads = [a + int(b) for a, b in zip(own, ends[:, 2:].flat, strict=True)]
            conv.attributes["pads"] = ir.AttrInt64s("pads", pads)
        for value in between:
            value.shape = None
        node.outputs[0].replace_all_uses_with(node.inputs[0])
        model.graph.remove(node, safe=True)
    ir.passes.common.RemoveUnusedNodesPass()(model)


def _convolutions_after(value: ir.Value) -> tuple[list[ir.Node], list[ir.Value]]:
    """The convolutions that alone read a value, through a quantizer or not, and the values on the way; none where others do."""
    between: list[ir.Value] = []
    for kind in ("QuantizeLinear", "DequantizeLinear"):
        readers = list(value.consumers())
        if len(readers) == 1 and readers[0].op_type == kind and not value.is_graph_output():
            value = readers[0].outputs[0]
            between.append(value)
    uses = list(value.uses())
    fits = not value.is_graph_output() and all(
        node.op_type == "Conv" and index == 0 and node.attributes.get_string("auto_pad", "NOTSET") == "NOTSET"
        for node, index in uses
    )
    return ([node for node, _ in uses], between) if fits else ([], [])


def _evaluated(value: ir.Value | None, known: dict[ir.Value, Array | None]) -> Array | None:
    """A value that constants alone give."""
    if value is None or value.const_value is not None:
        return constant(value)
    if value not in known:
        node, known[value] = value.producer(), None
        given = {} if node is None else {each: _evaluated(each, known) for each in node.inputs if each is not None}
        if node is not None and given and all(array is not None for array in given.values()):
            feed = {each.name: array for each, array in given.items()}
            results = ReferenceEvaluator(ir.serde.serialize_node(node)).run(None, feed)
            known.update(zip(node.outputs, results, strict=True))
    return known[value]


def guard_convolutions(model: ir.Model) -> None:
    """Puts a bound that changes nothing before each convolution of dequantized values by a float weight, in place.

    Between a DequantizeLinear and a QuantizeLinear ONNX Runtime would quantize such a weight when it loads the file, with
    one scale for all channels, and the bias with it.
    """
    graph = model.graph
    made: dict[ir.Value, ir.Value] = {}
    for node in [node for node in graph if node.op_type == "Conv"]:
        values = node.inputs[0]
        if values is None or not _is_dequantized(values) or _is_dequantized(node.inputs[1]):
            continue
        if values not in made:
            lowest = ir.val(f"{values.name}.lowest", const_value=ir.tensor(np.float32(np.finfo(np.float32).min)))
            graph.register_initializer(lowest)
            clip = ir.node("Clip", [values, lowest], name=f"{values.name}.guard")
            clip.outputs[0].name, clip.outputs[0].type = f"{values.name}.guarded", values.type
            clip.outputs[0].shape = values.shape
            graph.insert_after(values.producer(), clip)
            made[values] = clip.outputs[0]
        node.replace_input_with(0, made[values])


def _is_dequantized(value: ir.Value | None) -> bool:
    node = None if value is None else value.producer()
    return node is not None and node.op_type == "DequantizeLinear"
