# SPDX-License-Identifier: Apache-2.0
"""Calibration without training, and loading the result back."""

from __future__ import annotations

import pytest
import torch

from hfkdq import QuantizationSpec, load_quantized, quantize
from hfkdq.quantization import activation_ranges, quantized_modules
from tests import tiny


def batches(model, count=3):
    return [tiny.batch(model, seed=seed) for seed in range(count)]


@pytest.mark.parametrize("estimator", ["moving_average", "min_max"])
def test_calibrates_in_eval_mode_and_leaves_weights_alone(estimator):
    model = tiny.bert(hidden_dropout_prob=0.3).train()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    assert quantize(model, QuantizationSpec(range_estimator=estimator), batches(model)) is model
    assert all(module.training for module in model.modules()), "the mode is what it was"
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    twin = quantize(tiny.bert(), QuantizationSpec(range_estimator=estimator), iter(batches(model)))
    assert activation_ranges(model) == activation_ranges(twin), "no dropout while calibrating"
    assert len(activation_ranges(model)) == 14
    before = activation_ranges(model)
    model.eval()(**tiny.batch(model, seed=9))
    assert activation_ranges(model) == before


def test_min_max_covers_all_calibration_data():
    model, seen = tiny.bert(), []
    model.classifier.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    quantize(model, QuantizationSpec(range_estimator="min_max", target_modules=["classifier"]), batches(model))
    entry = activation_ranges(model)["classifier"]
    spread = max(0.0, torch.cat(seen).max().item()) - min(0.0, torch.cat(seen).min().item())
    assert entry["scale"] == pytest.approx(spread / 255)


@pytest.mark.parametrize("make", [tiny.bert, tiny.llama, tiny.vit])
def test_saved_and_loaded_bit_for_bit(tmp_path, make):
    model = make()
    quantize(model, QuantizationSpec(), batches(model))
    model.save_pretrained(tmp_path)
    loaded = load_quantized(str(tmp_path))
    assert type(loaded) is type(model)
    assert not loaded.training
    assert torch.equal(loaded(**tiny.batch(model)).logits, model(**tiny.batch(model)).logits)
    assert activation_ranges(loaded) == activation_ranges(model)
    loaded.save_pretrained(tmp_path / "again")
    again = load_quantized(tmp_path / "again")
    assert torch.equal(again(**tiny.batch(model)).logits, model(**tiny.batch(model)).logits)


def test_bf16_model_keeps_its_precision(tmp_path):
    model = tiny.bert().bfloat16()
    quantize(model, QuantizationSpec(), batches(model))
    model.save_pretrained(tmp_path)
    loaded = load_quantized(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded(**tiny.batch(model)).logits, model(**tiny.batch(model)).logits)
    assert load_quantized(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_dataset_with_a_tokenizer_or_a_collator():
    data = tiny.text_dataset(10).add_column("text", ["a"] * 10)
    by_tokenizer = quantize(tiny.bert(), QuantizationSpec(), data, batch_size=4, processing_class=tiny.tokenizer())
    columns = ["input_ids", "attention_mask", "labels"]
    padded = [
        {
            name: torch.as_tensor(value)
            for name, value in tiny.tokenizer().pad(data.select_columns(columns)[i : i + 4]).items()
        }
        for i in range(0, 10, 4)
    ]
    assert activation_ranges(by_tokenizer) == activation_ranges(quantize(tiny.bert(), QuantizationSpec(), padded))
    images = quantize(tiny.vit(), QuantizationSpec(), tiny.image_dataset(8))
    assert len(activation_ranges(images)) == 14


def test_weight_only_needs_no_calibration():
    model = quantize(tiny.bert(), QuantizationSpec(activation_bits=None))
    assert quantized_modules(model)
    assert activation_ranges(model) == {}


def failing(model):
    yield tiny.batch(model)
    raise KeyError("broken data")


def not_finite(model):
    good = tiny.batch(model)
    return [good, {"pixel_values": torch.full_like(good["pixel_values"], float("nan"))}]


@pytest.mark.parametrize(
    ("spec", "calibration", "error", "message"),
    [
        ({}, lambda model: None, ValueError, "need calibration data"),
        ({}, lambda model: [], ValueError, "hold no batch"),
        ({}, lambda model: tiny.image_dataset(4).select([]), ValueError, "hold no batch"),
        ({}, not_finite, ValueError, "pixel_values of calibration batch 2 is not finite"),
        ({}, lambda model: [torch.zeros(1, 1, 8, 8)], TypeError, "batch 1 is a Tensor"),
        ({}, failing, KeyError, "broken data"),
        ({"range_estimator": "learned"}, batches, ValueError, "QATCallback"),
        ({"target_modules": ["nowhere"]}, batches, ValueError, "matches no module"),
    ],
)
def test_bad_calibration_leaves_the_model_alone(spec, calibration, error, message):
    model = tiny.vit().train()
    with pytest.raises(error, match=message):
        quantize(model, QuantizationSpec(**spec), calibration(model))
    assert not quantized_modules(model)
    assert not hasattr(model.config, "hfkdq")
    assert all(module.training for module in model.modules())


def test_model_that_overflows_is_reported():
    model = tiny.vit()
    model.vit.layernorm.weight.data.fill_(float("inf"))
    with pytest.raises(ValueError, match="does not stay finite on the calibration data"):
        quantize(model, QuantizationSpec(), batches(model))
    assert not quantized_modules(model)


def test_quantized_twice():
    model = quantize(tiny.vit(), QuantizationSpec(), batches(tiny.vit()))
    with pytest.raises(ValueError, match="strip_quantizers_"):
        quantize(model, QuantizationSpec(), batches(model))


def test_checkpoints_that_cannot_be_loaded(tmp_path):
    model = tiny.vit()
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="records no quantization"):
        load_quantized(tmp_path / "plain")
    quantize(model, QuantizationSpec(activation_bits=None)).save_pretrained(tmp_path / "own")
    config = (tmp_path / "own" / "config.json").read_text()
    (tmp_path / "own" / "config.json").write_text(config.replace("ViTForImageClassification", "MyOwnModel"))
    with pytest.raises(ValueError, match="MyOwnModel"):
        load_quantized(tmp_path / "own")
