# SPDX-License-Identifier: Apache-2.0
"""Makes constants of the shapes that a traced graph computes at every call.

Knows graphs and operators; no model, no torch.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

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


def fix_reshapes(model: ir.Model) -> int:
    """Gives `Reshape` a constant shape where it keeps the axes that are not known, and at most one changes.

    A tracer writes `x.view(batch, length, heads, -1)` as operators that read the shape of `x`, take it apart and put it
    together; `[0, 0, heads, d]` says the same.

    Args:
        model (`onnx_ir.Model`): changed in place.

    Returns:
        `int`: how many were found.
    """
    shapes, fixed = _symbolic_shapes(model), 0
    for node in list(model.graph):
        if node.op_type != "Reshape" or node.inputs[1] is None or node.inputs[1].is_initializer():
            continue
        data, result = (shapes.get(value.name or "") for value in (node.inputs[0], node.outputs[0]) if value)
        target = _constant_target(data, result)
        if target is None or node.attributes.get_int("allowzero", 0):
            continue
        name = f"{node.outputs[0].name}_shape"
        value = ir.val(name, const_value=ir.tensor(np.array(target, np.int64), name=name))
        model.graph.register_initializer(value)
        node.replace_input_with(1, value)
        fixed += 1
    ir.passes.common.RemoveUnusedNodesPass()(model)
    return fixed


def _constant_target(data: Shape | None, result: Shape | None) -> list[int] | None:
    """The shape to ask of `Reshape`: numbers, 0 for an axis that stays, -1 for at most one that does not."""
    if data is None or result is None:
        return None
    target = []
    for axis, size in enumerate(result):
        stays = axis < len(data) and size is not None and data[axis] == size
        target.append(size if isinstance(size, int) else 0 if stays else -1)
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
    values = [value for value in values if value.type.tensor_type.HasField("shape")]
    return {
        value.name: [
            dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None
            for dim in value.type.tensor_type.shape.dim
        ]
        for value in values
    }
