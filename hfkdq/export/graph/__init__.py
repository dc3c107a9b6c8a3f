# SPDX-License-Identifier: Apache-2.0
"""What is done to an ONNX file after it was traced, the same for files of every exporter.

Knows graphs and operators; no model, no torch.
"""

from pathlib import Path

import onnx_ir as ir

from .linears import count_fused_linears, fuse_linears
from .narrow import quantize_dynamically, to_float16
from .shapes import fix_reshapes
from .tidy import tidy_graph

__all__ = [
    "count_fused_linears",
    "fix_reshapes",
    "fuse_linears",
    "improve",
    "quantize_dynamically",
    "save_graph",
    "tidy_graph",
    "to_float16",
]


# An ONNX file is one protobuf message, which cannot hold 2 GiB; the graph needs some of it.
MAX_BYTES = 2**31 - 2**26


def improve(path: Path, *, target: str) -> None:
    """Rewrites a file by one that computes the same with fewer operators.

    Args:
        path (`Path`): an ONNX file.
        target (`str`): `"onnxruntime"` or `"standard"`, which keeps to ONNX's own operators.
    """
    model = ir.load(path)
    tidy_graph(model)
    fix_reshapes(model)
    if target == "onnxruntime":
        fuse_linears(model)
    tidy_graph(model)
    save_graph(model, path)


def save_graph(model: ir.Model, path: Path) -> None:
    """Writes a file; weights that do not fit into one go beside it, as `model.onnx_data`."""
    size = sum(
        value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None
    )
    ir.save(model, path, external_data=f"{path.name}_data" if size > MAX_BYTES else None)
