# SPDX-License-Identifier: Apache-2.0
"""The matrix products of attention on their grids, in models of several families."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, GPT2Config, GPT2LMHeadModel, ResNetConfig, ResNetForImageClassification

from hfkdq import QuantizationSpec
from hfkdq.quantization import (
    AttentionQuantizer,
    activation_quantizers,
    activation_ranges,
    prepare_qat_,
    strip_quantizers_,
)
from hfkdq.quantization.attention import OPERANDS
from hfkdq.quantization.records import set_enabled_
from hfkdq.specs import QuantizationScheme
from tests import tiny
from tests.closeness import UNIT, assert_same_sum, assert_same_tokens
from tests.quantization import naive


def gpt2():
    torch.manual_seed(0)
    size = dict(n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=len(tiny.VOCABULARY))
    calm = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return GPT2LMHeadModel(GPT2Config(**size, **calm, initializer_range=0.2)).eval()


# How a model is made, a linear layer outside of attention, and how many attentions it has.
MODELS = {
    "bert": (tiny.bert, "classifier", 2),
    "distilbert": (tiny.distilbert, "classifier", 2),
    "llama": (tiny.llama, "lm_head", 2),
    "vit": (tiny.vit, "classifier", 2),
    "wav2vec2": (tiny.wav2vec2_ctc, "lm_head", 2),
    "gpt2": (gpt2, "mlp.c_fc", 2),
    "t5": (tiny.t5, "wo", 6),
}
CASES = [(name, how) for name in MODELS for how in ("sdpa", "eager") if (name, how) != ("t5", "sdpa")]


def batch_of(model):
    if model.main_input_name == "input_values":
        return {"input_values": torch.randn(2, 4000, generator=torch.Generator().manual_seed(0))}
    batch = tiny.batch(model)
    return {**batch, "decoder_input_ids": batch["input_ids"][:, :5]} if model.config.is_encoder_decoder else batch


def plain_model(name, implementation):
    # Transformers 4 chooses BERT's classes as it makes the model.
    model = tiny.bert(attn_implementation=implementation) if name == "bert" else MODELS[name][0]()
    model.set_attn_implementation(implementation)
    return model


def make(name, implementation, attention=True, observe=True, **spec):
    model = plain_model(name, implementation)
    settings = {"target_modules": [MODELS[name][1]], "range_estimator": "min_max", "head_bits": 8, **spec}
    prepare_qat_(model, QuantizationSpec(attention=attention, **settings))
    if observe:
        model.train()(**batch_of(model))
    return model.eval()


def logits_of(model, **batch):
    return model(**(batch or batch_of(model))).logits


@pytest.mark.parametrize(("name", "implementation"), CASES)
def test_all_operands_are_quantized_and_the_switch_turns_them_off(name, implementation):
    model = make(name, implementation, activation_bits=4)
    without = make(name, implementation, attention=False, activation_bits=4)
    attentions = {key.rpartition(":")[0] for key in activation_ranges(model) if ":" in key}
    assert len(attentions) == MODELS[name][2]
    for key in attentions:
        assert all(f"{key}:{operand}" in activation_ranges(model) for operand in OPERANDS)
        top = activation_ranges(model)[f"{key}:probabilities"]
        assert top["zero_point"] == 0
        assert top["scale"] <= 1 / 15 + 1e-6
    assert (logits_of(model) - logits_of(without)).abs().max() > 1e-3
    assert list(model.state_dict()) == list(without.state_dict())
    set_enabled_(model, False)
    assert torch.equal(logits_of(model), logits_of(plain_model(name, implementation)))


@pytest.mark.parametrize(("name", "implementation"), CASES)
def test_sixteen_bits_are_close_to_float(name, implementation):
    model, without = (make(name, implementation, attention, activation_bits=16) for attention in (True, False))
    difference = (logits_of(model) - logits_of(without)).abs().max()
    assert 0 < difference < 5e-3 * logits_of(without).abs().max()


@pytest.mark.parametrize(
    "settings",
    [{}, {"is_causal": True}, {"scale": 0.7}, {"attn_mask": torch.randn(2, 1, 5, 5)},
     {"attn_mask": torch.eye(5, dtype=torch.bool)}],
)  # fmt: skip
@pytest.mark.parametrize("heads", [4, 2])
def test_sixteen_bits_are_close_to_the_fused_function(settings, heads):
    scheme = QuantizationScheme(activation_bits=16, range_estimator="min_max", averaging_constant=1.0)
    query, key, value = torch.randn(2, 4, 5, 8), torch.randn(2, heads, 5, 8), torch.randn(2, heads, 5, 8)
    settings = {**settings, "enable_gqa": heads < 4}
    found = AttentionQuantizer(scheme).train().attend(query, key, value, **settings)
    expected = F.scaled_dot_product_attention(query, key, value, **settings)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert not torch.equal(found, expected)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("bits", "symmetric"), [(8, False), (4, True)])
def test_equals_attention_with_operands_quantized_by_hand(implementation, bits, symmetric):
    """Link by link, so that no rounding stands between what is compared: a number near a tie may round either way."""
    model = make("bert", implementation, activation_bits=bits, activation_symmetric=symmetric)
    attention, seen = model.bert.encoder.layer[1].attention.self, {}
    attention.register_forward_hook(
        lambda module, args, kwargs, out: seen.update(ends=(args[0], out[0])), with_kwargs=True
    )
    for name, quantizer in attention.attention_quantizer.operands.items():
        quantizer.register_forward_hook(lambda module, args, out, name=name: seen.update({name: (args[0], out)}))
    batch = batch_of(model)
    model(**batch)
    ranges = activation_ranges(model)
    for name in OPERANDS:  # number by number
        entry = ranges[f"bert.encoder.layer.1.attention.self:{name}"]
        expected = naive.quantize_activation(seen[name][0], entry["scale"], entry["zero_point"], bits)[1]
        assert torch.equal(seen[name][1], expected)
    if seen["key"][0].shape[-1] != 8:  # eager attention gives the keys as columns
        seen["key"] = [keys.transpose(-2, -1) for keys in seen["key"]]

    inputs, out = seen["ends"]
    for name in ("query", "key", "value"):
        projection = getattr(attention, name)
        expected, terms = projection(inputs), inputs.abs() @ projection.weight.abs().t() + projection.bias.abs()
        expected, terms = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in (expected, terms))
        assert_same_sum(seen[name][0], expected, terms, length=32 + 1)
    (_, query), (_, key), (_, value), (found, probabilities) = (
        seen[n] for n in ("query", "key", "value", "probabilities")
    )
    padded = batch["attention_mask"][:, None, None] == 0
    expected = (query @ key.transpose(-2, -1) / 8**0.5).masked_fill(padded, float("-inf")).softmax(dim=-1)
    # Scores are sums of 8 and scaled, as those above; the softmax adds up 10 exponentials, of 2 units each, and divides.
    scores = float(2 * (8 + 1) * UNIT * (query.abs() @ key.abs().transpose(-2, -1)).max() / 8**0.5)
    torch.testing.assert_close(found, expected, rtol=2 * scores + 2 * (10 + 2 * 2 + 1) * UNIT, atol=0)
    context, terms = (t.transpose(1, 2).flatten(2) for t in (probabilities @ value, probabilities @ value.abs()))
    assert_same_sum(out, context, terms, length=10)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_padding_is_not_looked_at(name, implementation):
    model = make(name, implementation, activation_bits=4)
    batch = batch_of(model)
    other = {**batch, "input_ids": torch.where(batch["attention_mask"] == 0, 17, batch["input_ids"])}
    assert not torch.equal(batch["input_ids"], other["input_ids"])
    assert torch.equal(logits_of(model, **batch), logits_of(model, **other))


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_future_is_not_looked_at(name, implementation, padded):
    model = make(name, implementation, activation_bits=4)
    ids = torch.randint(5, 90, (2, 10))
    later = ids.clone()
    later[:, 6:] = 7
    mask = {"attention_mask": torch.tensor([[1] * 10, [0] * 2 + [1] * 8])} if padded else {}
    first, second = (logits_of(model, input_ids=tokens, **mask) for tokens in (ids, later))
    valid = (slice(None), slice(2, 6))
    torch.testing.assert_close(first[valid], second[valid], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(first[:, 6:], second[:, 6:], atol=1e-2)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generation_with_a_cache_gives_the_same_tokens(name, implementation):
    model = make(name, implementation, activation_bits=8)
    ids = torch.randint(5, 90, (2, 6))
    settings = dict(attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, pad_token_id=0)
    settings.update(output_logits=True, return_dict_in_generate=True)
    cached, whole = (model.generate(ids, use_cache=use_cache, **settings) for use_cache in (True, False))
    assert_same_tokens(cached.sequences[:, 6:], whole.sequences[:, 6:], torch.stack(whole.logits, 1), near=0.02)


@pytest.mark.parametrize("estimator", ["learned", "pact", "moving_average"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_ranges_and_gradients(estimator, reentrant):
    model = make("llama", "sdpa", range_estimator=estimator, observe=False)
    twin = copy.deepcopy(model)
    twin.gradient_checkpointing_enable({"use_reentrant": reentrant})
    twin.enable_input_require_grads()
    for _ in range(2):
        for module in (model, twin):
            batch = batch_of(module)
            module.train()(**batch, labels=batch["input_ids"]).loss.backward()
    for (name, one), (_, two) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, msg=lambda text, name=name: f"{name}: {text}")
    learned = [p for key, q in activation_quantizers(model).items() if ":" in key for p in q.parameters()]
    assert len(learned) == {"learned": 16, "pact": 8, "moving_average": 0}[estimator]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learned)
    assert activation_ranges(model) == activation_ranges(twin)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_copies_pickles_and_is_stripped(implementation):
    model = make("bert", implementation)
    expected = logits_of(model)
    plain = plain_model("bert", implementation)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits_of(twin), expected)
        with torch.no_grad():
            for operand in twin.bert.encoder.layer[0].attention.self.attention_quantizer.operands.values():
                operand.set_range(1.0, 0)
        assert not torch.equal(logits_of(twin), expected), "the copy uses its own quantizers"
        assert torch.equal(logits_of(model), expected)
        strip_quantizers_(twin)
        attention = twin.bert.encoder.layer[0].attention.self
        assert not hasattr(attention, "attention_quantizer")
        assert not attention._forward_hooks
        assert not attention._forward_pre_hooks
        assert not attention._forward_hooks_always_called
        assert torch.equal(logits_of(twin), logits_of(plain))
        assert torch.equal(logits_of(model), expected), "the model has kept its own"


def test_attentions_can_be_returned():
    model = make("bert", "eager")
    out = model(**batch_of(model), output_attentions=True)
    assert [tuple(a.shape) for a in out.attentions] == [(4, 4, 10, 10)] * 2
    assert torch.equal(out.logits, logits_of(model))


def einsum_attention(module, query, key, value, mask, scaling=None, dropout=0.0, **kwargs):
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * query.shape[-1] ** -0.5
    return torch.einsum("bhqk,bhkd->bqhd", scores.softmax(-1), value), None


def test_attention_that_cannot_be_seen_is_refused():
    AttentionInterface.register("einsum", einsum_attention)
    model = make("vit", "sdpa")
    expected = logits_of(model)
    model.set_attn_implementation("einsum")
    with pytest.raises(ValueError, match=r"Attention made 0 that could be seen.*'sdpa' or 'eager'.*attention=False"):
        logits_of(model)
    model.set_attn_implementation("sdpa")
    assert torch.equal(logits_of(model), expected), "nothing is left watching"


def test_an_error_inside_leaves_nothing_watching():
    model = make("bert", "sdpa")
    expected, query = logits_of(model), model.bert.encoder.layer[1].attention.self.query
    handle = query.register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits_of(model)
    handle.remove()
    before = activation_ranges(model)
    for module in activation_quantizers(model).values():
        module.train()
    torch.ones(2, 2, 2) @ torch.full((2, 2, 2), 1e6)
    assert activation_ranges(model) == before
    assert torch.equal(logits_of(model.eval()), expected)


def test_a_model_without_attention_is_refused_and_left_alone():
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    model = ResNetForImageClassification(config)
    with pytest.raises(ValueError, match="attention=True: ResNetForImageClassification has no module"):
        prepare_qat_(model, QuantizationSpec(attention=True))
    assert all(type(module) in (nn.Conv2d, nn.Linear) for module in model.modules() if hasattr(module, "weight_scale"))


def test_excluded_attention_stays_in_floating_point():
    model = make("bert", "sdpa", exclude_modules=r".*layer\.0.*")
    names = {key.rpartition(":")[0] for key in activation_ranges(model) if ":" in key}
    assert names == {"bert.encoder.layer.1.attention.self"}
