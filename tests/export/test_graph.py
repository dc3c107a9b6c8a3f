# SPDX-License-Identifier: Apache-2.0
"""The passes over graphs, on graphs small enough to see."""

from __future__ import annotations

import collections

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from hfkdq.export.graph import fix_shapes, fuse_linears, improve, quantize_dynamically, saving

QUANTIZED = """
<ir_version: 10, opset_import: ["" : 18]>
linear (float[batch, length, 4] x) => (float[batch, length, 3] y)
<float scale = {0.05}, uint8 zero = {120}, int8[4, 3] codes = {1, -2, 3, 40, 50, -60, 7, 8, 9, -100, 110, 120},
 float[3] scales = {0.1, 0.2, 0.3}, int8[3] zeros = {0, 0, 0}, float[3] bias = {1, 2, 3}>
{
    q = QuantizeLinear(x, scale, zero)
    d = DequantizeLinear(q, scale, zero)
    w = DequantizeLinear<axis = 1>(codes, scales, zeros)
    m = MatMul(d, w)
    %s
}
"""
RESHAPED = """
<ir_version: 10, opset_import: ["" : 18]>
split (float[batch, length, 12] x) => (float[a, b, c, d] y)
<int64 zero = {0}, int64 one = {1}, int64[1] axis = {0}, int64[1] heads = {3}, int64[1] width = {4}>
{
    shape = Shape(x)
    first = Gather(shape, zero)
    second = Gather(shape, one)
    first1 = Unsqueeze(first, axis)
    second1 = Unsqueeze(second, axis)
    target = Concat<axis = 0>(%s)
    y = Reshape(x, target)
}
"""
FUSED = {"QuantizeLinear": 1, "MatMulIntegerToFloat": 1}


def graph(text):
    return ir.from_proto(onnx.parser.parse_model(text))


def run(model, **inputs):
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options).run(None, inputs)[0]


def kinds(model):
    return collections.Counter(node.op_type for node in model.graph)


@pytest.mark.parametrize(
    ("end", "besides"),
    [
        ("y = Add(m, bias)", {}),
        ("y = Add(bias, m)", {}),
        ("y = Identity(m)", {"Identity": 1}),
        # What is added is no constant, or the product is needed without it too.
        ("r = ReduceMean(x)\n y = Add(m, r)", {"ReduceMean": 1, "Add": 1}),
        ("s = Add(m, bias)\n y = Mul(s, m)", {"Add": 1, "Mul": 1}),
    ],
)
def test_a_linear_layer_and_its_bias_are_one_operator(end, besides):
    model = graph(QUANTIZED % end)
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    before = run(model, x=x)
    assert fuse_linears(model) == 1
    assert kinds(model) == {**FUSED, **besides}
    np.testing.assert_allclose(run(model, x=x), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("target", "fixed"),
    [
        ("first1, second1, heads, width", [0, 0, 3, 4]),
        ("second1, first1, heads, width", None),
        ("first1, heads, second1, width", [0, 3, -1, 4]),
    ],
)
def test_a_shape_that_keeps_its_axes_becomes_a_constant(target, fixed):
    model = graph(RESHAPED % target)
    x = np.random.default_rng(0).normal(size=(2, 5, 12)).astype(np.float32)
    before = run(model, x=x)
    assert fix_shapes(model) == (fixed is not None)
    np.testing.assert_array_equal(run(model, x=x), before)
    if fixed:
        assert kinds(model) == {"Reshape": 1}
        assert next(iter(model.graph)).inputs[1].const_value.numpy().tolist() == fixed


def test_a_shape_that_names_a_size_it_keeps_keeps_the_axis():
    model = graph(
        """
        <ir_version: 10, opset_import: ["" : 18]>
        split (float[batch, 5, 12] x) => (float[a, b, c, d] y)
        <int64[4] target = {-1, 5, 3, 4}> { y = Reshape(x, target) }
        """
    )
    assert fix_shapes(model) == 1
    assert next(iter(model.graph)).inputs[1].const_value.numpy().tolist() == [0, 0, 3, 4]


def test_an_operator_without_inputs_stays_beside_a_shape_that_is_fixed():
    """BEiT has one."""
    model = graph(
        """
        <ir_version: 10, opset_import: ["" : 18]>
        split (float[batch, 5, 12] x) => (float[a, b, c, d] y)
        <int64[4] target = {-1, 5, 3, 4}> {
            half = Constant <value = float {0.5}> ()
            scaled = Mul(x, half)
            y = Reshape(scaled, target)
        }
        """
    )
    x = np.random.default_rng(0).normal(size=(2, 5, 12)).astype(np.float32)
    before = run(model, x=x)
    assert fix_shapes(model) == 1
    np.testing.assert_array_equal(run(model, x=x), before)


@pytest.mark.parametrize(
    ("start", "end", "step", "is_dropped"),
    [(0, 99, 1, True), (0, 5, 1, True), (-1, -(2**63) + 1, -1, False), (1, 5, 1, False)],
)
def test_a_slice_that_keeps_everything_is_dropped(start, end, step, is_dropped):
    model = graph(
        f"""
        <ir_version: 10, opset_import: ["" : 18]>
        cut (float[batch, 5] x) => (float[a, b] y)
        <int64[1] start = {{{start}}}, int64[1] end = {{{end}}}, int64[1] axis = {{1}}, int64[1] step = {{{step}}}>
        {{
            s = Slice(x, start, end, axis, step)
            y = Relu(s)
        }}
        """
    )
    x = np.random.default_rng(0).normal(size=(2, 5)).astype(np.float32)
    before = run(model, x=x)
    fix_shapes(model)
    assert (kinds(model)["Slice"] == 0) == is_dropped
    np.testing.assert_array_equal(run(model, x=x), before)


def test_a_slice_that_is_an_output_stays():
    text = """
    <ir_version: 10, opset_import: ["" : 18]>
    cut (float[batch, 5] x) => (float[batch, 5] y) <int64[1] start = {0}, int64[1] end = {5}, int64[1] axis = {1}>
    { y = Slice(x, start, end, axis) }
    """
    model = graph(text)
    assert fix_shapes(model) == 0
    assert run(model, x=np.zeros((1, 5), np.float32)).shape == (1, 5)


@pytest.mark.parametrize("before", ["model.onnx.data", "model.onnx_data", None])
def test_weights_that_do_not_fit_into_one_file_lie_beside_it(tmp_path, monkeypatch, before):
    weight = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    path, floats = tmp_path / "model.onnx", onnx.TensorProto.FLOAT
    product = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])], "product",
        [onnx.helper.make_tensor_value_info("x", floats, ["batch", 64])],
        [onnx.helper.make_tensor_value_info("y", floats, ["batch", 4])], [onnx.numpy_helper.from_array(weight, "w")],
    )  # fmt: skip
    opsets = [onnx.helper.make_opsetid("", 18)]
    model = ir.from_proto(onnx.helper.make_model(product, opset_imports=opsets, ir_version=10))
    x = np.ones((2, 64), np.float32)
    ir.save(model, path, external_data=before)
    monkeypatch.setattr(saving, "MAX_BYTES", 10)
    improve(path, target="onnxruntime")
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx", before or "model.onnx_data"}
    assert path.stat().st_size < weight.nbytes
    np.testing.assert_allclose(ort.InferenceSession(path).run(None, {"x": x})[0], x @ weight, rtol=1e-5)


@pytest.mark.parametrize(("outputs", "product"), [(3, "Gemm"), (64, "MatMulInteger")])
def test_a_dynamic_file_is_not_larger_than_its_float_file(tmp_path, outputs, product):
    """A weight of 3 x 64 takes less than the nodes of an integer product. No shape is noted that was not before."""
    random = np.random.default_rng(0)
    shapes = {"weight": (outputs, 64), "bias": (outputs,)}
    weights = [
        onnx.numpy_helper.from_array(random.standard_normal(shape).astype(np.float32), name)
        for name, shape in shapes.items()
    ]
    nodes = [
        onnx.helper.make_node("Relu", ["x"], ["positive"], name="relu"),
        onnx.helper.make_node("Gemm", ["positive", "weight", "bias"], ["y"], name="head", transB=1),
    ]
    ends = [onnx.helper.make_tensor_value_info(name, 1, ["n", size]) for name, size in (("x", 64), ("y", outputs))]
    file = onnx.helper.make_graph(nodes, "linear", ends[:1], ends[1:], weights)
    path = tmp_path / "model.onnx"
    onnx.save(onnx.helper.make_model(file, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10), path)
    before, given = path.stat().st_size, random.standard_normal((5, 64)).astype(np.float32)
    expected = ort.InferenceSession(path).run(None, {"x": given})[0]
    quantize_dynamically(path)
    found = onnx.load(path)
    assert path.stat().st_size <= before
    assert product in [node.op_type for node in found.graph.node]
    assert not found.graph.value_info
    got = ort.InferenceSession(path).run(None, {"x": given})[0]
    # Half a step of each weight times its input, and half a step of each input times its weight.
    largest = np.abs(given).max() * np.abs(onnx.numpy_helper.to_array(weights[0])).max()
    assert np.abs(got - expected).max() <= 64 * largest * (1 / 254 + 1 / 510)
