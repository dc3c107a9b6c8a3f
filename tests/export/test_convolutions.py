# SPDX-License-Identifier: Apache-2.0
"""What ONNX Runtime makes of convolutions in quantized files."""

from __future__ import annotations

from collections import Counter

import onnx
import onnxruntime as ort
import pytest

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
    export_onnx(entry.make(), tmp_path / "onnx", quantization="dynamic", calibration=calibration, latency_rounds=0)
    written = operators(tmp_path / "onnx/model.onnx")
    assert written["ConvInteger"] == 0
    assert written["Conv"] > 0
    assert written["MatMulInteger"] + written["DynamicQuantizeMatMul"] > 0
