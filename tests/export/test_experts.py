# SPDX-License-Identifier: Apache-2.0
"""Experts have integer weights in their file, in layers of their own or in weights of three axes."""

from __future__ import annotations

import json

import onnx
import pytest
import torch
import transformers as tf

from hfkdq import QuantizationSpec, export_onnx
from hfkdq.export.job import _fitted


def experts(width=32):
    """A model whose experts lie in weights of three axes on Transformers 5."""
    torch.manual_seed(0)
    config = tf.Qwen3MoeConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=48, moe_intermediate_size=width, num_experts=4, num_experts_per_tok=2, decoder_sparse_step=1,
        max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    return tf.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", ["int8", pytest.param("int4_weights", marks=pytest.mark.slow)])
def test_experts_are_bytes_in_the_file(kind, tmp_path):
    model = experts()
    texts = [{"input_ids": torch.randint(3, 60, (4, 9)), "attention_mask": torch.ones(4, 9, dtype=torch.long)}]
    folder = export_onnx(model, tmp_path / "onnx", quantization=kind, calibration=texts, latency_rounds=0)
    facts = json.loads((folder / "export_facts.json").read_text())
    assert facts["incremental_decode"]["max_abs_diff"] <= facts["tolerance"] * facts["max_abs_logit"]
    graph = onnx.load(folder / "model.onnx").graph
    codes = sum(
        len(t.raw_data) for t in graph.initializer if t.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
    )
    weights = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    floats = sum(len(t.raw_data) for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT)
    per_weight = 1 if kind == "int8" else 0.5
    assert per_weight * weights * 0.9 <= codes
    assert floats < weights  # scales, norms and the router; the weights alone would be four times this


def test_groups_are_left_out_where_they_do_not_divide_the_inputs_of_experts():
    spec = QuantizationSpec(weight_bits=4, group_size=32, activation_bits=None)
    fitted = {width: _fitted(spec, experts(width)).overrides for width in (24, 32)}
    assert not any("experts" in name for name in fitted[32])
    assert any("experts" in name for name in fitted[24])
