# SPDX-License-Identifier: Apache-2.0
"""Decoders that keep a state rather than keys and values: exported without a cache, or refused before work starts."""

import json

import pytest
import torch
import transformers as tf

from benchmarks.models.entries import ENTRIES
from hfkdq import QuantizationSpec, export_onnx
from hfkdq.export.exporters_tasks import keeps_tokens
from tests import tiny

SIZES = dict(vocab_size=95, hidden_size=32, num_hidden_layers=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
V5 = int(tf.__version__.split(".")[0]) >= 5


def mamba2():
    state = dict(state_size=8, head_dim=8, num_heads=8, n_groups=1, chunk_size=8)
    return tf.Mamba2ForCausalLM(tf.Mamba2Config(**SIZES, **state))


def lfm2():
    attention = dict(intermediate_size=64, num_attention_heads=4, num_key_value_heads=2)
    return tf.Lfm2ForCausalLM(tf.Lfm2Config(**SIZES, **attention, layer_types=["conv", "full_attention"]))


@pytest.mark.parametrize("make", [mamba2, lfm2, ENTRIES["mamba"].make])
def test_a_state_is_no_key_and_value_for_each_token(make):
    assert not keeps_tokens(make())


@pytest.mark.parametrize("make", [tiny.llama, ENTRIES["gemma3"].make, ENTRIES["mixtral"].make])
def test_windows_and_experts_keep_tokens(make):
    assert keeps_tokens(make())


def test_a_decoder_with_a_state_is_a_file_without_a_cache(tmp_path):
    """What one line's exporter could not write of each: `permute(0, -2, -1, 1)`, and a cache of convolutions."""
    torch.manual_seed(0)
    model = (lfm2 if V5 else mamba2)().eval()
    calibration = [{"input_ids": torch.randint(3, 95, (2, length))} for length in (12, 7)]
    folder = export_onnx(
        model, tmp_path / "onnx", quantization=QuantizationSpec(), calibration=calibration, latency_rounds=0
    )
    facts = json.loads((folder / "export_facts.json").read_text())
    assert (facts["task"], facts["outputs"]) == ("text-generation", ["logits"])
    assert "fixed_axes" not in facts
    assert facts["other_sizes"] == {"batch_size": 1}
    assert facts["quantized_linears"] > 0


def test_a_loop_over_the_tokens_is_refused_before_work_starts(tmp_path):
    model = ENTRIES["mamba"].make()
    with pytest.raises(ValueError, match=r"^MambaForCausalLM computes a text in a loop .* save_pretrained"):
        export_onnx(model, tmp_path / "onnx")
    assert not list(tmp_path.iterdir())
