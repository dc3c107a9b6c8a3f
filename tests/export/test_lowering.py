# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from transformers.pytorch_utils import Conv1D

from hfkdq.export.lowering import lower_quantizers_
from hfkdq.export.lowering.layers import FoldedConv, IntegerConv1d
from hfkdq.export.lowering.weights import pack, unpack
from hfkdq.quantization import activation_ranges, quantize, quantized_modules
from hfkdq.quantization.layers import swap_in_
from hfkdq.quantization.records import set_enabled_, set_weight_bits_
from hfkdq.specs import QuantizationSpec
from tests import tiny
from tests.closeness import batch_for, doubled, in_double


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
        dict(symmetric=False),
        dict(weight_bits=2, symmetric=False, activation_bits=None),
        dict(weight_bits=4, weight_mapping="kmeans"),
        dict(weight_bits=4, weight_mapping="power_of_two", activation_bits=16),
        dict(weight_bits=6, weight_mapping="power_law", symmetric=False, activation_bits=None),
        dict(weight_bits=16, storage_dtype="bfloat16", activation_bits=4),
        dict(weight_bits=3, storage_dtype="float16", activation_mapping="power_law"),
        dict(attention=True),
    ],
)
@torch.no_grad()
def test_computes_what_the_fake_quantizers_compute(make, spec):
    if spec.get("attention") and make is tiny.resnet:
        pytest.skip("a ResNet has no attention")
    model = calibrated(make, **spec)
    batch = tiny.batch(model, seed=9)
    expected = model(**batch).logits
    assert (make()(**batch).logits - expected).abs().max() > 1e-3  # quantization is there to be seen
    floats = make()(**batch).logits
    model, batch = (
        doubled(model),
        batch_for(doubled(model), batch),
    )  # where no sum is so near to a tie that it rounds both ways
    with in_double(model):
        expected = model(**batch).logits
        assert (floats - expected).abs().max() > 1e-3
        assert lower_quantizers_(model) == sum(isinstance(m, (nn.Linear, Conv1D)) for m in make().modules())
        torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=2e-6)
    assert not quantized_modules(model)


@pytest.mark.parametrize("target", ["onnxruntime", "standard"])
@pytest.mark.parametrize("symmetric", [True, False])
@torch.no_grad()
def test_groups_and_smoothed_inputs_compute_the_same(target, symmetric):
    model = tiny.bert()
    spec = QuantizationSpec(weight_bits=4, group_size=32, symmetric=symmetric)
    quantize(model, spec, [tiny.batch(model)], smoothing=0.5)
    batch, plain, model = tiny.batch(model, seed=9), model(**tiny.batch(model, seed=9)).logits, doubled(model)
    with in_double(model):
        expected = model(**batch).logits
        assert expected.dtype == torch.float64
        assert (expected - plain).abs().max() < 0.1 * plain.abs().max()
        lower_quantizers_(model, target=target)
        torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_are_packed_low_bits_first(bits):
    codes = torch.randint(0, 2**bits, (3, 7), generator=torch.Generator().manual_seed(0))
    packed = pack(codes, bits)
    assert packed.shape == (3, -(-7 * bits // 8))
    assert packed[0, 0] == sum(int(codes[0, i]) << (bits * i) for i in range(8 // bits))
    assert torch.equal(unpack(packed, bits)[:, :7], codes.float())


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
    assert table.stored.packed.dtype == linear.weight.packed.dtype == torch.int8
    assert torch.equal(linear.weight.values().t(), weight)
    assert torch.equal(table(torch.arange(len(rows))), rows)
    assert linear.weight.packed.int().abs().amax(1).eq(127).all()


@pytest.mark.parametrize(
    "spec",
    [
        dict(),
        dict(weight_bits=4),
        dict(weight_bits=4, activation_bits=None),
        dict(weight_bits=2, group_size=32, activation_bits=None),
        dict(weight_bits=16, storage_dtype="float16", activation_bits=None),
    ],
    ids=str,
)
def test_a_model_may_ask_a_layer_for_the_type_of_its_weight(spec):
    """Mamba 2 gives its head what it reads in that type, others on that device."""
    model = calibrated(tiny.bert, **spec)
    lower_quantizers_(model)
    layers = [module for name, module in model.named_modules() if name.endswith((".query", ".dense"))]
    assert {(layer.weight.dtype, layer.weight.device.type) for layer in layers} == {(torch.float32, "cpu")}


def test_ranges_are_taken_over():
    model = calibrated(tiny.vit)
    ranges = activation_ranges(model)
    lower_quantizers_(model)
    assert ranges
    for name, expected in ranges.items():
        grid = model.get_submodule(name).input
        assert (grid.scale.item(), grid.zero_point.item()) == tuple(expected.values())


def test_excluded_modules_stay():
    model = calibrated(tiny.bert, exclude_modules=["classifier", "word_embeddings"])
    lower_quantizers_(model)
    assert type(model.classifier) is nn.Linear
    assert type(model.bert.embeddings.word_embeddings) is nn.Embedding


def test_a_model_from_the_middle_of_its_training_is_refused():
    off, wide = calibrated(tiny.bert), calibrated(tiny.bert, weight_bits=4)
    set_enabled_(off, False)
    with pytest.raises(ValueError, match="fake quantizers that are off"):
        lower_quantizers_(off)
    set_weight_bits_(quantized_modules(wide)["bert.pooler.dense"], 8)
    with pytest.raises(ValueError, match=r"bert.pooler.dense has weights of 8 bits, on the way to the 4"):
        lower_quantizers_(wide)


def convolution(make, **spec):
    """A quantized convolution whose input's range is known."""
    spec = QuantizationSpec(**spec)
    conv = swap_in_(make(), "conv", spec.scheme("conv", make()), spec)
    inputs = torch.randn(2, conv.in_channels, 23)
    conv.train()(inputs)
    return conv.eval(), inputs


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv1d(32, 6, 3, stride=2, bias=False),
        lambda: nn.Conv1d(32, 6, 4, padding=3, dilation=2),
        lambda: nn.Conv1d(40, 6, 2, stride=3, padding=1),
        lambda: nn.Conv1d(32, 6, 1),
        lambda: weight_norm(nn.Conv1d(32, 6, 3)),
    ],
)
@pytest.mark.parametrize("spec", [{}, dict(symmetric=False), dict(per_channel=False), dict(weight_bits=4)], ids=str)
@torch.no_grad()
def test_a_convolution_is_a_product_of_windows(make, spec):
    conv, inputs = convolution(make, **spec)
    assert IntegerConv1d.fits(conv)
    for values in (inputs, inputs[:1, :, :-4], 3 * inputs):
        torch.testing.assert_close(IntegerConv1d(conv)(values), conv(values), rtol=0, atol=3e-6)


@pytest.mark.parametrize(
    ("make", "spec"),
    [
        (lambda: nn.Conv1d(31, 6, 3), {}),
        (lambda: nn.Conv1d(64, 64, 3, groups=2), {}),
        (lambda: nn.Conv1d(32, 6, 3, padding=1, padding_mode="circular"), {}),
        (lambda: nn.Conv1d(32, 6, 3, padding="same"), {}),
        (lambda: nn.Conv1d(32, 6, 3), dict(activation_bits=None)),
        (lambda: nn.Conv1d(32, 6, 3), dict(activation_bits=4)),
        (lambda: nn.Conv1d(32, 6, 3), dict(weight_bits=4, weight_mapping="kmeans")),
        (lambda: nn.Conv1d(32, 6, 3), dict(weight_bits=4, group_size=32)),
        (lambda: nn.Conv1d(32, 6, 3), dict(weight_bits=16, storage_dtype="bfloat16")),
    ],
)
@torch.no_grad()
def test_other_convolutions_get_float_weights(make, spec):
    conv, inputs = convolution(make, **spec)
    assert not IntegerConv1d.fits(conv)
    torch.testing.assert_close(FoldedConv(conv)(inputs), conv(inputs), rtol=0, atol=3e-6)
