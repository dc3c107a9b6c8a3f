# SPDX-License-Identifier: Apache-2.0
"""Smoothed inputs and corrected biases against their formulas, and whether they help."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from hfkdq import QuantizationSpec, quantize
from hfkdq.quantization import prepare_qat_, quantized_modules, strip_quantizers_
from hfkdq.quantization.post_training import correct_biases_, smooth_
from tests import tiny
from tests.quantization.test_attention import gpt2


class Branches(PreTrainedModel):
    """Two linear layers that share an input, a third behind them, and one that nothing calls."""

    config_class = PretrainedConfig
    main_input_name = "inputs"

    def __init__(self, config=None):
        super().__init__(config or PretrainedConfig())
        torch.manual_seed(0)
        self.left, self.right = nn.Linear(32, 16), nn.Linear(32, 16)
        self.top, self.unused = nn.Linear(16, 4), nn.Linear(32, 4)
        self.left.weight.data[:, 3] = 0.0
        self.right.weight.data[:, 3] = 0.0

    def forward(self, inputs):
        return self.top(self.left(inputs).relu() + self.right(inputs))


def batches_with_an_outlier(count=3):
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(20, 32, generator=generator) for _ in range(count)]
    for values in batches:
        values[:, 5] *= 80.0
        values[:, 7] = 0.0
    return [{"inputs": values} for values in batches]


def runner(model, batches):
    def run():
        for batch in batches:
            with torch.no_grad():
                model(**batch)
            yield

    return run


@pytest.mark.parametrize("strength", [0.0, 0.5, 0.8, 1.0])
def test_factors_follow_the_formula_and_are_shared_with_the_input(strength):
    model, batches = prepare_qat_(Branches().eval(), QuantizationSpec()), batches_with_an_outlier()
    assert smooth_(model, runner(model, batches), strength) == 3
    inputs = torch.cat([batch["inputs"] for batch in batches])
    for layers, seen in (
        ((model.left, model.right), inputs),
        ((model.top,), nn.functional.linear(inputs, model.left.weight, model.left.bias).relu()
         + nn.functional.linear(inputs, model.right.weight, model.right.bias)),
    ):  # fmt: skip
        for j in range(seen.shape[1]):
            largest = seen[:, j].abs().max().item()
            weight = max(layer.weight[:, j].abs().max().item() for layer in layers)
            usable = largest > 0 and weight > 0
            expected = largest**strength / weight ** (1 - strength) if usable else 1.0
            for layer in layers:
                assert layer.smoothing.factors[j].item() == pytest.approx(expected, rel=1e-4)
    assert model.unused.smoothing.factors is None


@pytest.mark.parametrize("make", [Branches, tiny.bert, gpt2])
def test_smoothing_leaves_the_function_as_it_is(make):
    model = make().eval()
    batches = batches_with_an_outlier() if make is Branches else [tiny.batch(model, seed=seed) for seed in range(2)]
    spec = QuantizationSpec(activation_bits=16, range_estimator="min_max")
    plain = quantize(copy.deepcopy(model), spec, batches)
    weights = copy.deepcopy(model.state_dict())
    smoothed = quantize(model, spec, batches, smoothing=0.5)
    assert all(torch.equal(value, weights[name]) for name, value in smoothed.state_dict().items())
    linear = [
        m for m in quantized_modules(smoothed).values() if hasattr(m, "smoothing") and m.smoothing.factors is not None
    ]
    assert len(linear) >= 3
    for layer in linear:
        factors = layer.smoothing.factors
        inputs = torch.randn(5, len(factors))
        divided = inputs / factors
        weight = layer.effective_weight()
        weight = weight if isinstance(layer, nn.Linear) else weight.t()
        layer.fake_quantize_enabled = False
        torch.testing.assert_close(
            nn.functional.linear(divided, weight, layer.bias), layer(inputs), rtol=1e-3, atol=1e-3
        )
        layer.fake_quantize_enabled = True
    outputs = [m(**batches[0]) for m in (plain, smoothed)]
    first, second = (out if torch.is_tensor(out) else out.logits for out in outputs)
    assert not torch.equal(first, second)
    torch.testing.assert_close(first, second, rtol=0.05, atol=0.05 * first.abs().max().item())
    for layer in linear:  # q, k and v of an attention read one input
        assert (layer.smoothing.factors > 0).all()
    if make is tiny.bert:
        attention = smoothed.bert.encoder.layer[0].attention.self
        assert torch.equal(attention.query.smoothing.factors, attention.value.smoothing.factors)


def test_smoothing_helps_where_one_feature_is_large():
    batches, spec = batches_with_an_outlier(), QuantizationSpec(range_estimator="min_max")
    expected = Branches()(**batches[0])
    errors = {
        strength: (quantize(Branches().eval(), spec, batches, smoothing=strength)(**batches[0]) - expected)
        .square()
        .mean()
        for strength in (None, 0.5)
    }
    assert errors[0.5] < 0.4 * errors[None]


def test_a_codebook_is_found_for_the_smoothed_weights():
    batches = batches_with_an_outlier()
    spec = QuantizationSpec(weight_bits=3, weight_mapping="kmeans", head_bits=3)
    layer = quantize(Branches().eval(), spec, batches, smoothing=0.5).left
    found = layer.weight_quantizer.codebook.clone()
    layer.weight_quantizer.start_codebook(layer.effective_weight())
    assert torch.equal(layer.weight_quantizer.codebook, found)


def test_scales_of_smoothed_weights_must_fit_into_float16():
    batches = [{"inputs": values["inputs"] * 1e9} for values in batches_with_an_outlier()]
    model = Branches().eval()
    with pytest.raises(ValueError, match=r"weights of (left|right|top).*float16"):
        quantize(model, QuantizationSpec(storage_dtype="float16"), batches, smoothing=0.9)
    assert not quantized_modules(model)


@pytest.mark.parametrize("weight_bits", [8, 4, 2])
def test_corrected_bias_takes_the_mean_error_of_every_layer_away(weight_bits):
    batches = batches_with_an_outlier()
    inputs = torch.cat([batch["inputs"] for batch in batches])
    spec = QuantizationSpec(
        weight_bits=weight_bits, head_bits=weight_bits, range_estimator="percentile", percentile=90.0
    )
    plain, model = Branches().eval(), quantize(Branches().eval(), spec, batches)
    errors = []
    for _ in range(2):
        # Each layer by itself, on what it sees in the model in floating point.
        hidden = plain.left(inputs).relu() + plain.right(inputs)
        pairs = [(plain.left, model.left, inputs), (plain.right, model.right, inputs), (plain.top, model.top, hidden)]
        errors.append([(one(seen) - two(seen)).mean(dim=0).abs().max().item() for one, two, seen in pairs])
        corrected = correct_biases_(model, runner(model, batches))
    assert corrected == 3, "the layer that nothing calls has nothing to correct"
    assert min(errors[0]) > 1e-3
    assert max(errors[1]) < 1e-4
    assert torch.equal(model.unused.bias, plain.unused.bias)


@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Conv1d(4, 6, 3), (3, 4, 9)), (nn.Conv2d(4, 6, 3, stride=2), (3, 4, 9, 8))]
)
def test_biases_of_convolutions_are_corrected_by_channel(layer, shape):
    class Model(PreTrainedModel):
        config_class = PretrainedConfig

        def __init__(self):
            super().__init__(PretrainedConfig())
            self.layer, self.without = copy.deepcopy(layer), type(layer)(6, 4, 1, bias=False)

        def forward(self, values):
            return self.without(self.layer(values))

    batches = [{"values": torch.randn(shape)} for _ in range(2)]
    model = quantize(Model().eval(), QuantizationSpec(weight_bits=2, head_bits=2), batches, bias_correction=True)
    values = torch.cat([batch["values"] for batch in batches])
    channels = [0, *range(2, len(shape))]
    torch.testing.assert_close(model.layer(values).mean(dim=channels), layer(values).mean(dim=channels))
    assert not torch.equal(model.layer.bias, layer.bias)
    assert model.without.bias is None


def test_correction_brings_a_whole_model_closer():
    batches = [tiny.batch(tiny.vit(), size=16, seed=seed) for seed in range(3)]
    spec = QuantizationSpec(weight_bits=3)
    expected = tiny.vit()(**batches[0]).logits
    errors = [
        (quantize(tiny.vit(), spec, batches, bias_correction=on)(**batches[0]).logits - expected)
        .mean(dim=0)
        .abs()
        .max()
        for on in (False, True)
    ]
    assert errors[1] < errors[0]


def test_stripping_takes_the_factors_away():
    batches, plain = batches_with_an_outlier(), Branches().eval()
    model = quantize(copy.deepcopy(plain), QuantizationSpec(), batches, smoothing=0.5)
    assert torch.equal(strip_quantizers_(model)(**batches[0]), plain(**batches[0]))
