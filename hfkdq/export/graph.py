# SPDX-License-Identifier: Apache-2.0
"""Tidies an ONNX graph and counts what ONNX Runtime makes of it.

Knows graphs and operators; no model, no torch.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import onnx_ir as ir
import onnxruntime as ort
from onnx_ir.passes import common

# Kernels with integer weights that ONNX Runtime fuses a quantized linear layer into.
FUSED_LINEARS = ("MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul", "QGemm", "MatMulNBits")


def tidy_graph(path: Path) -> None:
    """Removes, in place, what an exporter leaves behind and no runtime needs.

    Equal initializers become one, so that the quantizers of linear layers that share an input (query, key and value)
    become one too; identities, unused nodes, scope names, documentation and recorded shapes go.

    Args:
        path (`Path`): an ONNX file without external data; rewritten.
    """
    model = ir.load(path)
    passes = ir.passes.Sequential(
        common.LiftConstantsToInitializersPass(lift_all_constants=False, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.IdentityEliminationPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.ClearMetadataAndDocStringPass(),
    )
    model = passes(model).model
    ir.save(model, path)


def count_operators(path: Path) -> Counter[str]:
    """How often each operator occurs in an ONNX file."""
    return Counter(node.op_type for node in ir.load(path).graph)


def count_fused_linears(path: Path) -> int:
    """How many linear layers ONNX Runtime runs with integer weights in one fused kernel, on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder, "optimized.onnx")
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(optimized)
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        operators = count_operators(optimized)
    return sum(operators[name] for name in FUSED_LINEARS)
