# SPDX-License-Identifier: Apache-2.0
"""Brings convolutions of integers into the form that ONNX Runtime has an integer kernel for."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .convolutions import Array, constant, only_consumer


def fuse_convolutions(model: ir.Model) -> int:
    """Moves each BatchNorm into the scales and the bias of the convolution of integers before it, in place.

    A convolution whose output goes to a quantizer gets its bias in integers too, of the step of its products, so it is off by
    half of that at most: ONNX Runtime runs it as `QLinearConv`. For others, which it computes in floating point, weights
    become such when the file is loaded. Returns how many got an integer bias.
    """
    graph, fused = model.graph, 0
    for node in [node for node in graph if node.op_type == "Conv"]:
        weight = node.inputs[1].producer() if node.inputs[1] is not None else None
        stored = [constant(value) for value in weight.inputs] if weight is not None else []
        if weight is None or weight.op_type != "DequantizeLinear" or any(array is None for array in stored):
            continue
        codes, scale, zero = (array for array in stored if array is not None)
        bias = constant(node.inputs[2]) if len(node.inputs) > 2 else np.zeros(len(codes), np.float32)
        norm = only_consumer(node.outputs[0])
        last = node
        if bias is not None and norm is not None and norm.op_type == "BatchNormalization":
            folded = _folded(codes, scale, zero, bias, norm)
            if folded is not None:
                (codes, scale, bias), last = folded, norm
        step = _step_of(node.inputs[0])
        products = None if step is None or bias is None else _quantized(bias, step * scale)
        if products is None or not _brought_to_quantizer(last.outputs[0]):
            new = [_computed(graph, last, node, codes, scale, zero)]
            new += [] if bias is None else [_stored(graph, f"{node.name}.bias", bias.astype(np.float32))]
        else:
            zeros = np.broadcast_to(zero, scale.shape).copy()
            new = [_dequantized(graph, last, f"{node.name}.weight", codes, scale, zeros)]
            fused += 1
            new.append(_dequantized(graph, last, f"{node.name}.bias", *products, np.zeros(len(codes), np.int32)))
        _replace(graph, node, last, [node.inputs[0], *new])
    ir.passes.common.RemoveUnusedNodesPass()(model)
    return fused


def _folded(codes: Array, scale: Array, zero: Array, bias: Array, norm: ir.Node) -> tuple[Array, Array, Array] | None:
    """Codes, scales and bias of a convolution with the norm after it; `None` where the codes cannot change their sign."""
    numbers = [constant(value) for value in norm.inputs[1:]]
    if any(array is None for array in numbers):
        return None
    gamma, beta, mean, variance = (np.asarray(array, np.float64) for array in numbers)
    factor = gamma / np.sqrt(variance + norm.attributes["epsilon"].as_float())
    shape = (-1, *[1] * (codes.ndim - 1))
    middle = np.asarray(zero, np.int64).reshape(shape if zero.ndim else ())
    signed = (np.asarray(codes, np.int64) - middle) * np.sign(factor).astype(np.int64).reshape(shape) + middle
    if not np.iinfo(codes.dtype).min <= signed.min() <= signed.max() <= np.iinfo(codes.dtype).max:
        return None
    # A channel that the norm takes away has zeros for codes, at any scale.
    scales = np.asarray(scale, np.float64) * np.where(factor == 0, 1.0, np.abs(factor))
    return signed.astype(codes.dtype), scales.astype(np.float32), (np.asarray(bias, np.float64) - mean) * factor + beta


def _step_of(value: ir.Value | None) -> Array | None:
    """The scale of the codes that a value was dequantized from."""
    node = value.producer() if value is not None else None
    return constant(node.inputs[1]) if node is not None and node.op_type == "DequantizeLinear" else None


def _quantized(bias: Array, step: Array) -> tuple[Array, Array] | None:
    """Codes and scales of a bias, int32; `None` where it does not fit."""
    scale = np.broadcast_to(np.asarray(step, np.float32), bias.shape).copy()
    codes = np.round(np.asarray(bias, np.float64) / scale)
    return (codes.astype(np.int32), scale) if np.abs(codes).max() < 2**31 else None


def _brought_to_quantizer(value: ir.Value) -> bool:
    """Takes away an activation that the ends of the grid after it imply; whether a value then is quantized and nothing else."""
    node = only_consumer(value)
    if node is not None and node.op_type in ("Relu", "Clip"):
        grid = only_consumer(node.outputs[0])
        if grid is None or grid.op_type != "QuantizeLinear":
            return False
        scale, zero = (float(np.asarray(constant(each))) for each in grid.inputs[1:3])
        given = [constant(each) for each in node.inputs[1:]] if node.op_type == "Clip" else [np.zeros(())]
        bounds = [*given, None, None][:2]
        low, high = (None if bound is None else round(float(bound) / scale) + zero for bound in bounds)
        if (low is not None and low > 0) or (high is not None and high < 255):
            return False
        grid.replace_input_with(0, value)
        value.graph.remove(node, safe=True)
        return True
    return node is not None and node.op_type == "QuantizeLinear"


def _stored(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    value = ir.val(name, const_value=ir.tensor(np.ascontiguousarray(array), name=name))
    graph.register_initializer(value)
    return value


def _dequantized(graph: ir.Graph, before: ir.Node, name: str, codes: Array, scale: Array, zero: Array) -> ir.Value:
    parts = zip(("codes", "scale", "zero_point"), (codes, scale, zero), strict=True)
    node = ir.node("DequantizeLinear", [_stored(graph, f"{name}.{part}", array) for part, array in parts], {"axis": 0})
    return _placed(graph, before, node, name)


def _computed(graph: ir.Graph, before: ir.Node, conv: ir.Node, codes: Array, scale: Array, zero: Array) -> ir.Value:
    """A float weight in operators of constants, which ONNX Runtime computes when it loads the file."""
    shape, name = (-1, *[1] * (codes.ndim - 1)), f"{conv.name}.weight"
    cast = ir.node("Cast", [_stored(graph, f"{name}.codes", codes)], {"to": ir.DataType.FLOAT.value})
    value = _placed(graph, before, cast, f"{name}.float")
    if np.any(zero):
        middle = _stored(graph, f"{name}.zero_point", zero.astype(np.float32).reshape(shape if zero.ndim else ()))
        value = _placed(graph, before, ir.node("Sub", [value, middle]), f"{name}.centred")
    factor = _stored(graph, f"{name}.scale", scale.reshape(shape if scale.ndim else ()))
    return _placed(graph, before, ir.node("Mul", [value, factor]), name)


def _placed(graph: ir.Graph, before: ir.Node, node: ir.Node, name: str) -> ir.Value:
    node.name = node.outputs[0].name = name
    graph.insert_before(before, node)
    return node.outputs[0]


def _replace(graph: ir.Graph, node: ir.Node, last: ir.Node, inputs: list[ir.Value | None]) -> None:
    """A convolution with these inputs in the place of all from `node` to `last`."""
    new = ir.Node("", "Conv", inputs, list(node.attributes.values()), name=node.name)
    ir.convenience.replace_nodes_and_values(graph, last, list({last, node}), [new], last.outputs, new.outputs)
