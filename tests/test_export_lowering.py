# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hfkdq.export.lowering import lower_quantizers_
from hfkdq.quantization import activation_ranges, quantize, quantized_modules
from hfkdq.quantization.records import set_enabled_, set_weight_bits_
from hfkdq.specs import QuantizationSpec

from . import tiny


def calibrated(make, **spec):
    model = make()
    return quantize(model, QuantizationSpec(**spec), [tiny.batch(model, seed=seed) for seed in range(3)])


@pytest.mark.parametrize("make", [tiny.bert, tiny.vit, tiny.distilbert, tiny.gpt2, tiny.resnet])
@pytest.mark.parametrize(
    "spec",
    [
        dict(activation_bits=8),
        dict(activation_bits=None),
        dict(weight_bits=4, weight_estimator="mse", activation_symmetric=True),
        dict(weight_bits=2, per_channel=False),
        dict(weight_bits=1),
    ],
)
@torch.no_grad()
def test_computes_what_the_fake_quantizers_compute(make, spec):
    model = calibrated(make, **spec)
    batch = tiny.batch(model, seed=9)
    expected = model(**batch).logits
    assert (make()(**batch).logits - expected).abs().max() > 1e-3  # quantization is there to be seen
    assert lower_quantizers_(model) == sum(isinstance(m, (nn.Linear, Conv1D)) for m in make().modules())
    torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=2e-6)
    assert not quantized_modules(model)


@torch.no_grad()
def test_codes_are_those_of_training_bit_for_bit():
    model = calibrated(tiny.bert, activation_bits=None)
    linear, table = model.bert.encoder.layer[0].attention.self.query, model.bert.embeddings.word_embeddings
    identity = torch.eye(linear.in_features)
    weight = (linear(identity) - linear.bias).clone()
    linear.bias.zero_()
    weight, rows = linear(identity), table(torch.arange(table.num_embeddings))
    lower_quantizers_(model)
    linear, table = model.bert.encoder.layer[0].attention.self.query, model.bert.embeddings.word_embeddings
    assert linear.codes.dtype == table.codes.dtype == torch.int8
    assert torch.equal(linear.codes * linear.scale, weight)
    assert torch.equal(table.codes * table.scale, rows)
    assert linear.codes.abs().amax(0).eq(127).all()


def test_ranges_are_taken_over():
    model = calibrated(tiny.vit)
    ranges = activation_ranges(model)
    lower_quantizers_(model)
    assert ranges
    for name, expected in ranges.items():
        linear = model.get_submodule(name)
        assert (linear.input_scale.item(), linear.input_zero_point.item()) == tuple(expected.values())


def test_excluded_modules_stay():
    model = calibrated(tiny.bert, exclude_modules=["classifier", "word_embeddings"])
    lower_quantizers_(model)
    assert type(model.classifier) is nn.Linear
    assert type(model.bert.embeddings.word_embeddings) is nn.Embedding


@pytest.mark.parametrize(
    ("make", "spec", "reason"),
    [
        (tiny.bert, dict(weight_bits=4, group_size=32), "query has group_size=32"),
        (tiny.bert, dict(weight_bits=4, weight_mapping="kmeans"), "weight_mapping='kmeans'"),
        (tiny.bert, dict(symmetric=False), "symmetric=False"),
        (tiny.bert, dict(weight_bits=16, storage_dtype="float16"), "weight_bits=16"),
        (tiny.vit, dict(activation_bits=4), "activation_bits=4"),
        (tiny.bert, dict(attention=True), "attention.self has quantized matrix products"),
    ],
)
def test_what_cannot_be_written_yet_is_refused_with_the_reason(make, spec, reason):
    model = calibrated(make, **spec)
    with pytest.raises(ValueError, match=reason):
        lower_quantizers_(model)
    assert quantized_modules(model), "and left as it was"


def test_smoothed_inputs_are_refused():
    model = tiny.bert()
    quantize(model, QuantizationSpec(), [tiny.batch(model)], smoothing=0.5)
    with pytest.raises(ValueError, match="smoothed inputs"):
        lower_quantizers_(model)


def test_a_model_from_the_middle_of_its_training_is_refused():
    off, wide = calibrated(tiny.bert), calibrated(tiny.bert, weight_bits=4)
    set_enabled_(off, False)
    with pytest.raises(ValueError, match="fake quantizers that are off"):
        lower_quantizers_(off)
    set_weight_bits_(quantized_modules(wide)["bert.pooler.dense"], 8)
    with pytest.raises(ValueError, match=r"bert.pooler.dense has weights of 8 bits, on the way to the 4"):
        lower_quantizers_(wide)
