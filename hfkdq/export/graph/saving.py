# SPDX-License-Identifier: Apache-2.0
"""Writes graphs to files.

Knows files and their limits; not what is in a graph.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

# An ONNX file is one protobuf message, which cannot hold 2 GiB; the graph needs some of it.
MAX_BYTES = 2**31 - 2**26


def save_graph(model: ir.Model, path: Path) -> None:
    """Writes a file; weights that do not fit into one go beside it, as `model.onnx_data`."""
    size = sum(
        value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None
    )
    ir.save(model, path, external_data=f"{path.name}_data" if size > MAX_BYTES else None)
