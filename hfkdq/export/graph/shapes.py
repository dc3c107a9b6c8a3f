# SPDX-License-Identifier: Apache-2.0
"""Makes constants of the shapes that a traced graph computes at every call."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

logger = logging.getLogger(__name__)
# It warns of every slice whose end it cannot compare.
logging.getLogger("onnxruntime.tools.symbolic_shape_infer").setLevel(logging.ERROR)
Shape = Sequence[int | str | None]
# Bytes of a constant that is no shape.
LARGE = 1024


def fix_shapes(model: ir.Model, shapes: Mapping[str, Shape] | None = None) -> int:
    """Makes constants of known shapes, and drops slices that keep everything; how many operators were changed.

    A tracer writes `x.view(batch, length, heads, -1)` as operators that read the shape of `x`, take it apart and put it
    together; `Reshape` with `[0, 0, heads, d]` says the same. `shapes` has, for its values, numbers, and for sizes that
    vary strings, the same for the same size; by default what ONNX Runtime can tell.
    """
    shapes, fixed = _symbolic_shapes(model) if shapes is None else shapes, 0
    for node in [node for node in model.graph if node.op_type in ("Reshape", "Slice")]:  # others may have no input
        data, result = (shapes.get(str(value and value.name)) for value in (node.inputs[0], node.outputs[0]))
        if node.op_type == "Reshape":
            fixed += _fix_reshape(model.graph, node, _constant_target(data, result))
        elif data is not None and None not in data and data == result and _is_plain(node):
            node.outputs[0].replace_all_uses_with(node.inputs[0])
            fixed += 1
    ir.passes.common.RemoveUnusedNodesPass()(model)
    return fixed


def _fix_reshape(graph: ir.Graph, node: ir.Node, target: list[int] | None) -> bool:
    if target is None or node.attributes.get_int("allowzero", 0):
        return False
    shape = node.inputs[1]
    present = shape.const_value.numpy().tolist() if shape is not None and shape.const_value is not None else None
    if present == target:
        return False
    name = f"{node.outputs[0].name}_shape"
    while name in graph.initializers:
        name += "_"
    value = ir.val(name, const_value=ir.tensor(np.array(target, np.int64), name=name))
    graph.register_initializer(value)
    node.replace_input_with(1, value)
    return True


def _is_plain(node: ir.Node) -> bool:
    """Whether a slice takes what lies side by side, from the first to the last, for use inside the graph."""
    if node.outputs[0].is_graph_output():
        return False
    steps = node.inputs[4] if len(node.inputs) > 4 else None
    if steps is None:
        return True
    maker = steps.producer()
    steps = maker.inputs[0] if maker is not None and maker.op_type == "Unsqueeze" else steps
    tensor = steps.const_value if steps is not None else None
    return tensor is not None and bool((tensor.numpy() == 1).all())


def noted_shapes(model: ir.Model) -> dict[str, Shape]:
    """Shapes that an exporter has noted, as far as it has; those of a tracer that reasons about sizes are the surest."""
    values = [value for node in model.graph for value in node.outputs] + list(model.graph.inputs)
    known = {str(value.name): value.shape for value in values if value.shape is not None}
    return {name: [dim if isinstance(dim, int) else dim.value for dim in shape] for name, shape in known.items()}


def _constant_target(data: Shape | None, result: Shape | None) -> list[int] | None:
    """The shape to ask of `Reshape`: numbers, 0 for an axis that stays, -1 for at most one that does not."""
    if data is None or result is None:
        return None
    target = []
    for axis, size in enumerate(result):
        stays = axis < len(data) and size is not None and data[axis] == size
        target.append(0 if stays else size if isinstance(size, int) else -1)
    return target if target.count(-1) <= 1 and target.count(0) <= len(data) else None


def _symbolic_shapes(model: ir.Model) -> dict[str, Shape]:
    """Shapes of all values, a symbol standing for the same number everywhere; none if ONNX Runtime cannot tell."""
    proto = ir.to_proto(model)
    for tensor in [tensor for tensor in proto.graph.initializer if len(tensor.raw_data) > LARGE]:
        proto.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        proto.graph.initializer.remove(tensor)
    try:
        proto = SymbolicShapeInference.infer_shapes(proto, int_max=2**31 - 1, auto_merge=True)
    except Exception as error:  # it raises bare ones for operators it does not know
        logger.debug("no symbolic shapes: %s", error)
        return {}
    values = [*proto.graph.value_info, *proto.graph.input, *proto.graph.output]
    dims = {one.name: one.type.tensor_type.shape.dim for one in values if one.type.tensor_type.HasField("shape")}
    return {
        name: [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in own]
        for name, own in dims.items()
    }
