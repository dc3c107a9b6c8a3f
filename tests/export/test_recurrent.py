# SPDX-License-Identifier: Apache-2.0
"""Recurrent layers with integer weights: as modules, and as files of a model of one's own."""

from __future__ import annotations

import json

import onnx
import pytest
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from hfkdq import QuantizationSpec, export_onnx, quantize
from hfkdq.export.lowering import lower_quantizers_
from hfkdq.quantization import prepare_qat_

WEIGHTS = QuantizationSpec(activation_bits=None)


class FramesConfig(PretrainedConfig):
    model_type = "frames"


class Frames(PreTrainedModel):
    """A classifier over log-mel frames, (batch, time, 24), by the mean of the states."""

    config_class, main_input_name = FramesConfig, "input_features"

    def __init__(self, config, kind=nn.GRU, **settings):
        super().__init__(config)
        settings = {"num_layers": 2, "bidirectional": True, "batch_first": True, **settings}
        self.rnn = kind(24, 96, **settings)
        self.classifier = nn.Linear(192 if settings["bidirectional"] else 96, 5)
        self.post_init()

    def forward(self, input_features, labels=None):
        self.rnn.flatten_parameters()
        states, _ = self.rnn(input_features)
        return {"logits": self.classifier(states.mean(1))}


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        ({"num_layers": 2, "bidirectional": True, "batch_first": True}, (3, 7, 8)),
        ({}, (7, 3, 8)),
        ({"bias": False}, (7, 8)),
    ],
)
@pytest.mark.parametrize(
    "spec",
    [{}, {"weight_bits": 4, "group_size": 32}, {"per_channel": False, "symmetric": False}, {"weight_mapping": "kmeans", "weight_bits": 4}],
    ids=["int8", "int4", "affine", "kmeans"],
)  # fmt: skip
def test_a_lowered_layer_computes_the_same(kind, layer, shape, spec):
    torch.manual_seed(0)
    model = Frames(FramesConfig())
    model.rnn = kind(8, 8, **layer).eval()
    spec = QuantizationSpec(activation_bits=None, target_modules=["rnn"], **spec)
    prepare_qat_(model, spec).eval()
    values = torch.randn(shape)
    states = [torch.randn(model.rnn.num_layers * (1 + model.rnn.bidirectional), *([3] if len(shape) > 2 else []), 8)
              for _ in range(1 + (kind is nn.LSTM))]  # fmt: skip
    given = tuple(states) if kind is nn.LSTM else states[0]
    with torch.no_grad():
        expected = [model.rnn(values), model.rnn(values, given)]
        lower_quantizers_(model)
        assert not isinstance(model.rnn, kind)
        for want, got in zip(expected, [model.rnn(values), model.rnn(values, given)], strict=True):
            assert torch.allclose(got[0], want[0], atol=1e-6)
            pairs = zip(got[1], want[1], strict=True)
            assert all(a.shape == b.shape and torch.allclose(a, b, atol=1e-6) for a, b in pairs)


@pytest.mark.parametrize(("kind", "layers"), [(nn.GRU, 2), (nn.LSTM, 1)])
def test_a_recurrent_model_is_a_quarter_of_its_float_file(kind, layers, tmp_path):
    torch.manual_seed(0)
    model = Frames(FramesConfig(), kind, num_layers=layers).eval()
    batches = [{"input_features": torch.randn(4, frames, 24)} for frames in (20, 13)]
    whole = export_onnx(model, tmp_path / "float", calibration=batches, latency_rounds=0) / "model.onnx"
    quantized = quantize(model, QuantizationSpec(), batches).eval()
    folder = export_onnx(quantized, tmp_path / "onnx", calibration=batches, latency_rounds=0)
    facts = json.loads((folder / "export_facts.json").read_text())
    graph = onnx.load(folder / "model.onnx").graph
    codes = sum(p.numel() for name, p in quantized.rnn.named_parameters() if name.startswith("weight"))
    biases = sum(4 * p.numel() for name, p in quantized.rnn.named_parameters() if name.startswith("bias"))
    stored = sum(len(tensor.raw_data) for tensor in graph.initializer if tensor.data_type in (2, 3))
    assert stored >= codes
    # What is not in the codes: biases, scales and the graph itself, which a larger model has no more of.
    assert facts["bytes"] - stored - biases < 0.1 * whole.stat().st_size
    assert sum(node.op_type == kind.__name__ for node in graph.node) == layers
    assert facts["other_sizes"] == {"batch_size": 1}
    assert all(dim.dim_param for dim in graph.input[0].type.tensor_type.shape.dim[:2])


def test_a_projection_of_the_states_is_refused_before_work_starts(tmp_path):
    model = Frames(FramesConfig(), nn.LSTM, proj_size=16, bidirectional=False).eval()
    model.classifier = nn.Linear(16, 5)
    batches = [{"input_features": torch.randn(4, 20, 24)}]
    prepared = quantize(model, QuantizationSpec(activation_bits=None), batches)
    with pytest.raises(ValueError, match=r"rnn projects its states \(proj_size=16\).*exclude_modules=\['rnn'\]"):
        export_onnx(prepared, tmp_path / "onnx", calibration=batches, latency_rounds=0)
    assert not (tmp_path / "onnx").exists()


def test_packed_sequences_are_refused_in_tracing():
    model = Frames(FramesConfig())
    prepare_qat_(model, WEIGHTS)
    lower_quantizers_(model.eval())
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(3, 7, 24), [7, 5, 2], batch_first=True)
    with pytest.raises(ValueError, match="packed sequences cannot be exported"):
        model.rnn(packed)
