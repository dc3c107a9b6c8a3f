# SPDX-License-Identifier: Apache-2.0
"""Weights in uint8 give what weights in int8 do where those are exact, and are exact on every processor."""

from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from hfkdq import export_onnx
from hfkdq.export import graph, job
from hfkdq.export.graph import make_unsigned, multiplies_exactly
from tests import tiny

HEAD = '<ir_version: 10, opset_import: ["" : 17, "com.microsoft" : 1]>'
WEIGHTS = "int8[4, 3] w, float[3] s = {0.1, 0.2, 0.3}, int8[3] z = {0, 1, -2}, uint8 za = {7}, float sa = {0.05}"
CODES = np.random.default_rng(0).integers(-127, 128, (4, 3)).astype(np.int8)
CODES[0, 0], CODES[1, 1] = -128, 127
# Each with a product, its inputs and outputs; weights as constants.
GRAPHS = {
    "MatMulInteger": "g (uint8[n, 4] a) => (int32[n, 3] y) <W> { y = MatMulInteger(a, w, za, z) }",
    "no zero point": "g (uint8[n, 4] a) => (int32[n, 3] y) <W> { y = MatMulInteger(a, w) }",
    "two products": "g (uint8[n, 4] a) => (int32[n, 3] y) <W> { b = MatMulInteger(a, w, za, z)\n"
    "c = MatMulInteger(a, w, za, z)\n y = Add(b, c) }",
    "MatMulIntegerToFloat": "g (uint8[n, 4] a) => (float[n, 3] y) <W> "
    "{ y = com.microsoft.MatMulIntegerToFloat(a, w, sa, s, za, z) }",
    "dequantized": "g (uint8[n, 4] a) => (float[n, 3] y) <W> { x = DequantizeLinear(a, sa, za)\n"
    "v = DequantizeLinear <axis = 1> (w, s, z)\n y = MatMul(x, v) }",
    "also a table": "g (uint8[n, 4] a, int64[k] i) => (float[n, 3] y, int8[k, 3] r) <W> { r = Gather(w, i)\n"
    "x = DequantizeLinear(a, sa, za)\n v = DequantizeLinear <axis = 1> (w, s, z)\n y = MatMul(x, v) }",
}


def run(model: ir.Model, **feed):
    options = ort.SessionOptions()
    # Without this int8 is not exact on every processor, and there is nothing to compare with.
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    return session.run(None, {entry.name: feed[entry.name] for entry in session.get_inputs()})


@pytest.mark.parametrize("name", GRAPHS)
def test_the_product_stays_what_it_was(name):
    text = f"{HEAD} {GRAPHS[name].replace('W', WEIGHTS)}"
    model = ir.from_onnx_text(text, initializers=[ir.tensor(CODES, name="w")])
    feed = {"a": np.random.default_rng(1).integers(0, 256, (5, 4)).astype(np.uint8), "i": np.array([3, 0])}
    before = run(model, **feed)
    assert make_unsigned(model) == (2 if name == "two products" else 1)
    for old, new in zip(before, run(model, **feed), strict=True):
        assert old.dtype == new.dtype
        # Sums of four products of integers are exact, and so is one product of floats with the same factors.
        np.testing.assert_array_equal(old, new)
    kinds = {value.dtype for value in model.graph.initializers.values()}
    assert (ir.DataType.INT8 in kinds) == (name == "also a table")


def test_what_is_multiplied_in_floating_point_stays():
    text = f"{HEAD} g (float[n, 4] a) => (float[n, 3] y) <{WEIGHTS}> {{ v = Cast <to = 1> (w)\n y = MatMul(a, v) }}"
    model = ir.from_onnx_text(text, initializers=[ir.tensor(CODES, name="w")])
    assert make_unsigned(model) == 0


@pytest.mark.parametrize("target", ["onnxruntime", "standard"])
@pytest.mark.parametrize("kind", ["int8", "dynamic"])
def test_a_file_is_exact_on_this_processor_whatever_it_is(kind, target, tmp_path):
    model = tiny.bert(hidden=64)
    batches = [tiny.batch(model, seed=seed) for seed in range(3)]
    facts = {}
    for weight_type in ("auto", "uint8"):
        folder = export_onnx(
            model, tmp_path / weight_type, quantization=kind, calibration=batches, target=target, latency_rounds=0,
            weight_type=weight_type,
        )  # fmt: skip
        facts[weight_type] = json.loads((folder / "export_facts.json").read_text())
    assert facts["uint8"]["weight_type"] == "uint8"
    assert facts["auto"]["weight_type"] == ("int8" if multiplies_exactly() else "uint8")
    # Both are exact, so they differ by the order of float sums alone; a saturated product is off by a fifth here.
    bound = 1e-4 * facts["auto"]["max_abs_logit"]
    assert facts["auto"]["max_abs_diff"] == pytest.approx(facts["uint8"]["max_abs_diff"], abs=bound)


@pytest.mark.parametrize("exact", [True, False])
def test_auto_goes_by_the_processor(exact, tmp_path, monkeypatch):
    monkeypatch.setattr(graph, "multiplies_exactly", lambda: exact)
    monkeypatch.setattr(job, "_check_parity", lambda *args, **kwargs: None)  # int8 may be wrong here
    model = tiny.bert()
    folder = export_onnx(
        model, tmp_path / "onnx", quantization="int8", calibration=[tiny.batch(model)], latency_rounds=0
    )
    kinds = {
        value.dtype for value in ir.load(folder / "model.onnx").graph.initializers.values() if len(value.shape) == 2
    }
    report = json.loads((folder / "export_facts.json").read_text())
    assert report["weight_type"] == ("int8" if exact else "uint8")
    assert (ir.DataType.UINT8 in kinds) != exact


def test_the_probe_finds_what_a_product_of_large_numbers_gives():
    text = f"{HEAD} g (uint8[n, 64] a) => (int32[n, 8] y) <int8[64, 8] w, uint8 za = {{0}}, int8 z = {{0}}> {{ y = MatMulInteger(a, w, za, z) }}"
    random = np.random.default_rng(0)
    weight, values = (
        random.integers(100, 128, (64, 8)).astype(np.int8),
        random.integers(200, 256, (9, 64)).astype(np.uint8),
    )
    model = ir.from_onnx_text(text, initializers=[ir.tensor(weight, name="w")])
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    exact = (session.run(None, {"a": values})[0] == values.astype(np.int64) @ weight).all()
    assert exact == multiplies_exactly()


def test_another_type_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"weight_type='int4' does not exist\. Use one of auto, int8, uint8"):
        export_onnx(tiny.bert(), tmp_path / "onnx", weight_type="int4")
