# SPDX-License-Identifier: Apache-2.0
"""Traces one torch model into one ONNX file with `transformers.exporters`, as plain as its operators allow."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import optimizer
from torch import Tensor, nn
from transformers import masking_utils
from transformers.exporters import OnnxConfig, OnnxExporter

from .choices import WITHOUT_FILE
from .exporters_generation import Part
from .graph import fix_shapes, noted_shapes, save_graph
from .silence import silent_and_seeded

# The first opset with everything the exported models need as single operators; the same as on the other line.
OPSET = 18
# Under which a file keeps what the manifest of its folder says about it.
METADATA = "hfkdq.exporters"
_NARROW = {"INT8", "UINT8", "INT4", "UINT4", "FLOAT16", "BFLOAT16"}


def trace_file(part: Part, path: Path, *, axes: Callable[[str], Mapping[int, str]], fold_constants: bool) -> Path:
    """Writes a part, in eval mode on the CPU and with eager attention, as one ONNX file.

    `axes` gives, for the name of an input or output, the names of its axes that vary. `fold_constants`: compute now what
    depends on weights alone. `RuntimeError` if such an axis came out fixed.
    """
    inputs, whole = part.inputs, _takes_whole_masks(part)
    with (
        silent_and_seeded(),
        _plain_masks(whole),
        _lengths(),
        _folding(fold_constants),
        _calling(part.model, part.forward),
    ):
        config = OnnxConfig(dynamic_shapes=_dynamic_shapes(inputs, axes), opset_version=OPSET, optimize=True)
        exported = OnnxExporter().export(part.model, dict(inputs), config)
    program: ir.Model = exported.program
    _order_gelu(program.graph)
    _check_axes(program.graph, axes)
    _name_axes(program.graph, axes)
    # What the tracer has proven of sizes is more than ONNX Runtime can tell of a file, which holds no shapes.
    shapes = noted_shapes(program)
    _strip_notes(program)
    fix_shapes(program, shapes)
    metadata = asdict(exported.components["model"].metadata)
    metadata["export_config"].pop("dynamic_shapes", None)
    program.metadata_props[METADATA] = json.dumps(metadata)
    save_graph(program, path, suffix=".data")
    return path


def _dynamic_shapes(value: Any, axes: Callable[[str], Mapping[int, str]], name: str = "") -> Any:
    """For each tensor in nested inputs, which of its axes the tracer leaves open."""
    if isinstance(value, Tensor):
        return dict.fromkeys(axes(name), torch.export.Dim.AUTO)
    if isinstance(value, Mapping):
        return {key: _dynamic_shapes(entry, axes, f"{name}.{key}" if name else key) for key, entry in value.items()}
    return [_dynamic_shapes(entry, axes, f"{name}.{index}") for index, entry in enumerate(value)]


@contextmanager
def _calling(model: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Has calls of the model call `forward`."""
    model.forward = forward
    try:
        yield
    finally:
        del model.forward


@torch.no_grad()
def _takes_whole_masks(part: Part) -> bool:
    """Whether attentions hold the shape of their mask against those of queries and keys (TrOCR, Informer)."""
    try:
        with silent_and_seeded(), _plain_masks():
            part.forward(**part.inputs)
    except ValueError:
        return True
    return False


@contextmanager
def _plain_masks(whole: bool = False) -> Iterator[None]:
    """Builds attention masks by broadcasting, where Transformers gathers them element by element.

    `whole`: with all rows of the batch and all queries, even where they are equal.
    """
    masks = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    original = masks["eager"]

    def plain_mask(**arguments: Any) -> Tensor | None:
        both_ways = arguments.get("mask_function") is masking_utils.bidirectional_mask_function  # type: ignore[attr-defined]
        if both_ways and arguments.get("attention_mask") is None and arguments.get("allow_is_bidirectional_skip"):
            return None
        visible = _visible(**arguments)
        if visible is None:
            return original(**arguments)
        if whole:
            visible = visible.expand(arguments["batch_size"], -1, arguments["q_length"], arguments["kv_length"])
        dtype = arguments.get("dtype", torch.float32)
        return torch.where(visible, torch.zeros((), dtype=dtype), torch.finfo(dtype).min)

    masks["eager"] = plain_mask
    try:
        yield
    finally:
        del masks["eager"]


@contextmanager
def _lengths() -> Iterator[None]:
    """Lets `len(tensor)` leave open how long a tensor is, where Python would have the tracer fix it (RT-DETR, D-FINE).

    It is the length of what is traced. What depends on it does not work for other sizes, which files are run with.
    """
    original = Tensor.__len__

    def length(tensor: Tensor) -> int:
        size: Any = tensor.shape[0] if tensor.dim() else None
        hint = size.node.hint if isinstance(size, torch.SymInt) else None
        return original(tensor) if hint is None else int(hint)

    Tensor.__len__ = length  # type: ignore[method-assign]
    try:
        yield
    finally:
        Tensor.__len__ = original  # type: ignore[method-assign]


@contextmanager
def _folding(fold_constants: bool) -> Iterator[None]:
    """Keeps the optimizer from widening weights of few bits, unless it may."""
    original = optimizer.optimize_ir

    def optimize(model: ir.Model, *args: Any, should_fold: Any = lambda node: None, **kwargs: Any) -> Any:
        def decide(node: ir.Node) -> bool | None:
            types = [value.dtype for value in node.inputs if value is not None and value.dtype is not None]
            narrow = any(dtype.name in _NARROW for dtype in types)
            return False if narrow and not fold_constants else should_fold(node)

        return original(model, *args, should_fold=decide, **kwargs)

    optimizer.optimize_ir = optimize
    try:
        yield
    finally:
        optimizer.optimize_ir = original


def _visible(
    q_length: int, kv_length: int, q_offset: Any = 0, kv_offset: Any = 0,
    mask_function: Any = masking_utils.causal_mask_function, attention_mask: Tensor | None = None,
    use_vmap: bool = False, **_: Any,
) -> Tensor | None:  # fmt: skip
    """The keys that each query sees, (1 or batch, 1, 1 or query, key), or `None` for masks of a kind not known here."""
    padding: Tensor | None = None if attention_mask is None else attention_mask[:, None, None, :]
    if use_vmap or not (isinstance(kv_offset, int) and kv_offset == 0):
        return None
    if mask_function is masking_utils.bidirectional_mask_function:  # type: ignore[attr-defined]
        return padding
    if mask_function is not masking_utils.causal_mask_function:
        return None
    queries = torch.arange(q_length) + q_offset
    seen: Tensor = (torch.arange(kv_length)[None, :] <= queries[:, None])[None, None]
    return seen if padding is None else seen & padding


def _order_gelu(graph: ir.Graph) -> None:
    """Writes `x * (0.5 * (1 + erf))` as `x * (1 + erf) * 0.5`, which is what ONNX Runtime recognises as a GELU."""
    for node in list(graph):
        inner = next((value.producer() for value in node.inputs if _is_half(value)), None)
        if node.op_type != "Mul" or inner is None:
            continue
        half, doubled = sorted(inner.inputs, key=lambda value: value.producer() is not None)
        own = next(value for value in node.inputs if value.producer() is not inner)
        product = ir.node("Mul", [own, doubled])
        product.outputs[0].shape, product.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
        graph.insert_before(node, product)
        node.replace_input_with(0, product.outputs[0])
        node.replace_input_with(1, half)
        graph.remove(inner, safe=True)


def _is_half(value: ir.Value | None) -> bool:
    """Whether this is `0.5 * (1 + erf(...))`, and serves one node alone."""
    node = None if value is None or len(value.uses()) != 1 else value.producer()
    if node is None or node.op_type != "Mul":
        return False
    half, doubled = sorted(node.inputs, key=lambda entry: entry.producer() is not None)
    one = half.const_value is not None and half.const_value.size == 1 and half.const_value.numpy().item() == 0.5
    add = doubled.producer()
    if not one or not add or add.op_type != "Add":
        return False
    return any(entry.producer() is not None and entry.producer().op_type == "Erf" for entry in add.inputs)


def _check_axes(graph: ir.Graph, axes: Callable[[str], Mapping[int, str]]) -> None:
    """The tracer fixes an axis that the model compares with a number, and says nothing.

    Height and width of images are left open for now: the file is run with another size, and says so where it takes none.
    """
    for value in graph.inputs:
        # An axis that was fixed on the way has its number as a symbol.
        fixed = {axis: name for axis, name in axes(value.name).items() if str(value.shape[axis]).isdigit()}
        if value.name.startswith("pixel_") and 0 not in fixed:
            value.shape = ir.Shape([fixed.get(axis, size) for axis, size in enumerate(value.shape)])
        elif fixed:
            raise RuntimeError(
                f"The tracer fixed the axes {', '.join(fixed.values())} of the input {value.name!r}, as the code of the model takes "
                f"sizes for constants: a file would take no other than {', '.join(str(value.shape[axis]) for axis in fixed)}. "
                f"{WITHOUT_FILE}"
            )


def _name_axes(graph: ir.Graph, axes: Callable[[str], Mapping[int, str]]) -> None:
    """Replaces the tracer's symbols by the names of the axes, and drops those that stand for no input's."""
    names: dict[str, str] = {}
    for value in graph.inputs:
        for axis, name in axes(value.name).items():
            symbol = str(value.shape[axis].value)
            if names.setdefault(symbol, name) != name and len(name) < len(names[symbol]):
                names[symbol] = name
    for value in (*graph.inputs, *graph.outputs):
        own, dims = axes(value.name), enumerate(value.shape)
        named = (own.get(i, names.get(str(dim.value))) if isinstance(dim, ir.SymbolicDim) else dim for i, dim in dims)
        value.shape = ir.Shape(named)


def _strip_notes(program: ir.Model) -> None:
    """Removes what the tracer notes beside the graph: stack traces with the paths of this machine, and shapes."""
    program.metadata_props.clear()
    for graph in program.graphs():
        graph.metadata_props.clear()
        for value in graph.initializers.values():
            # Their tensors tell; said twice, it contradicts a tool that transposes one.
            value.shape = value.type = None
        for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
            value.metadata_props.clear()
        for node in graph:
            node.metadata_props.clear()
            node.doc_string = None
            if node.op_type == "Reshape":
                node.attributes.pop("allowzero", None)  # no axis has the size 0 where it is reshaped
            for value in node.outputs:
                value.metadata_props.clear()
                if not value.is_graph_output():
                    # With shapes in the file ONNX Runtime takes a fused LayerNormalization that is slower on CPUs.
                    value.shape = value.type = None
