# SPDX-License-Identifier: Apache-2.0
"""Single quantized modules against integer arithmetic and the published gradients."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hfkdq import QuantizationSpec
from hfkdq.quantization import QuantizedEmbedding, QuantizedLinear
from hfkdq.quantization.activations import make_activation_quantizer
from hfkdq.quantization.layers import swap_in_
from hfkdq.specs import QuantizationScheme


def quantized(module, **spec):
    spec = QuantizationSpec(**spec)
    return swap_in_(module, "layer", spec.scheme("layer", module), spec)


def quantizer_of(estimator="learned", **settings):
    return make_activation_quantizer(QuantizationScheme(range_estimator=estimator, **settings))


def linear(features=8, outputs=6, **spec):
    return quantized(nn.Linear(features, outputs), **spec)


def codes_of(values, scale, zero_point):
    """The uint8 codes of `values`, computed in integers after one rounding."""
    return ((values * (1.0 / scale)).round().long() + zero_point).clamp(0, 255)


@pytest.mark.parametrize("estimator", QuantizationSpec.RANGE_ESTIMATORS)
@pytest.mark.parametrize("training", [True, False])
def test_linear_equals_integer_arithmetic_exactly(estimator, training):
    layer = linear(range_estimator=estimator).train(training)
    codes = torch.randint(-127, 128, layer.weight.shape)
    codes[:, 0] = 127
    channel_scale = 2.0 ** torch.tensor([-9, -8, -7, -6, -5, -4]).float()
    layer.weight.data = codes * channel_scale[:, None]
    layer.bias.data = torch.arange(6.0)
    middle = 128 if estimator == "pact" else 100
    layer.activation_quantizer.set_range(2.0**-5, middle)
    inputs = torch.randn(5, 8) * 4
    if training and estimator not in ("learned", "pact"):
        layer.activation_quantizer._update = lambda values: None  # hold the range, to compare with it
    integers = codes_of(inputs, 2.0**-5, middle)
    assert (integers.min(), integers.max()) == (0, 255), "the input should reach both ends of the range"
    expected = ((integers - middle) @ codes.T) * channel_scale * 2.0**-5 + torch.arange(6.0)
    assert torch.equal(layer(inputs), expected)
    assert torch.equal(layer.integer_weight(), codes.to(torch.int8))
    assert torch.equal(layer.weight_scale(), channel_scale)


def test_codes_stay_within_127_and_reproduce_the_forward_pass():
    layer = linear(64, 50, activation_bits=None)
    codes, scale = layer.integer_weight(), layer.weight_scale()
    assert codes.dtype == torch.int8
    assert codes.abs().amax(dim=1).eq(127).all()
    assert torch.equal(layer(torch.eye(64)) - layer.bias, (codes.float() * scale[:, None]).T + layer.bias - layer.bias)


def test_weights_are_rounded_to_even_codes_of_their_own_channel():
    layer = linear(4, 2, activation_bits=None)
    layer.weight.data = torch.tensor([[127.0, 0.5, 1.5, -2.5], [0.0, 0.0, 0.0, 0.0]])
    layer.bias.data.zero_()
    out = layer(torch.eye(4))
    assert out[:, 0].tolist() == [127.0, 0.0, 2.0, -2.0]
    assert out[:, 1].tolist() == [0.0] * 4, "an empty channel stays empty, without NaN"


def test_straight_through_gradients():
    layer = linear()
    layer.activation_quantizer.set_range(0.02, 100)  # covers -2.0 to 3.1
    layer.eval()
    inputs = torch.tensor([[-3.0, -1.0, 0.0, 0.5, 1.0, 2.0, 3.0, 4.0]], requires_grad=True)
    layer(inputs).sum().backward()
    weight = layer.integer_weight().float() * layer.weight_scale()[:, None]
    inside = torch.tensor([0.0, 1, 1, 1, 1, 1, 1, 0])
    torch.testing.assert_close(inputs.grad, weight.sum(0, keepdim=True) * inside)
    seen = (codes_of(inputs.detach(), 0.02, 100) - 100) * 0.02
    torch.testing.assert_close(layer.weight.grad, seen.expand(6, -1))


def test_learned_gradients_follow_lsq():
    quantizer = quantizer_of().train()
    scale, offset = torch.tensor(0.03), torch.tensor(-2.02)
    quantizer.load_state({"scale": 0.03, "offset": -2.02})
    inputs = torch.linspace(-3, 8, 40).reshape(5, 8).requires_grad_()
    upstream = torch.randn(5, 8)
    out = quantizer(inputs)
    (out * upstream).sum().backward()

    zero_point = (-offset / scale).round()
    codes = (inputs.detach() * (1 / scale)).round() + zero_point
    below, above = codes < 0, codes > 255
    assert below.any()
    assert above.any()
    residual = (inputs.detach() / scale).round() - inputs.detach() / scale
    clipped_code = codes.clamp(0, 255) - zero_point - offset / scale
    factor = 1 / math.sqrt(255 * 8)
    outside = below | above
    torch.testing.assert_close(
        quantizer.scale.grad, (torch.where(outside, clipped_code, residual) * upstream).sum() * factor,
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip
    torch.testing.assert_close(quantizer.offset.grad, (upstream * outside).sum() * factor)
    torch.testing.assert_close(inputs.grad, upstream * ~outside)
    assert torch.equal(out, quantizer.eval()(inputs)), "training and evaluation compute the same numbers"


def test_learned_gradient_does_not_depend_on_micro_batches():
    whole, parts = quantizer_of().train(), quantizer_of().train()
    inputs = torch.randn(8, 16)
    for quantizer in (whole, parts):
        quantizer.set_range(0.01, 120)
    whole(inputs).square().sum().backward()
    for part in inputs.split(2):
        parts(part).square().sum().backward()
    torch.testing.assert_close(whole.scale.grad, parts.scale.grad)


def test_learned_range_is_brought_back_when_the_optimizer_leaves_it():
    quantizer = quantizer_of().train()
    quantizer.load_state({"scale": -0.5, "offset": 3.0})
    scale, zero_point = quantizer.qparams()
    assert scale > 0
    assert zero_point == 0
    assert quantizer(torch.ones(2, 2)).isfinite().all()
    assert quantizer.scale > 0
    assert quantizer.offset == 0


def test_moving_average_and_min_max():
    first, second = torch.tensor([[-1.0, 4.1]]), torch.tensor([[-0.5, 2.1]])
    average, widest = quantizer_of("moving_average", averaging_constant=0.25), quantizer_of("min_max")
    for quantizer in (average, widest):
        quantizer.train()(first)
        assert (quantizer.minimum.item(), quantizer.maximum.item()) == pytest.approx((-1.0, 4.1))
        quantizer(second)
    assert (average.minimum.item(), average.maximum.item()) == pytest.approx((-0.875, 3.6))
    assert (widest.minimum.item(), widest.maximum.item()) == pytest.approx((-1.0, 4.1))
    scale, zero_point = widest.qparams()
    assert scale.item() == pytest.approx(5.1 / 255)
    assert zero_point.item() == 50
    before = widest.qparams()[0].clone()
    widest.eval()(torch.full((1, 2), 100.0))
    assert torch.equal(widest.qparams()[0], before), "evaluation moves no range"


@pytest.mark.parametrize("values", [torch.full((2, 3), 5.0), torch.full((2, 3), -5.0), torch.zeros(2, 3)])
@pytest.mark.parametrize("estimator", QuantizationSpec.RANGE_ESTIMATORS)
def test_range_includes_zero(values, estimator):
    quantizer = quantizer_of(estimator).train()
    torch.testing.assert_close(quantizer(values), values)
    assert quantizer.eval()(torch.zeros(1)).item() == 0.0


@pytest.mark.parametrize("estimator", QuantizationSpec.RANGE_ESTIMATORS)
def test_passes_through_until_it_has_a_range(estimator):
    quantizer = quantizer_of(estimator).eval()
    values = torch.randn(3, 4)
    assert quantizer(values) is values
    assert not quantizer.initialized
    quantizer.train()(torch.empty(0, 4))
    assert not quantizer.initialized, "an empty batch has no range"
    quantizer.set_range(0.1, 128)
    scale, zero_point = quantizer.qparams()
    assert (scale.item(), zero_point.item()) == (torch.tensor(0.1).item(), 128)


@pytest.mark.parametrize("estimator", QuantizationSpec.RANGE_ESTIMATORS)
def test_any_range_is_taken_over_exactly(estimator):
    quantizer = quantizer_of(estimator).eval()
    for zero_point in [0, 128] * 200 if estimator == "pact" else range(0, 256, 5):
        # A scale that such a quantizer can have: a bound in float32 over the steps to it.
        scale = (torch.rand(()) * 5 / (127 if zero_point == 128 else 255)).item()
        quantizer.set_range(scale, zero_point)
        assert [value.item() for value in quantizer.qparams()] == [scale, zero_point]


@pytest.mark.parametrize("per_channel", [True, False])
def test_embedding_quantizes_rows_with_the_scale_of_the_table_or_their_own(per_channel):
    plain = nn.Embedding(10, 4, padding_idx=0)
    plain.weight.data[9, 0] = 12.7
    table = quantized(copy.deepcopy(plain), per_channel=per_channel)
    ids = torch.tensor([[1, 2, 0]])
    scale = table.weight_scale()
    if per_channel:
        torch.testing.assert_close(scale[1:], plain.weight[1:].abs().amax(dim=1).detach() / 127)
        scale = scale[ids].unsqueeze(-1)
    else:
        assert scale.item() == pytest.approx(0.1)
    assert isinstance(table, QuantizedEmbedding)
    assert torch.equal(table(ids), (plain(ids) * (1 / scale)).round() * scale)
    assert torch.equal(table(ids), table.integer_weight()[ids] * scale)
    table(ids).sum().backward()
    assert table.weight.grad[:3, 0].tolist() == [0.0, 1.0, 1.0], "the padding row gets no gradient"


@pytest.mark.parametrize("estimator", QuantizationSpec.RANGE_ESTIMATORS)
def test_copy_and_pickle(estimator):
    layer = linear(range_estimator=estimator).train()
    inputs = torch.randn(4, 8)
    layer(inputs)
    layer.eval()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is QuantizedLinear
        assert twin.quantization_spec == layer.quantization_spec
        assert torch.equal(twin(inputs), layer(inputs))


def test_state_dict_is_that_of_a_plain_layer():
    layer, plain = linear(range_estimator="learned"), nn.Linear(8, 6)
    assert list(layer.state_dict()) == list(plain.state_dict())
    assert layer.load_state_dict(plain.state_dict(), strict=True).missing_keys == []
    assert torch.equal(layer.weight, plain.weight)


@pytest.mark.parametrize("estimator", QuantizationSpec.RANGE_ESTIMATORS)
def test_quantizes_in_float32_under_autocast_and_in_bf16(estimator):
    layer = linear(range_estimator=estimator).train()
    inputs = torch.randn(64, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(inputs)
        out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert layer.weight.grad.isfinite().all()
    assert all(tensor.dtype != torch.bfloat16 for tensor in layer.activation_quantizer.state_tensors())
    quantizer = layer.activation_quantizer.eval()
    assert torch.equal(quantizer(inputs), quantizer(inputs.float()).bfloat16()), "rounded once, at the end"
    scale = quantizer.qparams()[0].clone()
    layer.bfloat16().eval()
    assert layer.weight.dtype == torch.bfloat16
    assert layer(inputs).dtype == torch.bfloat16
    assert torch.equal(quantizer.qparams()[0], scale), "ranges keep their precision"


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("estimator", ["moving_average", "learned"])
def test_gradient_checkpointing_observes_a_batch_once(estimator, reentrant):
    layer = linear(range_estimator=estimator).train()
    twin = copy.deepcopy(layer)
    for _ in range(2):
        inputs = torch.randn(4, 8, requires_grad=True)
        layer(inputs).square().sum().backward()
        checkpoint(twin, inputs, use_reentrant=reentrant).square().sum().backward()
    state = [quantizer.state_tensors() for quantizer in (layer.activation_quantizer, twin.activation_quantizer)]
    assert all(torch.equal(a, b) for a, b in zip(*state, strict=True))
    assert torch.equal(layer.weight.grad, twin.weight.grad)


@pytest.mark.parametrize("estimator", QuantizationSpec.RANGE_ESTIMATORS)
def test_traces_to_fused_operators_with_constant_scales(estimator):
    layer = linear(range_estimator=estimator).train()
    inputs = torch.randn(4, 8)
    layer(inputs)
    traced = torch.jit.trace(layer.eval(), inputs)
    fake = [node for node in traced.inlined_graph.nodes() if "fake_quantize" in node.kind()]
    assert [node.kind().split("::")[1] for node in fake] == [
        "fake_quantize_per_tensor_affine",
        "fake_quantize_per_channel_affine",
    ]
    assert not {"aten::aminmax", "aten::div", "aten::round"} & {n.kind() for n in traced.inlined_graph.nodes()}
    expected = layer(inputs)
    assert torch.equal(traced(inputs), expected)
    if estimator != "learned":
        layer.activation_quantizer.set_range(5.0, 0)
        assert torch.equal(traced(inputs), expected), "the traced scale is a constant"
