# SPDX-License-Identifier: Apache-2.0
"""Puts the decoder of an encoder-decoder that begins a text and the one that goes on with it into one file, whose weights
are there once."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ..runner import DECODER, DECODER_WITH_PAST, MERGED
from .saving import load_graph, save_graph

# The names of Optimum and of transformers.js.
_FLAG = "use_cache_branch"
Shapes = dict[str | None, tuple[ir.Shape | None, ir.TypeProtocol | None]]


def merge_decoders(folder: Path) -> bool:
    """Replaces the two decoders in a folder by one with both, as Optimum names it; whether there were two.

    Its input `use_cache_branch` says which one runs. Of what the second does not give again, keys and values of the
    encoder, it gives tensors without elements.
    """
    paths = [folder / f"{name}.onnx" for name in (DECODER, DECODER_WITH_PAST)]
    if not all(path.is_file() for path in paths):
        return False
    models = [load_graph(path) for path in paths]
    flag = ir.Value(name=_FLAG, shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.BOOL))
    inputs: dict[str, ir.Value] = {}
    weights: dict[bytes, ir.Value] = {}
    for model in models:
        _take_out(model.graph, inputs, weights)
    start, later = (model.graph for model in models)
    shapes = {value.name: (value.shape, value.type) for graph in (start, later) for value in graph.outputs}
    names = [str(value.name) for value in start.outputs]
    branches = [_branch(graph, names, shapes, end) for graph, end in ((start, "first"), (later, "next"))]
    ways = {"then_branch": branches[1], "else_branch": branches[0]}
    choice = ir.node("If", [flag], ways, num_outputs=len(names), name="use_cache")
    for value, name in zip(choice.outputs, names, strict=True):
        value.name = name
        value.shape, value.type = shapes[name]
    whole = ir.Graph(
        [*inputs.values(), flag], list(choice.outputs), nodes=[choice], initializers=list(weights.values()),
        opset_imports={**start.opset_imports, **later.opset_imports}, name="decoder",
    )  # fmt: skip
    save_graph(ir.Model(whole, ir_version=models[0].ir_version), folder / f"{MERGED}.onnx")
    for path in paths:
        for name in (path.name, f"{path.name}_data", f"{path.name}.data"):
            path.with_name(name).unlink(missing_ok=True)
    return True


def _take_out(graph: ir.Graph, inputs: dict[str, ir.Value], weights: dict[bytes, ir.Value]) -> None:
    """Has a graph use the inputs and the weights of the graph around it, to which those that are new are added."""
    for value in list(graph.inputs):
        outer = inputs.setdefault(str(value.name), ir.Value(name=value.name, shape=value.shape, type=value.type))
        ir.convenience.replace_all_uses_with(value, outer)
    graph.inputs.clear()
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor is None:
            continue
        content = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode() + tensor.tobytes()).digest()
        if content not in weights:
            weights[content] = ir.Value(
                name=f"shared.{len(weights)}", shape=ir.Shape(list(tensor.shape)), type=ir.TensorType(tensor.dtype),
                const_value=tensor,
            )  # fmt: skip
        ir.convenience.replace_all_uses_with(value, weights[content])
        del graph.initializers[str(value.name)]


def _branch(graph: ir.Graph, names: list[str], shapes: Shapes, end: str) -> ir.Graph:
    """The operators of a graph, with the named outputs."""
    given = {str(value.name): value for value in graph.outputs}
    graph.outputs.clear()
    nodes = list(graph)
    graph.remove(nodes)
    outputs = []
    for name in names:
        value = given.get(name)
        if value is None:
            shape, kind = shapes[name]
            dims = [0, *(dim if isinstance(dim, int) else 1 for dim in (shape or [1])[1:])]
            dtype = kind.dtype if kind is not None else ir.DataType.FLOAT
            nothing = ir.tensor(np.zeros(dims, dtype.numpy()))
            nodes.append(ir.node("Constant", [], {"value": nothing}, name=f"no {name}"))
            value = nodes[-1].outputs[0]
            value.type, value.shape = kind, ir.Shape(dims)
        value.name = f"{name}.{end}"
        outputs.append(value)
    return ir.Graph([], outputs, nodes=nodes, opset_imports=graph.opset_imports, name=end)
