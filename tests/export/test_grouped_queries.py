# SPDX-License-Identifier: Apache-2.0
"""Decoders with fewer heads of keys than of queries, and heads of any width, generate from their files what torch does."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers as tf
from packaging.version import Version

from hfkdq import QuantizationSpec, export_onnx, quantize
from hfkdq.export.runtime import OnnxSession

ON_V5 = Version(tf.__version__).major >= 5
_SMALL = dict(
    vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
    max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.2,
)  # fmt: skip
CONFIGS = {
    "llama": lambda: tf.LlamaConfig(**_SMALL),
    "qwen3": lambda: tf.Qwen3Config(**_SMALL, head_dim=16),
    "gemma3": lambda: tf.Gemma3TextConfig(**_SMALL, head_dim=16, sliding_window=4, query_pre_attn_scalar=16),
    "smollm3": lambda: tf.SmolLM3Config(**_SMALL),
    "phi": lambda: tf.PhiConfig(**_SMALL),
    "phi3": lambda: tf.Phi3Config(**_SMALL),
}
SPECS = {
    "int8": QuantizationSpec(),
    "int4_weights": QuantizationSpec(weight_bits=4, activation_bits=None),
}
STEPS = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def cells():
    """Where only the widths of the cache differ, the other architectures are slow tests."""
    for family in CONFIGS:
        for kind in ("float32", "int8"):
            quick = (family, kind) in (("qwen3", "int8"), ("phi3", "float32"), ("phi", "float32")) or (
                family == "gemma3" and kind == "float32"
            )
            yield pytest.param(family, kind, marks=[] if quick else [pytest.mark.slow])
    yield "phi3", "int4_weights"  # whose cut of one layer's outputs hides their width from what comes after


def greedy(session, ids, mask, config):
    """The tokens that come of adding the likeliest one to the cache, time after time."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    names = [name for name in session.input_names if name.startswith("past_key_values")]
    cache = {name: np.zeros((len(ids), config.num_key_value_heads, 0, width), np.float32) for name in names}
    found, step, positions = ids, ids, (mask.cumsum(1) - 1).clip(min=0)
    for _ in range(STEPS["max_new_tokens"]):
        outputs = session({"input_ids": step, "attention_mask": mask, "position_ids": positions, **cache})
        logits = outputs["logits"][:, -1]
        logits[:, config.eos_token_id] = -np.inf
        step, positions = logits.argmax(-1)[:, None], positions[:, -1:] + 1
        found, mask = np.concatenate([found, step], 1), np.pad(mask, [(0, 0), (0, 1)], constant_values=1)
        cache = {name: outputs[name.replace("past_key_values", "present")] for name in names}
    return torch.from_numpy(found)


@pytest.mark.parametrize(("family", "kind"), list(cells()))
def test_a_cache_of_fewer_heads_generates_the_tokens_of_torch(family, kind, tmp_path):
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(CONFIGS[family]()).eval()
    texts = [{"input_ids": torch.randint(3, 60, (4, 9)), "attention_mask": torch.ones(4, 9, dtype=torch.long)}]
    if kind in SPECS:
        model = quantize(model, SPECS[kind], texts).eval()
    folder = export_onnx(model, tmp_path / "onnx", calibration=texts, latency_rounds=0)
    assert json.loads((folder / "export_facts.json").read_text())["task"] == "text-generation-with-past"
    ids, mask = texts[0]["input_ids"][:2, :7], torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    expected = model.generate(**inputs, **STEPS)
    assert torch.equal(greedy(OnnxSession(folder / "model.onnx"), ids.numpy(), mask.numpy(), model.config), expected)
    if not ON_V5:
        from optimum.onnxruntime import ORTModelForCausalLM

        assert torch.equal(ORTModelForCausalLM.from_pretrained(folder).generate(**inputs, **STEPS), expected)
