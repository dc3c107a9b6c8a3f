# SPDX-License-Identifier: Apache-2.0
"""Weights in uint8 instead of int8, for processors on which ONNX Runtime's product of uint8 and int8 saturates."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx_ir as ir

from ..runtime import open_quietly

# Operators with the places of their integer weight and its zero point.
_PLACES = {"MatMulIntegerToFloat": (1, 5), "QAttention": (1, 7), "MatMulInteger": (1, 3), "ConvInteger": (1, 3)}
_PROBE = f"""
<ir_version: 10, opset_import: ["" : 17]> probe (uint8[rows, 64] a) => (int32[rows, 16] product)
<int8[64, 16] weight = {{{", ".join(["127"] * 64 * 16)}}}> {{ product = MatMulInteger(a, weight) }}
"""


@cache
def multiplies_exactly() -> bool:
    """Whether ONNX Runtime multiplies uint8 by int8 exactly on this processor, which is tried.

    On x86 without VNNI it adds pairs of products in 16 bits, where 255 * 127 * 2 does not fit.
    """
    model = ir.from_onnx_text(_PROBE)
    session = open_quietly(ir.to_proto(model).SerializeToString(), log_severity_level=4)
    products = [session.run(None, {"a": np.full((rows, 64), 255, np.uint8)})[0] for rows in (1, 16)]
    return all((product == 64 * 255 * 127).all() for product in products)


def make_unsigned(model: ir.Model) -> int:
    """Adds 128 to the int8 weights that are multiplied by uint8 codes, and to their zero points, in place.

    Returns how many operators read such a weight now.
    """
    changed = 0
    made: dict[tuple[str, str], tuple[ir.Value, ir.Value]] = {}
    for node in list(model.graph.all_nodes()):
        place, zero_place = _PLACES.get(node.op_type, (0, 2))
        if node.op_type not in _PLACES and not _is_weight_of_product(node):
            continue
        weight = node.inputs[place]
        turned = weight.producer() if weight is not None else None  # the table of a head lies the other way round
        stored = turned.inputs[0] if turned is not None and turned.op_type == "Transpose" else weight
        if weight is None or stored is None or not stored.is_initializer() or stored.dtype != ir.DataType.INT8:
            continue
        zero = node.inputs[zero_place] if len(node.inputs) > zero_place else None
        key = (str(weight.name), "" if zero is None else str(zero.name))
        if key not in made:
            made[key] = _shifted(stored, key[0]), _shifted(zero, f"{key[0]}.zero_point")
            if turned is not None:
                again = ir.node("Transpose", [made[key][0]], attributes={"perm": [1, 0]}, name=f"{key[0]}.turned")
                model.graph.register_initializer(made[key][0])
                model.graph.insert_before(turned, again)
                made[key] = again.outputs[0], made[key][1]
        for index, value in zip((place, zero_place), made[key], strict=True):
            if index >= len(node.inputs):
                node.resize_inputs(index + 1)
            node.replace_input_with(index, value)
        changed += 1
    for value in (value for pair in made.values() for value in pair if value.producer() is None):
        model.graph.register_initializer(value)
    if changed:
        ir.passes.common.RemoveUnusedNodesPass()(model)
    return changed


def _is_weight_of_product(node: ir.Node) -> bool:
    """Whether a node dequantizes a weight for products and convolutions alone, which ONNX Runtime computes in integers."""
    uses = [use for output in node.outputs for use in output.consumers()]
    if node.op_type != "DequantizeLinear" or len(node.inputs) != 3 or not uses:
        return False
    return all(use.op_type in ("MatMul", "Gemm", "Conv") and use.inputs[1] is node.outputs[0] for use in uses)


def _shifted(value: ir.Value | None, name: str) -> ir.Value:
    codes = np.zeros((), np.int8) if value is None or value.const_value is None else value.const_value.numpy()
    shifted = (codes.astype(np.int16) + 128).astype(np.uint8)
    name = f"{name}.unsigned"
    return ir.val(name, const_value=ir.tensor(shifted, name=name))
