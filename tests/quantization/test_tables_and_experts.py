# SPDX-License-Identifier: Apache-2.0
"""Tables that a head shares, tables that scale or shift, experts of three axes, and what stays in floating point."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import transformers as tf
from torch import nn

from hfkdq import QuantizationSpec, load_quantized, quantize, suggest_bits
from hfkdq.export.lowering import lower_quantizers_
from hfkdq.facts import describe_facts, read_facts
from hfkdq.pruning import prune
from hfkdq.quantization import QuantizedEmbedding, prepare_qat_, quantized_modules, strip_quantizers_
from hfkdq.quantization.naming import left_in_float
from hfkdq.quantization.schedule import learned_parameters
from hfkdq.specs import PruningSpec
from tests import tiny
from tests.families import FAMILIES, VARIANTS

_SMALL = dict(
    vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, initializer_range=0.3,
)  # fmt: skip
_BOTH = dict(
    vocab_size=60, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, pad_token_id=0,
    decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, init_std=0.3,
)  # fmt: skip
SCALED = {
    "bart": lambda: tf.BartModel(tf.BartConfig(**_BOTH, scale_embedding=True)),
    "m2m": lambda: tf.M2M100Model(tf.M2M100Config(**_BOTH)),
    "gemma3": lambda: tf.Gemma3TextModel(
        tf.Gemma3TextConfig(**_SMALL, head_dim=8, query_pre_attn_scalar=8, layer_types=["full_attention"])
    ),
    "opt": lambda: tf.OPTModel(
        tf.OPTConfig(
            vocab_size=60,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
            init_std=0.3,
        )
    ),
}
EXPERTS = {
    "gpt-oss": lambda: tf.GptOssForCausalLM(
        tf.GptOssConfig(**_SMALL, head_dim=8, num_local_experts=4, num_experts_per_tok=2, rope_scaling=None)
    ),
    "granite": lambda: tf.GraniteMoeForCausalLM(
        tf.GraniteMoeConfig(**_SMALL, num_local_experts=4, num_experts_per_tok=2)
    ),
}
IDS = torch.randint(4, 60, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def warned(monkeypatch):
    """What hfkdq warns of."""
    said: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record):
            said.append(record.getMessage())

    ear, logger = Ear(logging.WARNING), logging.getLogger("hfkdq")
    logger.addHandler(ear)
    yield said
    logger.removeHandler(ear)


def simulated(weight: torch.Tensor, bits: int, dim: int = -1) -> torch.Tensor:
    """Symmetric quantization along one axis, computed here by itself."""
    scale = weight.abs().amax(dim=dim, keepdim=True) / (2 ** (bits - 1) - 1)
    return (weight / scale).round() * scale


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", SCALED)
@torch.no_grad()
def test_tables_that_scale_or_shift_are_quantized_and_go_on_doing_so(name, bits, tmp_path):
    torch.manual_seed(0)
    model = SCALED[name]().eval()
    batch = {"input_ids": IDS, **({"decoder_input_ids": IDS[:, :5]} if model.config.is_encoder_decoder else {})}
    by_hand = copy.deepcopy(model)
    for module in by_hand.modules():
        if isinstance(module, nn.Embedding):
            module.weight.copy_(simulated(module.weight, bits))
    spec = QuantizationSpec(embedding_bits=bits, activation_bits=None, target_modules=r".*(embed_\w+|shared|wte)")
    prepare_qat_(model, spec)
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    assert all(isinstance(table, QuantizedEmbedding) for table in tables)
    expected = by_hand(**batch)[0]
    torch.testing.assert_close(model(**batch)[0], expected, rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path)
    assert torch.equal(load_quantized(tmp_path)(**batch)[0], model(**batch)[0])
    lowered = copy.deepcopy(model)
    lower_quantizers_(lowered)
    torch.testing.assert_close(lowered(**batch)[0], model(**batch)[0], rtol=0, atol=1e-5)
    strip_quantizers_(model)
    assert {type(module) for module in model.modules()} == {type(module) for module in by_hand.modules()}


@pytest.mark.parametrize("family", ["bert-tied", "llama-tied", "gpt2-default-width", "t5", "bart"])
def test_a_tied_head_has_the_integers_of_its_table_and_follows_it(family):
    model = {**FAMILIES, **VARIANTS}[family].make()
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        pytest.skip("not tied in this release of Transformers")
    prepare_qat_(model, QuantizationSpec(weight_estimator="learned", activation_bits=None))
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    tables = [m for m in model.modules() if isinstance(m, QuantizedEmbedding) and m.weight is head.weight]
    assert any(head.weight_quantizer is each.weight_quantizer for each in tables)
    assert torch.equal(head.integer_weight(), table.integer_weight())
    assert len({id(p) for p in learned_parameters(model)}) == len(learned_parameters(model))
    lowered = copy.deepcopy(model)
    lower_quantizers_(lowered)
    stored = {id(module) for module in lowered.modules() if hasattr(module, "packed")}
    assert id(lowered.get_output_embeddings().weight) in stored  # the one that the table gathers from
    strip_quantizers_(model)
    assert type(model.get_output_embeddings()) is nn.Linear


def test_a_tied_head_of_other_bits_has_integers_of_its_own():
    model = prepare_qat_(tiny.bert_mlm(), QuantizationSpec(head_bits=8, embedding_bits=4))
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert (table.weight_quantizer.bits, head.weight_quantizer.bits) == (4, 8)


def test_smoothing_leaves_a_shared_table_alone():
    model = tiny.bert_mlm()
    quantize(model, QuantizationSpec(), [tiny.batch(model)], smoothing=0.5)
    assert model.get_output_embeddings().smoothing.factors is None
    assert torch.equal(model.get_output_embeddings().integer_weight(), model.get_input_embeddings().integer_weight())


def test_a_shared_learned_scale_is_cut_once_when_the_hidden_width_is_pruned():
    model = tiny.bert_mlm()
    prepare_qat_(model, QuantizationSpec(weight_estimator="learned", activation_bits=None))
    prune(model, PruningSpec(sparsity=0.25, structure="hidden", plain_checkpoint=False))
    head = model.get_output_embeddings()
    assert len(head.weight_quantizer.scale) == len(head.weight)
    assert model(**tiny.batch(model)).logits.isfinite().all()


def test_a_checkpoint_of_an_earlier_release_keeps_its_head_in_floating_point(tmp_path):
    model = tiny.bert_mlm()
    quantize(model, QuantizationSpec(exclude_modules=["cls.predictions.decoder"]), [tiny.batch(model)])
    expected = model(**tiny.batch(model)).logits
    record = copy.deepcopy(dict(model.config.hfkdq["quantization"]))
    record["spec"]["exclude_modules"] = None
    del record["left_in_float"]
    model.config.hfkdq["quantization"] = record
    model.save_pretrained(tmp_path)
    loaded = load_quantized(tmp_path)
    assert torch.equal(loaded(**tiny.batch(model)).logits, expected)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(load_quantized(tmp_path / "again")(**tiny.batch(model)).logits, expected)


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("bits", [8, 4])
def test_experts_of_three_axes_are_quantized_per_expert_and_output(name, bits, tmp_path):
    torch.manual_seed(0)
    model = EXPERTS[name]().eval()
    experts = [key for key, p in model.named_parameters() if p.dim() == 3]
    assert experts
    by_hand = copy.deepcopy(model)
    with torch.no_grad():
        for key in experts:
            # GPT-OSS multiplies from the left: (experts, inputs, outputs).
            weight = by_hand.get_parameter(key)
            weight.copy_(simulated(weight, bits, dim=1 if name == "gpt-oss" else 2))
    spec = QuantizationSpec(weight_bits=bits, target_modules=sorted({key.rpartition(".")[0] for key in experts}))
    before = dict(model.named_parameters())
    prepare_qat_(model, spec)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, by_hand(IDS).logits, rtol=0, atol=1e-5)
    model.train()(IDS, labels=IDS).loss.backward()
    assert all(before[key].grad is not None for key in experts)
    model.eval().save_pretrained(tmp_path)
    assert list(dict(model.named_parameters())) == list(before)
    assert torch.equal(load_quantized(tmp_path)(IDS).logits, model(IDS).logits)
    with torch.no_grad():
        expected = model(IDS).logits
        lower_quantizers_(model)
        torch.testing.assert_close(model(IDS).logits, expected, rtol=0, atol=1e-6)
    assert not [key for key, p in model.named_parameters() if p.dim() == 3]


def test_a_subclass_without_a_forward_of_its_own_is_quantized_and_what_torch_derives_is_not():
    class Named(nn.Linear):
        pass

    model = tiny.bert()
    model.classifier = Named(32, 3)
    model.bert.pooler = nn.Sequential(nn.MultiheadAttention(32, 4))
    prepare_qat_(model, QuantizationSpec())
    assert {"classifier"} == {
        name for name in quantized_modules(model) if not name.startswith(("bert.enc", "bert.emb"))
    }
    strip_quantizers_(model)
    assert type(model.classifier) is Named


class Strange(nn.Linear):
    def forward(self, input):
        return nn.functional.linear(input, self.weight) + self.bias


def test_what_stays_in_floating_point_is_told_and_recorded_and_counts_in_a_budget(warned):
    model = tiny.bert()
    model.bert.encoder.layer[0].output.dense.__class__ = Strange
    count = model.bert.encoder.layer[0].output.dense.weight.numel()
    share = count / model.num_parameters()
    assert share > 0.05
    data = [tiny.batch(model)]
    free = suggest_bits(tiny.bert(), data, budget=0.25)
    found = suggest_bits(model, data, budget=0.25)
    whole = found.float_bytes + 4 * count
    assert free.float_bytes == whole
    assert found.bytes + 4 * count <= int(0.25 * whole)
    with pytest.raises(ValueError, match=f"of which {4 * count:,} stay in float32"):
        suggest_bits(model, data, budget=4 * count)
    quantize(model, QuantizationSpec(), data)
    told = [text for text in warned if "stay in floating point" in text]
    assert len(told) == 1
    assert f"{share:.0%} of the parameters" in told[0]
    assert "bert.encoder.layer.0.output.dense (Strange" in told[0]
    assert sum(left_in_float(model).values()) == count
    assert any("stay in floating point" in line for line in describe_facts(read_facts(model)))
    other = tiny.bert()
    other.bert.encoder.layer[0].output.dense.__class__ = Strange
    quantize(other, QuantizationSpec(exclude_modules=["output.dense"]), data)
    assert len([text for text in warned if "stay in floating point" in text]) == 1


def test_inputs_that_no_calibration_data_reach_are_told(warned):
    config = tf.MixtralConfig(**_SMALL, num_local_experts=8, num_experts_per_tok=1)
    model = tf.MixtralForCausalLM(config).eval()
    quantize(model, QuantizationSpec(), [{"input_ids": IDS[:1, :2]}])
    if not any("experts" in name for name in model.config.hfkdq["quantization"].get("unobserved", ())):
        pytest.skip("in this release of Transformers all experts are in one module")
    assert any("No calibration data reached" in text and "experts" in text for text in warned)


def test_ranges_of_other_weights_are_told(tmp_path, warned):
    model = tiny.bert()
    quantize(model, QuantizationSpec(), [tiny.batch(model)])
    model.save_pretrained(tmp_path / "a")
    load_quantized(tmp_path / "a").save_pretrained(tmp_path / "again")
    load_quantized(tmp_path / "again")
    copy.deepcopy(model).half().save_pretrained(tmp_path / "half")  # the same ranges fit
    load_quantized(tmp_path / "half")
    strip_quantizers_(tied := quantize(tiny.bert_mlm(), QuantizationSpec(), [tiny.batch(tiny.bert_mlm())]))
    prepare_qat_(tied, QuantizationSpec(activation_bits=None)).save_pretrained(tmp_path / "tied")
    load_quantized(tmp_path / "tied")
    assert not any("have changed" in text for text in warned)
    plain = tf.BertForSequenceClassification.from_pretrained(tmp_path / "a")  # its configuration still has the record
    with torch.no_grad():
        plain.classifier.weight.mul_(2)
    plain.save_pretrained(tmp_path / "trained")
    load_quantized(tmp_path / "trained")
    assert any("have changed since the ranges" in text for text in warned)
    # What it advises.
    again = strip_quantizers_(load_quantized(tmp_path / "trained"))
    quantize(again, QuantizationSpec(), [tiny.batch(again)]).save_pretrained(tmp_path / "b")
    warned.clear()
    load_quantized(tmp_path / "b")
    assert not warned
