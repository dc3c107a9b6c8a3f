# SPDX-License-Identifier: Apache-2.0
"""LoRA and quantization-aware training: the merged weight is quantized, so that merging changes nothing."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from transformers import (
    BitsAndBytesConfig,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    Trainer,
)

from hfkdq import QATCallback, QuantizationSpec, export_onnx, load_quantized, quantize
from hfkdq.objectives import LogitKD
from hfkdq.quantization import (
    activation_ranges,
    merge_adapters,
    prepare_qat_,
    quantized_modules,
    quantized_spec,
    set_activation_ranges_,
    strip_quantizers_,
)
from hfkdq.quantization.convert import head_modules
from hfkdq.quantization.merging import _dequantized
from hfkdq.quantization.records import quantizer_states, weight_states
from hfkdq.trainer import DistillationTrainer
from tests import tiny

peft = pytest.importorskip("peft")

ON_V5 = Version(transformers.__version__) >= Version("4.58")
LINEARS = ["query", "key", "value", "dense"]
SPECS = {
    "int8": QuantizationSpec(),
    "learned": QuantizationSpec(range_estimator="learned", weight_estimator="learned", weight_bits=4),
    "pact groups": QuantizationSpec(range_estimator="pact", weight_bits=4, group_size=32),
    "kmeans": QuantizationSpec(weight_bits=3, weight_mapping="kmeans"),
    "ternary attention": QuantizationSpec(weight_bits=2, attention=True),
}


def adapted(model=None, **kwargs):
    settings = dict(target_modules=LINEARS, r=4, lora_alpha=16, modules_to_save=["classifier"], task_type="SEQ_CLS")
    config = peft.LoraConfig(**{**settings, **kwargs})
    return peft.get_peft_model(tiny.bert(0, layers=1) if model is None else model, config)


def make_trainer(args, spec, model=None, cls=Trainer, callback=None, **kwargs):
    return cls(
        model=adapted() if model is None else model, args=args, train_dataset=tiny.text_dataset(32),
        eval_dataset=tiny.text_dataset(16, seed=1), data_collator=DataCollatorWithPadding(tiny.tokenizer()),
        callbacks=[QATCallback(spec, **(callback or {}))], **kwargs,
    )  # fmt: skip


def trained(training_arguments, spec, model=None, steps=4, **kwargs):
    trainer = make_trainer(training_arguments(max_steps=steps, learning_rate=1e-2), spec, model, **kwargs)
    trainer.train()
    return trainer


@torch.no_grad()
def logits(model):
    return model.eval()(**tiny.batch(tiny.bert(0, layers=1))).logits


# ---------------------------------------------------------------------- what is quantized


def test_the_layer_computes_with_the_quantized_merged_weight_and_its_gradient_goes_to_the_adapter():
    model = adapted(init_lora_weights=False)
    layer = model.base_model.model.bert.encoder.layer[0].attention.self.query
    weight, bias = layer.base_layer.weight, layer.base_layer.bias
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    prepare_qat_(model, QuantizationSpec())
    x = torch.randn(2, 5, 32)
    model.train()
    y = layer(x)
    y.square().sum().backward()

    merged = (weight + b @ a * 4.0).detach()
    scale = merged.abs().amax(dim=1, keepdim=True) / 127
    expected_weight = torch.round(merged * (1 / scale)) * scale
    low, high = x.min(), x.max()
    step = (high - low) / 255
    zero = torch.round(-low / step)
    expected_x = (torch.clamp(torch.round(x * (1 / step)) + zero, 0, 255) - zero) * step
    torch.testing.assert_close(y, F.linear(expected_x, expected_weight, bias))
    plain = F.linear(x, weight, bias) + x @ a.t() @ b.t() * 4.0
    assert not torch.allclose(y, plain, atol=1e-3)

    gradient = (2 * y.detach()).flatten(0, 1).t() @ expected_x.flatten(0, 1)  # dL / d merged weight, straight through
    torch.testing.assert_close(b.grad, gradient @ a.detach().t() * 4.0, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(a.grad, b.detach().t() @ gradient * 4.0, rtol=1e-4, atol=1e-4)
    assert weight.grad is None


def test_patterns_and_records_have_the_names_of_the_plain_model():
    spec = QuantizationSpec(
        weight_bits=4, target_modules=["query", "classifier", "word_embeddings"], exclude_modules=["layer.1.attention.self.query"],
        overrides={"bert.encoder.layer.0.attention.self.query": {"weight_bits": 2}},
    )  # fmt: skip
    model = prepare_qat_(adapted(tiny.bert(0)), spec)
    plain = prepare_qat_(tiny.bert(0), spec)
    assert {n: m.quantization_scheme for n, m in quantized_modules(model).items()} == {
        n: m.quantization_scheme for n, m in quantized_modules(plain).items()
    }
    everything = prepare_qat_(adapted(), QuantizationSpec(attention=True))
    assert list(quantized_modules(everything)) == list(
        quantized_modules(prepare_qat_(tiny.bert(0, layers=1), QuantizationSpec(attention=True)))
    )
    inner = everything.base_model.model
    assert len(head_modules(everything)) == 2  # the trained copy and the original
    assert type(inner.classifier.original_module) is torch.nn.Linear
    assert type(inner.classifier.modules_to_save["default"]).__name__ == "QuantizedLinear"
    assert type(inner.bert.pooler.dense.lora_A["default"]) is torch.nn.Linear


@pytest.mark.parametrize("kind", SPECS)
def test_merging_changes_no_logit(training_arguments, tmp_path, kind):
    """Every linear layer with an adapter is quantized here, so that the same products are computed in the same order."""
    spec = SPECS[kind]
    trainer = make_trainer(training_arguments(max_steps=4, learning_rate=1e-2), spec)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert parameter.requires_grad == (not torch.equal(parameter, before[name])), name
    model = trainer.model
    expected = logits(model)
    adapters = copy.deepcopy(peft.get_peft_model_state_dict(model))
    merged = merge_adapters(model)
    assert torch.equal(logits(merged), expected)
    assert torch.equal(logits(model), expected)
    assert all(torch.equal(value, adapters[name]) for name, value in peft.get_peft_model_state_dict(model).items())
    assert type(merged) is type(tiny.bert())
    assert activation_ranges(merged) == activation_ranges(model) == merged.config.hfkdq["quantization"]["ranges"]
    assert all(parameter.requires_grad for parameter in merged.parameters())
    assert "adapter" not in vars(merged.bert.pooler.dense)

    merged.save_pretrained(tmp_path / "merged")
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == tiny.bert(layers=1).state_dict().keys()
    assert torch.equal(logits(load_quantized(tmp_path / "merged")), expected)

    assert not torch.allclose(logits(strip_quantizers_(merge_adapters(model))), expected, atol=1e-4)
    by_peft = model.merge_and_unload()
    assert torch.equal(logits(by_peft), expected)
    assert list(quantized_modules(by_peft)) == list(quantized_modules(merged))


def test_a_plain_model_with_the_merged_weights_and_the_ranges_computes_the_same(training_arguments):
    spec = QuantizationSpec()
    model = trained(training_arguments, spec).model
    expected = logits(model)
    ranges = activation_ranges(model)
    merged = strip_quantizers_(model).merge_and_unload()
    assert not hasattr(merged.config, "hfkdq")
    plain = tiny.bert(0, layers=1)
    plain.load_state_dict(merged.state_dict())
    again = set_activation_ranges_(prepare_qat_(plain, spec), ranges)
    assert torch.equal(logits(again), expected)


def test_learned_scales_and_codebooks_start_from_the_merged_weight():
    for settings in (dict(weight_estimator="learned"), dict(weight_mapping="kmeans", weight_bits=3)):
        spec = QuantizationSpec(**settings)
        model = adapted(init_lora_weights=False)
        plain = prepare_qat_(merge_adapters(model), spec)
        assert weight_states(prepare_qat_(model, spec)) == weight_states(plain)


def test_a_model_with_adapters_is_calibrated_on_a_data_set_as_its_merged_self():
    model = adapted(task_type=None)  # whose forward pass names no inputs
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    data = tiny.text_dataset(16).add_column("text", ["a"] * 16)
    merged = quantize(merge_adapters(model), QuantizationSpec(), data, processing_class=tiny.tokenizer())
    quantize(model, QuantizationSpec(), data, processing_class=tiny.tokenizer())
    assert activation_ranges(model) == activation_ranges(merged)
    assert torch.equal(logits(model), logits(merged))


def test_taking_the_quantizers_out_gives_the_plain_adapter_model_back():
    model = adapted(init_lora_weights=False)
    expected, types = logits(model), [type(m) for m in model.modules()]
    prepare_qat_(model, QuantizationSpec())
    assert not torch.equal(logits(model), expected)
    strip_quantizers_(model)
    assert [type(m) for m in model.modules()] == types
    assert torch.equal(logits(model), expected)


def test_before_quantization_begins_adapters_are_those_of_peft(training_arguments):
    """With begin=0.5 the first half of training is the float training, adapters included."""
    losses = []
    for cls in ("plain", "qat"):
        trainer = make_trainer(
            training_arguments(cls, max_steps=4, learning_rate=1e-2), QuantizationSpec(), callback={"begin": 0.5}
        )
        if cls == "plain":
            trainer.pop_callback(QATCallback)
            strip_quantizers_(trainer.model)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0][:2] == losses[1][:2]
    assert losses[0][2:] != losses[1][2:]


def test_adapters_that_come_after_the_quantizers_are_quantized_too(training_arguments):
    spec = QuantizationSpec(weight_estimator="learned")
    late = adapted(prepare_qat_(tiny.bert(0, layers=1), spec))
    early = trained(training_arguments, spec).model
    late = trained(training_arguments, spec, late).model
    assert quantizer_states(late) == quantizer_states(early)
    assert torch.equal(logits(late), logits(early))
    assert torch.equal(logits(merge_adapters(late)), logits(late))


def test_gpt2_with_its_transposed_layers(training_arguments):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=95, n_positions=32, n_embd=32, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        initializer_range=0.2,
    )  # fmt: skip
    model = peft.get_peft_model(
        GPT2LMHeadModel(config),
        peft.LoraConfig(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, init_lora_weights=False),
    )
    inputs = tiny.batch(tiny.llama())
    prepare_qat_(model, QuantizationSpec()).train()(**inputs)
    with torch.no_grad():
        expected = model.eval()(**inputs).logits
        assert torch.equal(merge_adapters(model)(**inputs).logits, expected)


def test_bfloat16_weights_are_rounded_as_merging_rounds_them():
    model = adapted(tiny.bert(0, layers=1).bfloat16(), init_lora_weights=False)
    assert model.base_model.model.bert.pooler.dense.lora_A["default"].weight.dtype == torch.float32
    prepare_qat_(model, QuantizationSpec()).train()(**tiny.batch(tiny.bert()))
    assert torch.equal(logits(merge_adapters(model)), logits(model))


def test_under_autocast_the_adapters_are_added_in_their_own_precision(training_arguments):
    trainer = make_trainer(training_arguments(max_steps=3, bf16=True, learning_rate=1e-2), QuantizationSpec())
    trainer.train()
    layer = trainer.model.base_model.model.bert.pooler.dense
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weight = layer.base_layer.effective_weight()
    delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * 4.0
    assert torch.equal(weight, layer.base_layer.weight + delta)


# ---------------------------------------------------------------------- training


def test_checkpoints_are_those_of_peft_and_training_resumes_exactly(training_arguments, tmp_path):
    spec = SPECS["learned"]
    settings = dict(max_steps=4, save_strategy="steps", save_steps=2, learning_rate=1e-2)
    whole = make_trainer(training_arguments("whole", **settings), spec)
    whole.train()
    plain = make_trainer(training_arguments("plain", **settings), spec)
    plain.pop_callback(QATCallback)
    strip_quantizers_(plain.model)
    plain.train()
    files = [{path.name for path in (tmp_path / kind / "checkpoint-2").iterdir()} for kind in ("whole", "plain")]
    keys = [load_file(tmp_path / k / "checkpoint-2" / "adapter_model.safetensors").keys() for k in ("whole", "plain")]
    assert files[0] == files[1]
    assert keys[0] == keys[1]
    resumed = make_trainer(training_arguments("whole", **settings), spec)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert quantizer_states(resumed.model) == quantizer_states(whole.model)
    for (name, ours), theirs in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_the_best_adapters_come_back_with_their_ranges(training_arguments, tmp_path):
    scores = iter([2.0, 3.0, 1.0])
    args = training_arguments(
        max_steps=3, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, learning_rate=1e-2,
        load_best_model_at_end=True, metric_for_best_model="score", greater_is_better=True,
    )  # fmt: skip
    trainer = make_trainer(args, SPECS["learned"], compute_metrics=lambda prediction: {"score": next(scores)})
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    states = [
        json.loads((tmp_path / "out" / f"checkpoint-{step}" / "trainer_state.json").read_text())["stateful_callbacks"][
            "QATCallback"
        ]["attributes"]["ranges"]
        for step in (2, 3)
    ]
    assert quantizer_states(trainer.model) == states[0] != states[1]


def test_the_base_model_teaches_in_floating_point(training_arguments):
    student, seen = adapted(), []

    def watch(student_out, teacher_out, batch):
        seen.append((batch, teacher_out.logits))
        return (student_out.logits - teacher_out.logits).square().mean()

    trained(
        training_arguments, QuantizationSpec(), student, cls=DistillationTrainer, objectives=[watch],
        teacher_model=student.get_base_model(),
    )  # fmt: skip
    untouched = tiny.bert(0, layers=1)
    for batch, answer in seen:
        with torch.no_grad():
            expected = untouched(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        assert torch.equal(answer, expected)
    assert all(module.fake_quantize_enabled for module in quantized_modules(student).values())


@pytest.mark.parametrize("calibrated", [False, True])
def test_adapters_are_merged_on_export(training_arguments, tmp_path, calibrated):
    spec = QuantizationSpec(target_modules=LINEARS)
    if calibrated:
        model = adapted(init_lora_weights=False)
        folder = export_onnx(
            model, tmp_path / "onnx", quantization=spec, calibration=[tiny.batch(model)], latency_rounds=0
        )
    else:
        model = trained(training_arguments, spec).model
        folder = export_onnx(model, tmp_path / "onnx", quantization=spec, latency_rounds=0)
    facts = json.loads((folder / "export_facts.json").read_text())
    assert facts["quantized_linears"] == 7
    assert facts["max_abs_diff"] < 0.05 * facts["max_abs_logit"]
    assert isinstance(model, peft.PeftModel)
    if not calibrated:
        assert torch.equal(logits(load_quantized(folder)), logits(model))
        with pytest.raises(ValueError, match="spec it was trained with"):
            export_onnx(model, tmp_path / "other", quantization=QuantizationSpec())


# ---------------------------------------------------------------------- quantized by bitsandbytes


@pytest.fixture
def nf4(tmp_path):
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    config = {**tiny.llama().config.to_dict(), "hidden_size": 64, "head_dim": 16, "intermediate_size": 128}
    LlamaForCausalLM(type(tiny.llama().config).from_dict(config)).save_pretrained(tmp_path / "base")

    def load(**kwargs):
        settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        base = LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=settings, dtype=torch.float32)
        base = peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
        return adapted(base, **{**NF4, **kwargs})

    return load


NF4 = dict(
    target_modules=["q_proj", "down_proj", "lm_head"], task_type="CAUSAL_LM", init_lora_weights=False,
    modules_to_save=None,
)  # fmt: skip


def test_an_nf4_base_keeps_its_integers_and_becomes_floating_point_when_merged(training_arguments, tmp_path, nf4):
    spec, model = QuantizationSpec(), nf4()
    trainer = DistillationTrainer(
        model=model, args=training_arguments(max_steps=3, learning_rate=1e-2), objectives=[LogitKD()],
        train_dataset=tiny.text_dataset(32).remove_columns("labels"), teacher_model=tiny.llama(1),
        data_collator=DataCollatorForLanguageModeling(tiny.tokenizer(), mlm=False), callbacks=[QATCallback(spec)],
    )  # fmt: skip
    trainer.train()
    assert list(quantized_modules(model)) == ["model.embed_tokens", "lm_head"]
    kinds = [type(module).__name__ for module in model.modules()]
    assert kinds.count("Params4bit") == 0
    assert kinds.count("Linear4bit") == 14 + 4  # layers of bitsandbytes, and those of PEFT around four of them
    inputs = tiny.batch(tiny.llama())
    with torch.no_grad():
        expected = model.eval()(**inputs).logits
        merged = merge_adapters(model)
        assert {p.dtype for p in merged.parameters()} == {torch.float32}
        assert type(merged) is LlamaForCausalLM
        # A code of lm_head's input may move by one where rounding differs.
        step = activation_ranges(merged)["lm_head"]["scale"]
        assert (merged(**inputs).logits - expected).abs().max() < 2 * step
        unquantized = strip_quantizers_(copy.deepcopy(merged))
        torch.testing.assert_close(
            unquantized(**inputs).logits,
            strip_quantizers_(copy.deepcopy(model))(**inputs).logits,
            rtol=1e-2,
            atol=1e-2,
        )
        assert torch.equal(model(**inputs).logits, expected)
    former = [name for name, module in merged.named_modules() if name.endswith("_proj")]
    assert quantized_spec(merged).overrides == dict.fromkeys(former)
    merged.save_pretrained(tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["quantization_config"] == {
        "quant_method": "hfkdq"
    }
    again = load_quantized(tmp_path / "merged")
    assert list(quantized_modules(again)) == list(quantized_modules(model))
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, merged(**inputs).logits)
    if not ON_V5:
        folder = export_onnx(model, tmp_path / "onnx", quantization=spec, latency_rounds=0)
        facts = json.loads(Path(folder, "export_facts.json").read_text())
        # Floats before the last layer, and of its 64 inputs two that round to the other side, each one step from where they were.
        codes = 2 * step * float(merged.lm_head.weight.detach().abs().max())
        assert facts["max_abs_diff"] < 1e-5 * facts["max_abs_logit"] + codes


@pytest.mark.parametrize("nested", [False, True])
def test_weights_that_bitsandbytes_has_packed_for_its_kernel_are_merged_too(nested):
    """Its forward pass on CPUs with AVX512 changes the layout of the weights, in eval mode, and rounds their scales."""
    functional = pytest.importorskip("bitsandbytes").functional
    if not hasattr(functional, "_convert_weight_packed_for_cpu"):
        pytest.skip("this release of bitsandbytes leaves the layout alone")
    weight = torch.randn(64, 128)
    codes, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
    expected = functional.dequantize_4bit(codes, state)
    layer = torch.nn.Linear(128, 64, bias=False)
    packed, state = functional._convert_weight_packed_for_cpu(codes, state)
    layer.weight = bitsandbytes_parameter(packed, state)
    torch.testing.assert_close(_dequantized(layer), expected, rtol=2e-2, atol=2e-2)


def bitsandbytes_parameter(codes, state):
    import bitsandbytes

    parameter = bitsandbytes.nn.Params4bit(codes, requires_grad=False, quant_type="nf4", bnb_quantized=True)
    parameter.quant_state = state
    return parameter


def test_a_spec_for_nothing_but_layers_of_bitsandbytes_is_refused(nf4):
    model = nf4()
    with pytest.raises(ValueError, match=r"matches no module.*q_proj: it holds torch\.uint8 weights already"):
        prepare_qat_(model, QuantizationSpec(target_modules=["q_proj", "v_proj"]))
    with pytest.raises(ValueError, match=r"matches target_modules: 'q_proj'"):
        prepare_qat_(model, QuantizationSpec(target_modules=["q_proj", "lm_head"]))
    assert not quantized_modules(model)
    with pytest.raises(ValueError, match=r"q_proj.*quantized already"):
        prepare_qat_(model.unload(), QuantizationSpec())


# ---------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (dict(lora_dropout=0.1), r"lora_dropout=0\.1.*LoraConfig\(lora_dropout=0\.0\)"),
        (dict(use_dora=True), "of the kind Dora"),
        (dict(lora_bias=True), "lora_bias=True"),
        (dict(target_modules=["word_embeddings"]), r"lora\.layer\.Embedding is no lora\.Linear"),
    ],
)
def test_adapters_that_no_weight_can_hold_are_refused_where_they_are_quantized(settings, reason):
    model = adapted(**settings)
    types = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=f"(?s){reason}.*exclude_modules"):
        prepare_qat_(model, QuantizationSpec())
    assert [type(module) for module in model.modules()] == types
    others = QuantizationSpec(exclude_modules=[*LINEARS, "word_embeddings"])
    assert "classifier" in quantized_modules(prepare_qat_(model, others))


def test_other_kinds_of_adapters_are_refused():
    scaled = peft.IA3Config(target_modules=["query"], feedforward_modules=[], task_type="SEQ_CLS")
    with pytest.raises(ValueError, match="of the kind IA3"):
        prepare_qat_(peft.get_peft_model(tiny.bert(), scaled), QuantizationSpec())
    prompts = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="of the kind PROMPT_TUNING"):
        prepare_qat_(peft.get_peft_model(tiny.bert(), prompts), QuantizationSpec())
    with pytest.raises(TypeError, match="takes a PeftModel, got BertForSequenceClassification"):
        merge_adapters(tiny.bert())


def test_adapters_mixed_within_a_batch_are_refused():
    model = prepare_qat_(adapted(), QuantizationSpec())
    with pytest.raises(ValueError, match="adapter_names mixes"):
        model.eval()(**tiny.batch(tiny.bert()), adapter_names=["default"] * 4)
