# SPDX-License-Identifier: Apache-2.0
"""Writes graphs to files."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

# An ONNX file is one protobuf message, which cannot hold 2 GiB; the graph needs some of it.
MAX_BYTES = 2**31 - 2**26


def load_graph(path: Path) -> ir.Model:
    """Reads a file, with the weights that lie beside it."""
    model = ir.load(path)
    # What is written to the same place would be gone from there.
    ir.external_data.load_to_model(model)
    for node in model.graph.all_nodes():
        for name, attribute in node.attributes.items():
            if isinstance(attribute.value, ir.ExternalTensor):
                node.attributes[name] = ir.AttrTensor(name, ir.tensor(attribute.value.numpy().copy()))
    return model


def save_graph(model: ir.Model, path: Path, suffix: str = "_data") -> None:
    """Writes a file; weights that do not fit into one go beside it, under the name of those there before, if any."""
    tensors = [value.const_value for value in model.graph.initializers.values()]
    size = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    names = [f"{path.name}.data", f"{path.name}_data"]
    beside = next((name for name in names if path.with_name(name).exists()), f"{path.name}{suffix}")
    ir.save(model, path, external_data=beside if size > MAX_BYTES else None)
    for name in names:
        if size <= MAX_BYTES or name != beside:
            path.with_name(name).unlink(missing_ok=True)  # weights of the file before, to which nothing refers now
