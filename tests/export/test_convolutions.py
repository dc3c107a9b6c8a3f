# SPDX-License-Identifier: Apache-2.0
"""What ONNX Runtime makes of convolutions in quantized files."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import transformers as tf
from datasets import Dataset
from torch import nn

from hfkdq import QuantizationSpec, export_onnx, quantize
from hfkdq.export import selection
from hfkdq.export.precisions import PRECISIONS
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


def _mobilenet():
    torch.manual_seed(0)
    config = tf.MobileNetV2Config(num_labels=3, image_size=32, depth_multiplier=0.25, classifier_dropout_prob=0.0)
    return tf.MobileNetV2ForImageClassification(config).eval()


@pytest.mark.parametrize("make", [FAMILIES["resnet"].make, _mobilenet], ids=["resnet", "mobilenet"])
def test_a_whole_network_runs_in_integer_kernels(make, tmp_path):
    images = [{"pixel_values": torch.randn(4, 3, 32, 32)} for _ in range(3)]
    model = quantize(make(), QuantizationSpec(), images).eval()
    arguments = dict(calibration=images, latency_rounds=0, integer_convolutions=True)
    facts = json.loads((export_onnx(model, tmp_path / "onnx", **arguments) / "export_facts.json").read_text())
    run = operators(tmp_path / "onnx/model.onnx", tmp_path)
    assert run["QLinearConv"] == facts["integer_convolutions"] > 0
    assert not {"Conv", "FusedConv", "Pad", "BatchNormalization"} & run.keys()
    assert facts["rounded_sums"] > 0


def test_auto_tries_integer_convolutions(tmp_path, monkeypatch):
    images = {"pixel_values": torch.randn(8, 3, 32, 32).numpy(), "labels": [0, 1] * 4}
    monkeypatch.setattr(selection, "PRECISIONS", {"int8": PRECISIONS["int8"]})
    monkeypatch.setattr(selection, "choose", lambda rows, *rest: (rows[0], "It is the first."))
    folder = export_onnx(
        FAMILIES["resnet"].make(), tmp_path / "onnx", quantization="auto", calibration=[{"pixel_values": torch.randn(4, 3, 32, 32)}] * 2,
        eval_dataset=Dataset.from_dict(images), max_drop=1.0, latency_rounds=0,
    )  # fmt: skip
    facts = json.loads((folder / "export_facts.json").read_text())
    assert [row["name"] for row in facts["choice"]["candidates"]] == ["int8_convolutions", "int8"]
    assert all(row["accepted"] for row in facts["choice"]["candidates"])
    assert operators(folder / "model.onnx", tmp_path)["QLinearConv"] == facts["integer_convolutions"] > 0
    assert facts["kind"] == "int8"


class Residual(TwoConvolutions):
    """A pooled convolution, and a block whose input goes past it."""

    def __init__(self):
        super().__init__()
        self.third = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, pixel_values):
        before = nn.functional.max_pool2d(self.between(pixel_values), 2)
        return {"logits": (self.third(before) + before).relu().mean((2, 3))}


def _at(path, names, inputs):
    """What a file computes under some names, without any change by ONNX Runtime."""
    proto = onnx.load(path)
    proto.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    arrays = {name: value.numpy() for name, value in inputs.items()}
    return dict(zip(names, session.run(list(names), arrays), strict=True))


def test_a_sum_adds_what_convolutions_read_and_terms_off_by_half_a_step(tmp_path):
    torch.manual_seed(0)
    batches = [{"pixel_values": torch.randn(4, 3, size, size)} for size in (12, 8)]
    model = quantize(Residual().eval(), QuantizationSpec(), batches).eval()
    folder = export_onnx(model, tmp_path / "onnx", calibration=batches, latency_rounds=0, integer_convolutions=True)
    path = folder / "model.onnx"
    assert json.loads((folder / "export_facts.json").read_text())["rounded_sums"] == 1
    proto = onnx.load(path)
    made = {name: node for node in proto.graph.node for name in node.output}
    numbers = {each.name: onnx.numpy_helper.to_array(each) for each in proto.graph.initializer}
    [total] = [node for node in proto.graph.node if node.op_type == "Add"]
    third, before = sorted(total.input, key=lambda name: made[made[made[name].input[0]].input[0]].op_type == "MaxPool")
    assert {made[name].op_type for name in total.input} == {"DequantizeLinear"}
    # The sum adds the numbers that the convolution reads, and the largest of each window was on their grid already.
    assert any(node.op_type == "Conv" and node.input[0] == before for node in proto.graph.node)
    pool = made[made[made[before].input[0]].input[0]]
    assert numbers[made[pool.input[0]].input[1]] == numbers[made[before].input[1]]
    exact = made[made[third].input[0]].input[0]
    found = [_at(path, [third, exact, before, pool.output[0]], batch) for batch in batches]
    assert np.array_equal(found[0][before], found[0][pool.output[0]])
    # Numbers and codes are float32: a quotient of up to 255 is off by 255 * 2^-24 steps, which is far below 1e-4.
    step = float(numbers[made[third].input[1]])
    assert max(np.abs(each[third] - each[exact]).max() for each in found) <= (0.5 + 1e-4) * step
    extremes = [0.0, *(each[exact].min() for each in found), *(each[exact].max() for each in found)]
    # The range was that of biases in floats: an integer one is off by half a step of the products.
    products = model.third.activation_quantizer.qparams()[0] * model.third.weight_scale().max()
    assert 255 * step == pytest.approx(np.ptp(extremes), abs=float(products) + 1e-6 * np.ptp(extremes))
    assert operators(path, tmp_path)["QLinearConv"] == 2


def test_sums_stay_as_they_are_where_the_data_are_made_up(tmp_path):
    entry = FAMILIES["resnet"]
    model = quantize(entry.make(), QuantizationSpec(), [entry.batch(4, seed) for seed in range(3)]).eval()
    folder = export_onnx(model, tmp_path / "onnx", latency_rounds=0, integer_convolutions=True)
    facts = json.loads((folder / "export_facts.json").read_text())
    assert facts["integer_convolutions"] > facts["rounded_sums"] == 0


class Padded(TwoConvolutions):
    """A convolution after a frame of `mode` and `value`; where it is `shared`, something else reads the frame too."""

    mode, value, shared = "constant", 0.0, False

    def forward(self, pixel_values):
        value = self.value if self.mode == "constant" else None
        framed = nn.functional.pad(pixel_values, (0, 1, 2, 3), self.mode, value)
        logits = self.first(framed).mean((2, 3))
        return {"logits": logits + framed.mean() if self.shared else logits}


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize(
    ("kwargs", "left"),
    [({}, 0), (dict(mode="reflect"), 1), (dict(value=1.0), 1), (dict(shared=True), 1)],
    ids=["zeros", "reflected", "ones", "read twice"],
)
def test_a_frame_of_zeros_goes_into_the_convolution_after_it(precision, kwargs, left, tmp_path):
    torch.manual_seed(0)
    batches = [{"pixel_values": torch.randn(4, 3, 12, 12)}]
    model = type("Framed", (Padded,), kwargs)().eval()
    folder = export_onnx(model, tmp_path / "onnx", quantization=precision, calibration=batches, latency_rounds=0)
    assert operators(folder / "model.onnx")["Pad"] == left
