# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn

from hfkdq.export.lowering import lower_quantizers_
from hfkdq.quantization import activation_ranges, quantize, quantized_modules
from hfkdq.specs import QuantizationSpec

from . import tiny


def calibrated(make, **spec):
    model = make()
    return quantize(model, QuantizationSpec(**spec), [tiny.batch(model, seed=seed) for seed in range(3)])


@pytest.mark.parametrize("make", [tiny.bert, tiny.vit, tiny.distilbert])
@pytest.mark.parametrize("activation_bits", [8, None])
@torch.no_grad()
def test_computes_what_the_fake_quantizers_compute(make, activation_bits):
    model = calibrated(make, activation_bits=activation_bits)
    batch = tiny.batch(model, seed=9)
    expected = model(**batch).logits
    assert (make()(**batch).logits - expected).abs().max() > 1e-3  # quantization is there to be seen
    assert lower_quantizers_(model) == sum(isinstance(m, nn.Linear) for m in make().modules())
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
