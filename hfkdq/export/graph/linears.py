# SPDX-License-Identifier: Apache-2.0
"""Makes one integer operator of a quantized linear layer, and counts what ONNX Runtime runs in integers."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx_ir as ir
import onnxruntime as ort

from ..runtime import is_of_onnxruntime, open_quietly
from ..session import in_plain_words

MICROSOFT = "com.microsoft"
# Integer kernels that ONNX Runtime runs linear layers and their quantizers in, and how many.
_ONE = ("MatMulIntegerToFloat", "QLinearMatMul", "QGemm", "DynamicQuantizeMatMul")
FUSED_LINEARS = {**dict.fromkeys(_ONE, 1), "QAttention": 3}


def fuse_linears(model: ir.Model) -> int:
    """Makes `MatMulIntegerToFloat` of `MatMul(DequantizeLinear, DequantizeLinear) + bias`, in place; of how many.

    ONNX Runtime does the same when it loads the file, but leaves the bias outside.
    """
    graph, fused = model.graph, 0
    for node in list(graph):
        if node.op_type != "MatMul":
            continue
        values, weights = (_quantized(value) for value in node.inputs)
        if values is None or weights is None or not _is_constant(weights[0]):
            continue
        bias = _bias(node)
        (codes, scale, zero), (weight, weight_scale, weight_zero) = values, weights
        last = node if bias is None else next(iter(node.outputs[0].consumers()))
        new = ir.node(
            "MatMulIntegerToFloat",
            [codes, weight, scale, weight_scale, zero, weight_zero, *([bias] if bias is not None else [])],
            domain=MICROSOFT,
            name=node.name,
        )
        ir.convenience.replace_nodes_and_values(graph, last, list({last, node}), [new], last.outputs, new.outputs)
        fused += 1
    if fused:
        graph.opset_imports.setdefault(MICROSOFT, 1)
        ir.passes.common.RemoveUnusedNodesPass()(model)
    return fused


def _quantized(value: ir.Value | None) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """Codes, scale and zero point of what a DequantizeLinear gives."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "DequantizeLinear" or len(node.inputs) != 3:
        return None
    codes, scale, zero = node.inputs
    return None if codes is None or scale is None or zero is None else (codes, scale, zero)


def _is_constant(value: ir.Value) -> bool:
    """Whether a value is stored, or a stored table that is turned, which ONNX Runtime does when it loads the file."""
    node = value.producer()
    source = node.inputs[0] if node is not None and node.op_type == "Transpose" else value
    return source is not None and source.is_initializer()


def _bias(node: ir.Node) -> ir.Value | None:
    """The vector of constants that is added to the result of a MatMul, if nothing else uses that result."""
    result = node.outputs[0]
    consumers = list(result.consumers())
    if len(consumers) != 1 or consumers[0].op_type != "Add" or result.is_graph_output():
        return None
    bias = next(value for value in consumers[0].inputs if value is not result)
    if bias is None or not bias.is_initializer() or bias.shape is None or len(bias.shape) != 1:
        return None
    return bias


def count_fused_linears(path: Path) -> int:
    """How many linear layers with quantized inputs ONNX Runtime runs in one integer kernel, on this machine.

    One that is called twice counts once.
    """
    with tempfile.TemporaryDirectory() as folder:
        optimized, level = Path(folder, "optimized.onnx"), ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        with in_plain_words("ONNX Runtime", path, "Nothing was written. Take another quantization", is_of_onnxruntime):
            open_quietly(str(path), graph_optimization_level=level, optimized_model_filepath=str(optimized))
        nodes = [node for node in ir.load(optimized).graph.all_nodes() if node.op_type in FUSED_LINEARS]
        layers = {node.inputs[1].name if node.inputs[1] is not None else node: node.op_type for node in nodes}
        return sum(FUSED_LINEARS[kind] for kind in layers.values())
