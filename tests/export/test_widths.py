# SPDX-License-Identifier: Apache-2.0
"""Every width and mapping of a spec, written to a file and run by ONNX Runtime."""

from __future__ import annotations

import collections
import json

import onnx_ir as ir
import pytest
import torch
from torch import nn

from hfkdq import QuantizationSpec, export_onnx
from hfkdq.export.runtime import multiplies_blocks
from tests import tiny

WIDTHS = {
    "4 in groups": dict(weight_bits=4, group_size=32, activation_bits=None),
    "4 affine in groups": dict(weight_bits=4, group_size=32, symmetric=False, activation_bits=None),
    "4, inputs of 8": dict(weight_bits=4, group_size=32),
    "2": dict(weight_bits=2, embedding_bits=2, activation_bits=None),
    "1": dict(weight_bits=1, activation_bits=None),
}
FOLDED = {
    "8": dict(activation_bits=None),
    "8 affine": dict(activation_bits=None, symmetric=False),
    "8 in groups": dict(group_size=32, activation_bits=None),
    "kmeans": dict(weight_bits=4, weight_mapping="kmeans", activation_bits=None),
    "power of two": dict(weight_bits=4, weight_mapping="power_of_two", activation_bits=None),
    "power law": dict(weight_bits=6, weight_mapping="power_law", activation_bits=None),
    "16": dict(weight_bits=16, storage_dtype="float16", activation_bits=None),
}


def export(folder, spec, **kwargs):
    model = tiny.bert(layers=1)
    batches = [tiny.batch(model, seed=seed) for seed in range(3)]
    return export_onnx(
        model, folder, quantization=QuantizationSpec(**spec), calibration=batches, latency_rounds=0, **kwargs
    )


def operators(folder):
    return collections.Counter((node.domain, node.op_type) for node in ir.load(folder / "model.onnx").graph)


LINEARS = sum(isinstance(module, nn.Linear) for module in tiny.bert(layers=1).modules())


@pytest.mark.parametrize("name", WIDTHS)
def test_integer_weights_stay_integers_in_blocks(tmp_path, name):
    folder = export(tmp_path / "onnx", WIDTHS[name])
    facts = json.loads((folder / "export_facts.json").read_text())
    assert facts["quantized_linears"] == LINEARS
    # The head has 8 bits and no groups: an integer kernel if its input is quantized, else a float one.
    runs = name not in ("1", "2") or multiplies_blocks(2)  # ONNX Runtime 1.23 has no product for them: floats at load
    assert operators(folder)["com.microsoft", "MatMulNBits"] == (LINEARS - 1 if runs else 0)
    head = 1 if name == "4, inputs of 8" else 0
    assert operators(folder)["com.microsoft", "MatMulIntegerToFloat"] == facts["fused_linears"] == head
    bound = 2e-2 if WIDTHS[name].get("activation_bits", 8) else 1e-5
    assert facts["max_abs_diff"] <= bound * facts["max_abs_logit"]


@pytest.mark.parametrize("name", FOLDED)
def test_what_no_operator_is_fast_for_becomes_floating_point_at_load(tmp_path, name):
    folder = export(tmp_path / "onnx", FOLDED[name])
    assert {domain for domain, _ in operators(folder)} == {""}
    facts = json.loads((folder / "export_facts.json").read_text())
    assert facts["max_abs_diff"] <= 1e-5 * facts["max_abs_logit"]
    graph = ir.load(folder / "model.onnx").graph
    floats = [value.const_value.size for value in graph.initializers.values() if value.dtype == ir.DataType.FLOAT]
    assert max(floats) < 32 * 32, "the weights themselves are stored in integers"


@pytest.mark.parametrize("name", WIDTHS)
def test_standard_operators_alone_compute_the_same(tmp_path, name):
    spec = {**WIDTHS, **FOLDED}[name]
    folder = export(tmp_path / "onnx", spec, target="standard")
    assert {domain for domain, _ in operators(folder)} == {""}
    facts = json.loads((folder / "export_facts.json").read_text())
    bound = 2e-2 if spec.get("activation_bits", 8) else 1e-5
    assert facts["max_abs_diff"] <= bound * facts["max_abs_logit"]
    assert facts["target"] == "standard"


@pytest.mark.parametrize(
    "spec",
    [
        dict(symmetric=False),
        dict(activation_bits=16),
        dict(activation_bits=4),
        dict(activation_mapping="power_law"),
        dict(attention=True),
        dict(weight_bits=4, overrides={"query": {"weight_bits": 8}, "classifier": None}),
    ],
    ids=str,
)
def test_quantized_inputs_of_any_kind(tmp_path, spec):
    folder = export(tmp_path / "onnx", spec)
    facts = json.loads((folder / "export_facts.json").read_text())
    assert facts["max_abs_diff"] <= 2e-2 * facts["max_abs_logit"]


@pytest.mark.parametrize("symmetric", [True, False])
def test_inputs_that_no_block_divides(tmp_path, symmetric):
    model = tiny.bert(layers=1, hidden=36)
    spec = QuantizationSpec(weight_bits=4, symmetric=symmetric, activation_bits=None)
    facts = json.loads((export_onnx(model, tmp_path / "onnx", quantization=spec) / "export_facts.json").read_text())
    assert facts["max_abs_diff"] <= 1e-5 * facts["max_abs_logit"]


def test_bytes_follow_the_bits(tmp_path):
    """A table of 2,000 rows outweighs the rest."""

    def size(bits):
        model = tiny.bert(layers=1, vocab_size=4000)
        spec = QuantizationSpec(weight_bits=8, embedding_bits=bits, activation_bits=None)
        folder = export_onnx(model, tmp_path / str(bits), quantization=spec, latency_rounds=0)
        table = next(v for v in ir.load(folder / "model.onnx").graph.initializers.values() if v.shape[0] == 4000)
        return table.const_value.nbytes

    sizes = {bits: size(bits) for bits in (8, 4, 2)}
    assert sizes[8] == 2 * sizes[4] == 4 * sizes[2]


def test_codes_in_the_file_are_those_of_training(tmp_path):
    from hfkdq.quantization import quantize, quantized_modules

    model = tiny.bert(layers=1)
    spec = QuantizationSpec(weight_bits=4, group_size=32, activation_bits=None)
    quantize(model, spec)
    trained = quantized_modules(model)["bert.encoder.layer.0.attention.self.query"].integer_weight()
    folder = export_onnx(model, tmp_path / "onnx", quantization=spec, latency_rounds=0)
    node = next(node for node in ir.load(folder / "model.onnx").graph if node.op_type == "MatMulNBits")
    packed = torch.from_numpy(node.inputs[1].const_value.numpy().copy()).flatten(1)
    stored = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1).to(torch.int8) - 8
    assert torch.equal(stored[:, : trained.shape[1]], trained)
