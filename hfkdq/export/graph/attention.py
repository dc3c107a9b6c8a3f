# SPDX-License-Identifier: Apache-2.0
"""Makes one operator of self-attention whose projections are integer operators already."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import onnx_ir as ir

from ..runtime import open_quietly
from .convolutions import Array, constant, only_consumer
from .linears import MICROSOFT

logger = logging.getLogger(__name__)
MASK = "attention_mask"
# Where a mask is tried: batch and length. More than what makes a mask of the other is no mask.
SIZES, LARGEST = ((2, 5), (3, 7), (1, 4)), 200
# (batch, length, heads, width) to what a product of heads takes, and back.
HEADS_FIRST, WIDTH_FIRST = (0, 2, 1, 3), (0, 2, 3, 1)


@dataclass
class _Projection:
    """Query, key or value of all heads, and how they get from the linear layer to a product."""

    linear: ir.Node
    heads: int
    order: tuple[int, ...] = (0, 1, 2, 3)
    factor: float = 1.0
    between: list[ir.Node] = field(default_factory=list)

    @property
    def width(self) -> int:
        return int(self.constants[0].shape[1])

    @property
    def weight_names(self) -> list[str]:
        """Names of codes, scale, zero point and, if there is one, bias of the linear layer."""
        _, codes, _, scale, _, zero, *bias = self.linear.inputs
        return [str(value.name) for value in (codes, scale, zero, *bias) if value is not None]

    @cached_property
    def constants(self) -> list[Array]:
        """The arrays of `weight_names`."""
        return [self.linear.graph.initializers[name].const_value.numpy() for name in self.weight_names]


def fuse_attention(model: ir.Model) -> int:
    """Replaces self-attention over one quantized input by `QAttention`, in place, after [`fuse_linears`]; how many.

    The projections of query, key and value become one product with one weight. What is added to the scores must be
    nothing, or a mask that hides what `attention_mask` says is padding: it is computed for random ones, and compared.
    """
    graph, fused = model.graph, 0
    weights: dict[tuple[Any, ...], list[ir.Value]] = {}
    hidden: dict[str, float | None] = {}
    for node in list(graph):
        if node.op_type != "Softmax" or node.attributes.get_int("axis", -1) not in (-1, 3):
            continue
        found = _attention(node)
        if found is None:
            continue
        parts, mask, last, between = found
        fill = None
        if mask is not None:
            name = str(mask.name)
            if name not in hidden:
                hidden[name] = _fill_of_padding(model, mask)
            fill = hidden[name]
            if fill is None:
                continue
        key = (parts[0].factor, *(name for part in parts for name in part.weight_names))
        if key not in weights:
            weights[key] = _merged_weights(model, parts)
        codes, bias, scale, zero = weights[key]
        linear, padding = parts[0].linear, None if mask is None else _mask_in_int32(model)
        new = ir.node(
            "QAttention",
            [linear.inputs[0], codes, bias, linear.inputs[2], scale, padding, linear.inputs[4], zero],
            attributes={"num_heads": parts[0].heads} | ({} if fill is None else {"mask_filter_value": fill}),
            domain=MICROSOFT,
            name=node.name,
        )
        gone = [last, *between, *(n for part in parts for n in (*part.between, part.linear))]
        ir.convenience.replace_nodes_and_values(graph, last, gone, [new], last.outputs, new.outputs)
        fused += 1
    if fused:
        ir.passes.common.RemoveUnusedNodesPass()(model)
    return fused


def _attention(softmax: ir.Node) -> tuple[list[_Projection], ir.Value | None, ir.Node, list[ir.Node]] | None:
    """Projections of query, key and value, what is added to the scores, the node that gives the result, all between."""
    # Backwards to the scores, over a mask and factors, which may stand on either side of the product.
    between, mask, factor = [softmax], None, 1.0
    product = _own(softmax.inputs[0])
    while product is not None and product.op_type in ("Add", "Mul", "Div"):
        number, rest = _number(product)
        if product.op_type == "Add" and mask is None and factor == 1.0:
            # The scores are what comes out of a product; the mask never is.
            scores = next((value for value in product.inputs if _leads_to_product(value)), None)
            mask = next((value for value in product.inputs if value is not scores), None)
        elif product.op_type != "Add" and number is not None:
            factor *= number if product.op_type == "Mul" else 1 / number
            scores = rest
        else:
            return None
        between.append(product)
        product = _own(scores)
    # Forwards to the heads side by side again.
    mixed = only_consumer(softmax.outputs[0])
    if product is None or product.op_type != "MatMul" or mixed is None or mixed.op_type != "MatMul":
        return None
    between += [product, mixed]
    if mixed.inputs[0] is not softmax.outputs[0]:
        return None
    turned = only_consumer(mixed.outputs[0])
    last = only_consumer(turned.outputs[0]) if turned is not None and turned.op_type == "Transpose" else None
    if turned is None or last is None or tuple(turned.attributes["perm"].as_ints()) != HEADS_FIRST:
        return None
    between.append(turned)
    query, key, value = (_projection(each) for each in (*product.inputs, mixed.inputs[1]))
    if query is None or key is None or value is None or (query.order, value.order) != (HEADS_FIRST, HEADS_FIRST):
        return None
    parts, target = [query, key, value], constant(last.inputs[1]) if last.op_type == "Reshape" else None
    alike = {(part.heads, part.width, *(part.linear.inputs[place] for place in (0, 2, 4))) for part in parts}
    dtypes = {part.linear.inputs[1].dtype for part in parts}
    if len(alike) > 1 or len(dtypes) > 1 or key.order != WIDTH_FIRST or value.factor != 1.0 or target is None:
        return None
    if target.tolist() not in ([0, 0, query.width], [0, 0, -1]):
        return None
    query.factor *= key.factor * factor
    return parts, mask, last, between


def _projection(value: ir.Value | None) -> _Projection | None:
    """Walks back to an integer linear layer, over one split into heads, turns of the axes, and factors."""
    between: list[ir.Node] = []
    orders, factor, heads = [], 1.0, None
    node = _own(value)
    while node is not None and node.op_type != "MatMulIntegerToFloat":
        number, rest = _number(node)
        if node.op_type == "Transpose" and heads is None:
            orders.append(tuple(node.attributes["perm"].as_ints()))
            rest = node.inputs[0]
        elif node.op_type == "Reshape" and heads is None and (target := constant(node.inputs[1])) is not None:
            if len(target) != 4 or list(target[:2]) != [0, 0] or target[2] <= 0:
                return None
            heads, rest = int(target[2]), node.inputs[0]
        elif node.op_type in ("Mul", "Div") and number is not None:
            factor *= number if node.op_type == "Mul" else 1 / number
        else:
            return None
        between.append(node)
        node = _own(rest)
    if node is None or heads is None or any(len(order) != 4 for order in orders):
        return None
    if any(value is None or not value.is_initializer() for value in node.inputs[1::2]):
        return None
    projection = _Projection(node, heads, factor=factor, between=between)
    for order in reversed(orders):
        projection.order = tuple(projection.order[axis] for axis in order)
    return projection if projection.width % heads == 0 else None


def _own(value: ir.Value | None) -> ir.Node | None:
    """The producer of a value that nothing else uses."""
    single = value is not None and len(value.uses()) == 1 and not value.is_graph_output()
    return value.producer() if value is not None and single else None


def _number(node: ir.Node) -> tuple[float | None, ir.Value | None]:
    """The constant number among two inputs, and the other; a division has it second."""
    if len(node.inputs) != 2:
        return None, None
    for index in (1, 0) if node.op_type == "Mul" else (1,):
        number = constant(node.inputs[index])
        if number is not None and number.size == 1:
            return float(number.item()), node.inputs[1 - index]
    return None, None


def _leads_to_product(value: ir.Value | None) -> bool:
    """Whether a value is a product of two computed ones, times factors."""
    node = _own(value)
    while node is not None and node.op_type in ("Mul", "Div"):
        node = _own(_number(node)[1])
    return node is not None and node.op_type == "MatMul"


def _fill_of_padding(model: ir.Model, mask: ir.Value) -> float | None:
    """The number that a mask adds where `attention_mask` is 0, if it adds that there, and 0 elsewhere; or `None`."""
    sources = _sources(mask)
    if sources is None or MASK not in {value.name for value in sources}:
        return None
    part = ir.convenience.extract(model.graph, sources, [mask])
    part.outputs[0].shape = None
    part.outputs[0].dtype = ir.DataType.FLOAT
    proto = ir.to_proto(ir.Model(part, ir_version=model.ir_version))
    random, fills = np.random.default_rng(0), set()
    try:
        session = open_quietly(proto.SerializeToString(), log_severity_level=4)
        types = {entry.name: entry.type for entry in session.get_inputs()}
        for batch, length in SIZES:
            padding = random.integers(0, 2, (batch, length))
            padding[0, :2] = 0, 1
            kinds = random.integers(0, 2, (batch, length))  # which the mask must not go by
            given = {name: padding if name == MASK else kinds for name in types}
            feed = {name: array.astype(_numpy_type(types[name])) for name, array in given.items()}
            result = session.run(None, feed)[0]
            fill = float(result.min())
            fills.add(fill)
            expected = np.where(padding[:, None, None, :] > 0, np.float32(0), np.float32(fill))
            if result.ndim != 4 or not (result == expected).all():
                return None
    except Exception as error:  # ONNX Runtime raises classes of its own, for inputs that are no rows of tokens too
        logger.debug("not a mask of padding: %s", error)
        return None
    (fill, *others) = fills
    # Less would be seen through by large scores.
    return None if others or not -math.inf < fill <= -1e4 else fill


def _numpy_type(kind: str) -> str:
    return {"float": "float32", "double": "float64"}.get(kind[7:-1], kind[7:-1])


def _sources(value: ir.Value) -> list[ir.Value] | None:
    """The inputs of the graph that a value is computed from; `None` where a model stands between."""
    sources: dict[ir.Value, None] = {}
    seen, waiting = {value}, [value]
    while waiting:
        current = waiting.pop()
        if current.is_graph_input():
            sources[current] = None
        for each in _needed(current):
            if each not in seen:
                seen.add(each)
                waiting.append(each)
        if len(seen) > LARGEST:
            return None
    return list(sources)


def _needed(value: ir.Value) -> Iterator[ir.Value]:
    node = value.producer()
    return (each for each in (node.inputs if node is not None else ()) if each is not None)


def _mask_in_int32(model: ir.Model) -> ir.Value:
    """The padding as `QAttention` takes it, made once."""
    graph, name = model.graph, f"{MASK}_int32"
    for node in graph:
        if node.outputs[0].name == name:
            return node.outputs[0]
    padding = next(value for value in graph.inputs if value.name == MASK)
    cast = ir.node("Cast", [padding], attributes={"to": ir.DataType.INT32.value}, name=f"{MASK}_Cast")
    cast.outputs[0].name = name
    graph.insert_before(graph[0], cast)
    return cast.outputs[0]


def _merged_weights(model: ir.Model, parts: list[_Projection]) -> list[ir.Value]:
    """Codes, bias, scales and zero points of the three projections, side by side.

    The operator divides scores by the root of a head's width; what a model does beyond that goes into the query.
    """
    columns: dict[str, list[Array]] = {"codes": [], "bias": [], "scale": [], "zero_point": []}
    for part in parts:
        extra = part.factor * math.sqrt(part.width / part.heads) if part is parts[0] else 1.0
        factor = np.float32(1 if math.isclose(extra, 1, rel_tol=1e-6) else extra)
        codes, scale, zero, *bias = part.constants
        columns["codes"].append(codes)
        columns["bias"].append(bias[0] * factor if bias else np.zeros(part.width, np.float32))
        columns["scale"].append(np.broadcast_to(scale * factor, (part.width,)))
        columns["zero_point"].append(np.broadcast_to(zero, (part.width,)))
    values = []
    for suffix, column in columns.items():
        name = f"{parts[0].weight_names[0]}.attention.{suffix}"
        merged = np.ascontiguousarray(np.concatenate(column, axis=-1))
        values.append(ir.val(name, const_value=ir.tensor(merged, name=name)))
        model.graph.register_initializer(values[-1])
    return values
