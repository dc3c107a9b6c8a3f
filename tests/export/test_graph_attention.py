# SPDX-License-Identifier: Apache-2.0
"""Which attention becomes one quantized operator, and that it computes the same."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from hfkdq.export.graph import fuse_attention

from .test_graph import kinds, run

TEXT = """
<ir_version: 10, opset_import: ["" : 18, "com.microsoft" : 1]>
attention (float[batch, length, 4] x, int64[batch, length] attention_mask, int64[batch, length] kinds) => (%(outputs)s)
<float s = {0.05}, uint8 z = {120}, int64[4] split = {0, 0, 2, 3}, int64[%(merge)s, float root = {0.5773503},
 float half = {0.5}, float two = {2}, float one = {1}, float zero = {0}, float low = {%(low)s}, int64[2] middle = {1, 2},
 float d = {1.7320508}>
{
    c = QuantizeLinear(x, s, z)
    other = QuantizeLinear(x, half, z)
    q0 = com.microsoft.MatMulIntegerToFloat(c, wq, s, sq, z, zq, bq)
    k0 = com.microsoft.MatMulIntegerToFloat(%(keys)s, wk, s, sk, z, zk%(bk)s)
    v0 = com.microsoft.MatMulIntegerToFloat(c, wv, s, sv, z, zv, bv)
    q1 = Reshape(q0, split)
    k1 = Reshape(k0, split)
    v1 = Reshape(v0, split)
    q = Transpose<perm = [0, 2, 1, 3]>(q1)
    k = Transpose<perm = [%(turn)s]>(k1)
    v = Transpose<perm = [0, 2, 1, 3]>(v1)
    %(scores)s
    p = Softmax<axis = %(axis)s>(a)
    m = MatMul(p, %(values)s)
    t = Transpose<perm = [0, 2, 1, 3]>(m)
    y = Reshape(t, merge)
}
"""
PLAIN = "b = MatMul(q, k)\n a = Mul(b, root)"
MASKED = "b = MatMul(q, k)\n e = Mul(b, root)\n %s\n a = Add(e, mask)"
# A token of padding adds the lowest number, as BERT has it on the optimum line, and on v5.
SUBTRACTED = "u = Unsqueeze(attention_mask, middle)\n f = Cast<to = 1>(u)\n n = Sub(one, f)\n mask = Mul(n, low)"
CHOSEN = "u = Unsqueeze(attention_mask, middle)\n f = Cast<to = 9>(u)\n mask = Where(f, zero, low)"


def attention(
    scores=PLAIN, keys="c", bk=", bk", outputs="float[batch, length, 6] y", low="-3.4e38", axis=-1, same=True,
    values="v", turn="0, 2, 3, 1", merge="3] merge = {0, 0, 6}",
):  # fmt: skip
    """A graph in which query, key and value have weights of their own."""
    text = TEXT % dict(
        scores=scores, keys=keys, bk=bk, outputs=outputs, low=low, axis=axis, values=values, turn=turn, merge=merge
    )
    random = np.random.default_rng(1)
    arrays = {}
    for part in "qkv":
        codes = random.integers(-127, 128, (4, 6)).astype(np.int8)
        if not same and part == "k":
            codes = (codes.astype(np.int16) + 127).astype(np.uint8)
        arrays[f"w{part}"] = codes
        arrays[f"s{part}"] = np.float32(0.01) if part == "v" else random.uniform(0.005, 0.02, 6).astype(np.float32)
        arrays[f"z{part}"] = np.zeros(() if part == "v" else 6, codes.dtype)
        arrays[f"b{part}"] = random.normal(size=6).astype(np.float32)
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    return ir.from_proto(proto)


def inputs():
    random = np.random.default_rng(0)
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    kinds = random.integers(0, 2, mask.shape)
    return {"x": random.normal(size=(3, 5, 4)).astype(np.float32), "attention_mask": mask, "kinds": kinds}


def check(model, fused, **changed):
    feed = {**inputs(), **changed}
    before = run(model, **feed)
    assert fuse_attention(model) == fused
    assert kinds(model)["QAttention"] == fused
    assert (kinds(model)["Softmax"] == 0) == fused
    np.testing.assert_allclose(run(model, **feed), before, rtol=1e-4, atol=1e-6)
    return model


@pytest.mark.parametrize(
    "scores",
    [
        PLAIN,
        "b = MatMul(q, k)\n a = Div(b, d)",
        "b = Mul(q, root)\n a = MatMul(b, k)",
        "b = Mul(root, q)\n a = MatMul(b, k)",
        "b = Mul(q, half)\n e = Mul(k, two)\n g = MatMul(b, e)\n a = Mul(g, root)",
        # Not the root of the width of a head: 1, as T5 has it, or any other.
        "a = MatMul(q, k)",
        "b = MatMul(q, k)\n a = Mul(b, half)",
    ],
)
def test_attention_without_a_mask(scores):
    model = check(attention(scores), True)
    assert kinds(model) == {"QuantizeLinear": 1, "QAttention": 1}


@pytest.mark.parametrize("low", ["-3.4e38", "-10000"])
@pytest.mark.parametrize("mask", [SUBTRACTED, CHOSEN])
def test_attention_with_a_mask_of_padding(mask, low):
    model = check(attention(MASKED % mask, low=low), True)
    assert kinds(model) == {"QuantizeLinear": 1, "QAttention": 1, "Cast": 1}


def test_nothing_but_padding_is_what_it_was():
    check(attention(MASKED % CHOSEN), True, attention_mask=np.zeros((3, 5), np.int64))


@pytest.mark.parametrize("axis", [3, -1])
def test_axis_of_the_softmax(axis):
    check(attention(axis=axis), True)


def test_a_projection_without_bias():
    check(attention(bk=""), True)


@pytest.mark.parametrize(
    "changed",
    [
        # Cross-attention, weights of another type, a softmax over queries, scores that are asked for.
        dict(keys="other"),
        # Values that are scaled, keys that are not turned, heads that are put together in another way.
        dict(scores=f"w = Mul(v, half)\n {PLAIN}", values="w"),
        dict(turn="0, 2, 1, 3"),
        dict(merge="3] merge = {0, -1, 3}"),
        dict(merge="2] merge = {0, -1}", outputs="float[batch, all] y"),
        dict(same=False),
        dict(axis=2),
        dict(outputs="float[batch, length, 6] y, float[batch, heads, length, length] b"),
        # Masks of another kind: hidden is what attention_mask shows, numbers too small to hide, something beside it.
        dict(scores=MASKED % "u = Unsqueeze(attention_mask, middle)\n f = Cast<to = 1>(u)\n mask = Mul(f, low)"),
        dict(scores=MASKED % CHOSEN, low="-10"),
        dict(scores=MASKED % f"{SUBTRACTED.replace('mask = ', 'h = ')}\n mask = Add(h, half)"),
        # A mask that goes by what the model computes, or comes before the factor.
        dict(scores=MASKED % "r = ReduceMean(x)\n mask = Mul(r, low)"),
        dict(scores=f"b = MatMul(q, k)\n {CHOSEN}\n e = Add(b, mask)\n a = Mul(e, root)"),
        # A mask that goes by another input too.
        dict(
            scores=MASKED
            % f"{CHOSEN.replace('mask = ', 'h = ')}\n i = Unsqueeze(kinds, middle)\n j = Cast<to = 1>(i)\n mask = Add(h, j)"
        ),
        # A mask for queries instead of keys.
        dict(scores=MASKED % f"{CHOSEN.replace('mask = ', 'h = ')}\n mask = Transpose<perm = [0, 1, 3, 2]>(h)"),
    ],
    ids=str,
)
def test_attention_of_another_kind_stays(changed):
    square = {name: value[:, :3] for name, value in inputs().items()}  # as many tokens as a head is wide
    check(attention(**changed), False, **(square if "turn" in changed else {}))


def test_a_future_that_is_hidden_is_no_padding():
    future = "n = Shape<start = 1, end = 2>(x)\n nn = Concat<axis = 0>(n, n)\n lows = Expand(low, nn)\n mask = Trilu<upper = 0>(lows)"
    check(attention(MASKED % future), False)


def test_layers_with_the_same_weights_share_them_still():
    twice = graph_of_two_layers(attention())
    before = run(twice, **inputs())
    assert fuse_attention(twice) == 2
    codes = [node.inputs[1] for node in twice.graph if node.op_type == "QAttention"]
    assert codes[0] is codes[1]
    np.testing.assert_allclose(run(twice, **inputs()), before, rtol=1e-4, atol=1e-6)


def graph_of_two_layers(model):
    """The same operators twice, with the same weights, summed."""
    proto = ir.to_proto(model)
    first = list(proto.graph.node)
    made = {name for each in first for name in each.output}
    for index, node in enumerate(first):
        copy = proto.graph.node.add()
        copy.CopyFrom(node)
        copy.input[:] = [f"{name}_2" if name in made else name for name in node.input]
        copy.output[:] = [f"{name}_2" for name in node.output]
        copy.name = f"second_{index}"
    proto.graph.node.append(onnx.helper.make_node("Add", ["y", "y_2"], ["sum"]))
    proto.graph.output[0].name = "sum"
    return ir.from_proto(proto)
