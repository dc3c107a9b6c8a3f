# SPDX-License-Identifier: Apache-2.0
"""What a pruning is meant for and does not know is summed up: told before, recorded, in the card, and counted."""

import pytest
import torch
import transformers as tf
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from hfkdq import PruningSpec, fit_sparsity, prune
from hfkdq.facts import describe_facts, read_facts
from hfkdq.modeling import neurons

from .. import tiny

_TEXT = dict(
    vocab_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    intermediate_size=48, max_position_embeddings=64,
)  # fmt: skip
DENSE = 3 * 32 * 48
EXPERTS = 4 * 3 * 32 * 16 + 4 * 32  # with their router
HALF = PruningSpec(sparsity=0.5, structure="neuron")


def half_known(monkeypatch):
    """A dense layer, and one of experts whose width is in a field that is not known."""
    monkeypatch.setattr(neurons, "WIDTH_FIELDS", ("intermediate_size",))
    torch.manual_seed(0)
    config = tf.Qwen3MoeConfig(
        **_TEXT, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, mlp_only_layers=[0]
    )
    return tf.Qwen3MoeForCausalLM(config).eval()


def told(act):
    with CaptureLogger(logging.get_logger("hfkdq.pruning.finishing")) as said:
        act()
    return said.out


def test_layers_whose_neurons_are_not_known_are_told_recorded_and_counted(monkeypatch):
    model = half_known(monkeypatch)
    share = EXPERTS / model.num_parameters()
    said = told(lambda: prune(model, HALF))
    assert f"leaves {share:.0%} of the parameters of Qwen3MoeForCausalLM as they are" in said
    assert "model.layers.1.mlp.experts" in said
    fact = read_facts(model)["pruning"]
    assert fact["left_unpruned"]["share"] == share
    assert all(name.startswith("model.layers.1.mlp.") for name in fact["left_unpruned"]["modules"])
    assert fact["achieved_sparsity"] == pytest.approx(0.5 * DENSE / (DENSE + EXPERTS))
    (sentence,) = describe_facts({"pruning": fact})
    assert (
        f"; {share:.0%} of the parameters are left as they were, most of them in model.layers.1.mlp.experts"
        in sentence
    )


def test_budgets_count_what_is_left(monkeypatch):
    model = half_known(monkeypatch)
    before = model.num_parameters()
    prune(model, fit_sparsity(model, HALF, parameters=0.95))
    assert 0.94 * before < model.num_parameters() <= 0.95 * before
    with pytest.raises(ValueError, match="Even at sparsity"):
        fit_sparsity(half_known(monkeypatch), HALF, parameters=0.5)


def test_a_spec_that_names_its_targets_leaves_the_rest_knowingly(monkeypatch):
    model = half_known(monkeypatch)
    spec = PruningSpec(sparsity=0.5, structure="neuron", target_modules=["gate_proj"])
    assert not told(lambda: prune(model, spec))
    fact = read_facts(model)["pruning"]
    assert "left_unpruned" not in fact
    assert fact["achieved_sparsity"] == 0.5


def test_single_weights_of_experts_in_one_tensor_are_left_where_what_they_read_decides():
    torch.manual_seed(0)
    config = tf.GptOssConfig(**_TEXT, num_local_experts=4, num_experts_per_tok=2, rope_scaling=None)
    model = tf.GptOssForCausalLM(config).eval()
    spec, ids = PruningSpec(sparsity=0.5, criterion="activation"), torch.arange(3, 27).view(2, 12)
    said = told(lambda: prune(model, spec, [{"input_ids": ids}]))
    fact = read_facts(model)["pruning"]
    assert "model.layers.0.mlp.experts (GptOssExperts" in said
    layers = {name: p for name, p in model.named_parameters() if ".layers." in name and p.dim() > 1}
    zeros = sum(int((p == 0).sum()) for name, p in layers.items() if "attn" in name)
    assert fact["achieved_sparsity"] == pytest.approx(zeros / sum(p.numel() for p in layers.values()))
    assert fact["achieved_sparsity"] < 0.1


@pytest.mark.parametrize("structure", ["neuron", "weight", "head"])
def test_a_model_that_is_known_throughout_leaves_nothing(structure):
    model = tiny.bert()
    assert not told(lambda: prune(model, PruningSpec(sparsity=0.5, structure=structure, plain_checkpoint=False)))
    assert "left_unpruned" not in read_facts(model)["pruning"]
