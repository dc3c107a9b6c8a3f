# SPDX-License-Identifier: Apache-2.0
"""Activations on their grids against loops over single numbers, and the gradients against the published formulas."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from hfkdq import QuantizationSpec
from hfkdq.quantization.activations import make_activation_quantizer
from hfkdq.specs import QuantizationScheme
from tests.quantization import naive

OBSERVED = ("moving_average", "min_max", "percentile", "mse")


def quantizer_of(estimator="learned", **settings):
    return make_activation_quantizer(QuantizationScheme(range_estimator=estimator, **settings))


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("estimator", "mapping"),
    [(name, "linear") for name in QuantizationSpec.RANGE_ESTIMATORS] + [(name, "power_law") for name in OBSERVED],
)
def test_forward_equals_the_integer_reference_exactly(estimator, symmetric, bits, mapping):
    settings = dict(activation_bits=bits, activation_symmetric=symmetric, activation_mapping=mapping)
    quantizer = quantizer_of(estimator, **settings).eval()
    # Numbers whose roots are exact in float32, so that both ways of taking one agree.
    values = (torch.randn(3, 100) * 2**9).round() / 2**8
    values = values * values.abs() if mapping == "power_law" else values
    middle = 2 ** (bits - 1)
    for zero_point in {middle} if symmetric else {0, middle} if estimator == "pact" else {0, middle, 2**bits // 3}:
        scale = 3.0 / 2**bits
        quantizer.set_range(scale, zero_point)
        codes, expected = naive.quantize_activation(values, *(v.item() for v in quantizer.qparams()), bits, mapping)
        assert (codes.min(), codes.max()) == (0, 2**bits - 1), "the values should reach both ends"
        assert torch.equal(quantizer(values), expected)
        if estimator not in OBSERVED:
            found = quantizer.train()(values)
            assert found.requires_grad
            assert torch.equal(found, expected), "training and evaluation compute the same numbers"
            quantizer.eval()


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("estimator", QuantizationSpec.RANGE_ESTIMATORS)
def test_symmetric_activations_have_their_zero_in_the_middle(bits, estimator):
    quantizer = quantizer_of(estimator, activation_bits=bits, activation_symmetric=True, percentile=100.0).train()
    values = torch.randn(4, 200).clamp(-1, 3)
    values[0, :2] = torch.tensor([3.0, -1.0])
    quantizer(values)
    scale, zero_point = quantizer.qparams()
    assert zero_point.item() == 2 ** (bits - 1)
    if estimator != "mse":
        assert scale.item() == pytest.approx(3.0 / (2 ** (bits - 1) - 1))
    only_positive = quantizer_of(estimator, activation_bits=bits, activation_symmetric=True).train()
    only_positive(values.abs())
    assert only_positive.qparams()[1].item() == 2 ** (bits - 1)


def test_symmetric_learned_gradients_follow_lsq():
    quantizer = quantizer_of(activation_symmetric=True, activation_bits=4).train()
    quantizer.set_range(0.25, 8)
    assert [name for name, _ in quantizer.named_parameters()] == ["scale"], "there is no offset to train"
    inputs = torch.linspace(-4, 4, 50).reshape(5, 10).requires_grad_()
    upstream = torch.randn(5, 10)
    (quantizer(inputs) * upstream).sum().backward()
    total = 0.0
    for value, gradient in zip(inputs.flatten().tolist(), upstream.flatten().tolist(), strict=True):
        ratio = value / 0.25
        total += gradient * (-8 if round(ratio) < -8 else 7 if round(ratio) > 7 else round(ratio) - ratio)
    assert quantizer.scale.grad.item() == pytest.approx(total / math.sqrt(15 * 10), rel=1e-4)
    codes = (inputs.detach() / 0.25).round()
    assert torch.equal(inputs.grad, upstream * ((codes >= -8) & (codes <= 7)))


@pytest.mark.parametrize("symmetric", [True, False])
def test_learned_gradients_are_slopes_where_everything_is_clipped(symmetric):
    quantizer = quantizer_of(activation_symmetric=symmetric).train()
    quantizer.set_range(0.25, 128 if symmetric else 64)
    start = {name: parameter.detach().clone() for name, parameter in quantizer.named_parameters()}
    inputs = torch.tensor([[500.0, 600.0, -700.0]])
    quantizer(inputs).sum().backward()
    for name, parameter in quantizer.named_parameters():
        sums = []
        for step in (0.25, -0.25):  # a whole step of the grid, so that the zero point needs no rounding
            scale, offset = quantizer.scale.item(), start.get("offset", torch.tensor(-32.0)).item()
            low, high = offset, offset + 255 * scale
            if name == "offset":
                low, high = low + step, high + step
            else:
                low, high = (-128 * (scale + step), 127 * (scale + step)) if symmetric else (low, high + 255 * step)
            sums.append(2 * high + low)
        slope = (sums[0] - sums[1]) / 0.5
        assert parameter.grad.item() == pytest.approx(slope / math.sqrt(255 * 3), rel=1e-5), name


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_clipping_bound_follows_pact(signed, bits):
    quantizer = quantizer_of("pact", activation_bits=bits).train()
    steps = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    quantizer.set_range(2.0 / steps, 2 ** (bits - 1) if signed else 0)
    inputs = torch.linspace(-4.0, 4.0, 64).reshape(4, 16).requires_grad_()
    upstream = torch.randn(4, 16)
    (quantizer(inputs) * upstream).sum().backward()
    low = -2.0 - 2.0 / steps if signed else 0.0
    above, below = inputs.detach() > 2.0, inputs.detach() < low
    lowest = (steps + 1) / steps if signed else 0.0  # the lower end moves this much with alpha
    expected = (upstream * above).sum() - lowest * (upstream * below).sum()
    torch.testing.assert_close(quantizer.alpha.grad, expected)
    assert torch.equal(inputs.grad, upstream * ~(above | below))
    # Where everything is clipped the function has a slope, and it is this one.
    outside, sums = inputs.detach()[above | below], []
    for step in (0.125, -0.125):
        with torch.no_grad():
            quantizer.alpha.fill_(2.0 + step * 0.1)
            sums.append((quantizer(outside) * upstream[above | below]).sum())
    torch.testing.assert_close((sums[0] - sums[1]) / 0.025, expected, rtol=1e-3, atol=1e-3)


def test_clipping_bound_starts_at_the_largest_size_and_finds_its_sides():
    for values, alpha, zero_point in ((torch.tensor([[0.0, 3.0]]), 3.0, 0), (torch.tensor([[-5.0, 3.0]]), 5.0, 128)):
        quantizer = quantizer_of("pact").train()
        quantizer(values)
        assert (quantizer.alpha.item(), quantizer.qparams()[1].item()) == (alpha, zero_point)
        with torch.no_grad():
            quantizer.alpha.fill_(-1.0)
        quantizer(values).sum().backward()
        assert quantizer.alpha > 0
        assert quantizer.alpha.grad.isfinite()


@pytest.mark.parametrize("mapping", ["linear", "power_law"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_observed_gradient_passes_inside_the_range(mapping, symmetric):
    quantizer = quantizer_of("min_max", activation_mapping=mapping, activation_symmetric=symmetric).train()
    quantizer.set_range(1 / 32, 128 if symmetric else 40)
    quantizer.frozen = True
    inputs, upstream = (torch.randn(8, 50) * 9).requires_grad_(), torch.randn(8, 50)
    (quantizer(inputs) * upstream).sum().backward()
    low, high = (-128 / 32 - 1 / 64, 127 / 32 + 1 / 64) if symmetric else (-40 / 32 - 1 / 64, 215 / 32 + 1 / 64)
    if mapping == "power_law":
        low, high = -(low**2), high**2
    inside = (inputs.detach() > low) & (inputs.detach() < high)
    assert 0 < inside.sum() < inside.numel()
    assert torch.equal(inputs.grad, upstream * inside)


@pytest.mark.parametrize("bits", [8, 4])
def test_percentile_and_mse_follow_their_range(bits):
    first, second = torch.randn(10, 100), torch.randn(10, 100) * 2
    for name in ("percentile", "mse"):
        quantizer = quantizer_of(name, activation_bits=bits, averaging_constant=0.25, percentile=98.0).train()
        ranges = []
        for values in (first, second):
            quantizer(values)
            ranges.append((quantizer.minimum.item(), quantizer.maximum.item()))
        alone = quantizer_of(name, activation_bits=bits, percentile=98.0).train()
        alone(second)
        for end, value in enumerate((alone.minimum.item(), alone.maximum.item())):
            assert ranges[1][end] == pytest.approx(0.75 * ranges[0][end] + 0.25 * value)
        if name == "percentile":
            ordered = first.flatten().sort().values
            assert ranges[0] == (ordered[20].item(), ordered[979].item())
        else:
            widest = quantizer_of("min_max", activation_bits=bits).train()
            widest(second)
            assert (alone.eval()(second) - second).square().sum() <= (widest.eval()(second) - second).square().sum()
        scale, zero_point = quantizer.qparams()
        assert scale.item() == pytest.approx((ranges[1][1] - ranges[1][0]) / (2**bits - 1))
        assert zero_point.item() == round(-ranges[1][0] / scale.item())


@pytest.mark.parametrize("estimator", QuantizationSpec.RANGE_ESTIMATORS)
def test_frozen_range_stays(estimator):
    quantizer = quantizer_of(estimator).train()
    quantizer(torch.randn(4, 8))
    quantizer.frozen = True
    before = [tensor.clone() for tensor in quantizer.state_tensors()]
    quantizer(torch.randn(4, 8) * 100)
    assert all(torch.equal(a, b) for a, b in zip(before, quantizer.state_tensors(), strict=True))


@pytest.mark.parametrize("settings", [{}, {"activation_symmetric": True}, {"activation_bits": 4}])
@pytest.mark.parametrize("estimator", QuantizationSpec.RANGE_ESTIMATORS)
def test_state_continues_exactly(estimator, settings):
    quantizer, other = quantizer_of(estimator, **settings).train(), quantizer_of(estimator, **settings).train()
    quantizer(torch.randn(4, 8))
    state = zip(quantizer.state_names, quantizer.state_tensors(), strict=True)
    other.load_state({name: tensor.item() for name, tensor in state})
    more = torch.randn(4, 8)
    assert torch.equal(quantizer(more), other(more))
    assert [v.item() for v in quantizer.qparams()] == [v.item() for v in other.qparams()]
    assert quantizer.state_dict() == {}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("estimator", QuantizationSpec.RANGE_ESTIMATORS)
def test_gradient_checkpointing_observes_a_batch_once(estimator, reentrant):
    quantizer = quantizer_of(estimator).train()
    twin = copy.deepcopy(quantizer)
    for _ in range(2):
        inputs = torch.randn(4, 8, requires_grad=True)
        quantizer(inputs).square().sum().backward()
        checkpoint(twin, inputs, use_reentrant=reentrant).square().sum().backward()
    pairs = list(zip(quantizer.state_tensors(), twin.state_tensors(), strict=True))
    pairs += [(a.grad, b.grad) for a, b in zip(quantizer.parameters(), twin.parameters(), strict=True)]
    assert all(torch.equal(a, b) for a, b in pairs)


def test_weight_only_schemes_have_none():
    assert make_activation_quantizer(QuantizationScheme(activation_bits=None)) is None


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
