# SPDX-License-Identifier: Apache-2.0
"""Keeps ONNX Runtime from quantizing float weights of convolutions once more."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


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
