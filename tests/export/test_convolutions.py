# SPDX-License-Identifier: Apache-2.0
"""What ONNX Runtime makes of convolutions in quantized files."""

from __future__ import annotations

import json
from collections import Counter

import onnx
import onnxruntime as ort
import pytest
import torch
import transformers as tf
from torch import nn

from hfkdq import QuantizationSpec, export_onnx, quantize
from tests.families import FAMILIES


def operators(path, folder=None):
    """The operators of a file; with a folder, of what ONNX Runtime makes of it on this machine."""
    if folder is not None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        # Layouts of this processor aside.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(folder / "run.onnx")
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        path = folder / "run.onnx"
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.mark.parametrize("family", ["resnet", "convnext", "wav2vec2"])
def test_float_weights_made_of_trained_integers_are_not_quantized_again(family, tmp_path):
    entry = FAMILIES[family]
    model = quantize(entry.make(), QuantizationSpec(), [entry.batch(4, seed) for seed in range(3)]).eval()
    export_onnx(model, tmp_path / "onnx", calibration=[entry.batch(4, 9)], latency_rounds=0)
    written, run = operators(tmp_path / "onnx/model.onnx"), operators(tmp_path / "onnx/model.onnx", tmp_path)
    assert written["Conv"] > 0
    assert run["Conv"] + run["FusedConv"] == written["Conv"]
    assert not {"QLinearConv", "ConvInteger"} & run.keys()
    assert run["QuantizeLinear"] <= written["QuantizeLinear"]


@pytest.mark.parametrize("family", ["resnet", "vit", "wav2vec2"])
def test_dynamic_files_leave_convolutions_in_floating_point(family, tmp_path):
    entry = FAMILIES[family]
    calibration = [entry.batch(4)]
    model = entry.make()
    if family == "resnet":  # a head of 3 classes takes less than the nodes of an integer product
        model.classifier[-1] = nn.Linear(model.classifier[-1].in_features, 100)
    export_onnx(model, tmp_path / "onnx", quantization="dynamic", calibration=calibration, latency_rounds=0)
    written = operators(tmp_path / "onnx/model.onnx")
    assert written["ConvInteger"] == 0
    assert written["Conv"] > 0
    assert written["MatMulInteger"] + written["DynamicQuantizeMatMul"] > 0


class TwoConvolutions(tf.PreTrainedModel):
    """Two convolutions with a norm and a ReLU between them, and a norm whose factors have both signs."""

    config_class, main_input_name = tf.PretrainedConfig, "pixel_values"

    def __init__(self):
        super().__init__(tf.PretrainedConfig())
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 5, 3, groups=1)
        with torch.no_grad():
            self.norm.weight.copy_(torch.linspace(-2, 2, 8))
            self.norm.bias.normal_()
            self.norm.running_mean.normal_()
            self.norm.running_var.uniform_(0.5, 2)

    def between(self, pixel_values):
        return self.norm(self.first(pixel_values)).relu()

    def forward(self, pixel_values):
        return {"logits": self.second(self.between(pixel_values)).mean((2, 3))}


def test_an_integer_bias_is_off_by_half_a_step_of_the_products(tmp_path):
    torch.manual_seed(0)
    batches = [{"pixel_values": torch.randn(4, 3, size, size)} for size in (12, 9)]
    model = quantize(TwoConvolutions().eval(), QuantizationSpec(), batches).eval()
    folder = export_onnx(model, tmp_path / "onnx", calibration=batches, latency_rounds=0, integer_convolutions=True)
    assert json.loads((folder / "export_facts.json").read_text())["integer_convolutions"] == 1
    assert operators(folder / "model.onnx")["BatchNormalization"] == 0
    assert operators(folder / "model.onnx", tmp_path)["QLinearConv"] == 1

    proto = onnx.load(folder / "model.onnx")
    second = [node for node in proto.graph.node if node.op_type == "QuantizeLinear"][-1]
    proto.graph.output.append(onnx.helper.make_tensor_value_info(second.output[0], onnx.TensorProto.UINT8, None))
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    codes = torch.from_numpy(session.run(None, {"pixel_values": batches[0]["pixel_values"].numpy()})[-1]).double()

    scale, zero = (value.double() for value in model.second.activation_quantizer.qparams())
    (step, _), weights = model.first.activation_quantizer.qparams(), model.first.weight_scale()
    factor = model.norm.weight / (model.norm.running_var + model.norm.eps).sqrt()
    half = (0.5 * step * weights * factor.abs()).double().reshape(1, -1, 1, 1)
    with torch.no_grad():
        exact = model.between(**batches[0]).double()
    rounding = 1e-5 * exact.abs().max()  # of float32 sums
    low, high = ((exact + sign * (half + rounding)) / scale + zero for sign in (-1, 1))
    assert (codes >= low.round().clamp(0, 255)).all()
    assert (codes <= high.round().clamp(0, 255)).all()


def test_integer_convolutions_need_integers(tmp_path):
    with pytest.raises(ValueError, match=r"integer_convolutions=True needs 8-bit inputs.*float32 has floats"):
        export_onnx(FAMILIES["resnet"].make(), tmp_path / "onnx", integer_convolutions=True)


def test_a_whole_network_runs_in_integer_kernels(tmp_path):
    entry = FAMILIES["resnet"]
    model = quantize(entry.make(), QuantizationSpec(), [entry.batch(4, seed) for seed in range(3)]).eval()
    arguments = dict(calibration=[entry.batch(4, 9)], latency_rounds=0, integer_convolutions=True)
    facts = json.loads((export_onnx(model, tmp_path / "onnx", **arguments) / "export_facts.json").read_text())
    run = operators(tmp_path / "onnx/model.onnx", tmp_path)
    assert run["QLinearConv"] == facts["integer_convolutions"] > 0
