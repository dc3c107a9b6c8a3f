# SPDX-License-Identifier: Apache-2.0
"""Merges what an ONNX graph holds twice, and counts what ONNX Runtime fuses.

Knows graphs and operators; no model, no torch.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx_ir as ir
import onnxruntime as ort
from onnx_ir.passes import common

# Integer kernels that ONNX Runtime fuses a linear layer and its quantizers into.
FUSED_LINEARS = ("MatMulIntegerToFloat", "QLinearMatMul", "QGemm")


def tidy_graph(path: Path) -> None:
    """Merges, in place, what is there several times.

    Equal constants become one, so that the quantizers of linear layers that share an input (query, key and value)
    become one too.

    Args:
        path (`Path`): an ONNX file without external data; rewritten.
    """
    model = ir.load(path)
    passes = [common.LiftConstantsToInitializersPass(size_limit=0), common.DeduplicateInitializersPass()]
    if not any(node.op_type == "If" for node in model.graph):  # it breaks branches that hand on an outer value
        passes.append(common.IdentityEliminationPass())
    passes.append(common.CommonSubexpressionEliminationPass())
    ir.save(ir.passes.Sequential(*passes)(model).model, path)


def count_fused_linears(path: Path) -> int:
    """How many linear layers with quantized inputs ONNX Runtime runs in one integer kernel, on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder, "optimized.onnx")
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(optimized)
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return sum(node.op_type in FUSED_LINEARS for node in ir.load(optimized).graph)
