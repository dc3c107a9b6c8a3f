# SPDX-License-Identifier: Apache-2.0
"""Weights on their grids against loops over single numbers, and the gradients against the published formulas."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from hfkdq.quantization.weights import WeightQuantizer
from hfkdq.specs import QuantizationScheme
from tests.quantization import naive

BLOCKS = {"tensor": 1, "channel": 4, "group": 8}  # of a weight of 4 rows and 64 columns


def quantizer_of(weight, bits=8, symmetric=True, mapping="linear", sharing="channel", **settings):
    how = {"per_channel": sharing != "tensor", "group_size": 32 if sharing == "group" else None}
    kinds = {name: settings.pop(name) for name in ("transposed", "gates", "name") if name in settings}
    scheme = QuantizationScheme(weight_bits=bits, symmetric=symmetric, weight_mapping=mapping, **how, **settings)
    return WeightQuantizer(scheme, weight, **kinds)


def weight_of(rows=4, columns=64, square=False):
    """Normal weights whose sums, and for `square` whose roots, are exact in float32."""
    weight = (torch.randn(rows, columns) * torch.logspace(-1, 0.5, rows)[:, None] * 2**10).round() / 2**10
    weight[0, :3] = torch.tensor([0.0, -0.5, 0.25])
    return weight * weight.abs() if square else weight


@pytest.mark.parametrize("sharing", BLOCKS)
@pytest.mark.parametrize(("bits", "symmetric", "mapping"), naive.ALLOWED)
def test_forward_equals_the_integer_reference_exactly(bits, symmetric, mapping, sharing):
    weight = weight_of(square=mapping == "power_law")
    # The mean of roots is not exact in float32.
    how = {"weight_estimator": "min_max"} if mapping == "power_law" else {}
    quantizer = quantizer_of(weight, bits, symmetric, mapping, sharing, **how).eval()
    settings = {"estimator": how.get("weight_estimator"), "codebook": getattr(quantizer, "codebook", None)}
    codes, values = naive.quantize_weight(weight, bits, symmetric, mapping, blocks=BLOCKS[sharing], **settings)
    assert torch.equal(quantizer.codes(weight).int(), codes.int())
    assert torch.equal(quantizer(weight), values)
    assert quantizer.codes(weight).dtype == (torch.int8 if symmetric and mapping != "kmeans" else torch.uint8)
    assert quantizer.qparams(weight)[0].shape[:2] == {"tensor": (1, 1), "channel": (4, 1), "group": (4, 2)}[sharing]
    transposed = quantizer_of(weight.t(), bits, symmetric, mapping, sharing, transposed=True, **how).eval()
    assert torch.equal(transposed(weight.t()), values.t())
    assert torch.equal(transposed.codes(weight.t()).int(), codes.t().int())
    if sharing == "channel":
        gates = quantizer_of(weight, bits, symmetric, mapping, "channel", gates=2, **how).eval()
        settings["codebook"] = getattr(gates, "codebook", None)
        assert torch.equal(
            gates(weight), naive.quantize_weight(weight, bits, symmetric, mapping, blocks=2, **settings)[1]
        )


@pytest.mark.parametrize(("bits", "symmetric", "mapping"), naive.ALLOWED)
@pytest.mark.parametrize("training", [True, False])
def test_gradient_goes_to_the_weights_unchanged(bits, symmetric, mapping, training):
    for estimator in ("min_max", "percentile", "mse", *(("mean_abs",) if symmetric else ())):
        for sharing in BLOCKS:
            weight, upstream = weight_of().requires_grad_(), torch.randn(4, 64)
            how = {} if mapping == "kmeans" else {"weight_estimator": estimator, "percentile": 90.0}
            quantizer = quantizer_of(weight, bits, symmetric, mapping, sharing, **how).train(training)
            (grad,) = torch.autograd.grad(quantizer(weight), weight, upstream)
            assert torch.equal(grad, upstream), (estimator, sharing)


@pytest.mark.parametrize("bits", [8, 6, 4, 3, 2])
@pytest.mark.parametrize("sharing", ["tensor", "channel"])
def test_learned_scale_follows_lsq(bits, sharing):
    weight, upstream, largest = weight_of().requires_grad_(), torch.randn(4, 64), 2 ** (bits - 1) - 1
    quantizer = quantizer_of(weight, bits, sharing=sharing, weight_estimator="learned").train()
    start = weight.detach().abs().reshape(BLOCKS[sharing], -1)
    if bits > 2:
        torch.testing.assert_close(
            quantizer.scale.flatten(), 2 * start.sum(dim=1) / (start > 0).sum(dim=1) / largest**0.5
        )
    with torch.no_grad():
        quantizer.scale.copy_(start.amax(dim=1).mul(0.6 / largest).reshape(quantizer.scale.shape))
    out = quantizer(weight)
    out.backward(upstream)

    blocks, ends = weight.detach().reshape(BLOCKS[sharing], -1), upstream.reshape(BLOCKS[sharing], -1)
    for row, above, scale, found in zip(
        blocks, ends, quantizer.scale.flatten(), quantizer.scale.grad.flatten(), strict=True
    ):
        total, clipped = 0.0, 0
        for value, gradient in zip(row.tolist(), above.tolist(), strict=True):
            ratio = value / scale.item()
            outside = abs(ratio) > largest
            clipped += outside
            total += gradient * (largest * (1 if ratio > 0 else -1) if outside else round(ratio) - ratio)
        assert 0 < clipped < len(row)
        assert found.item() == pytest.approx(total / (len(row) * largest) ** 0.5, rel=1e-3, abs=1e-4)
    scales = quantizer.scale.detach().reshape(-1, 1)
    inside = (blocks / scales).abs() <= largest
    torch.testing.assert_close(weight.grad, upstream * inside.reshape(4, 64))
    codes = (blocks * (1 / scales)).round().clamp(-largest, largest)
    assert torch.equal(out, (codes * scales).reshape(4, 64))
    assert torch.equal(quantizer.codes(weight), codes.reshape(4, 64).to(torch.int8))


def test_learned_scale_gradient_is_the_slope_where_everything_is_clipped():
    weight = torch.tensor([[5.0, -6.0, 7.0]])
    quantizer = quantizer_of(weight, 4, weight_estimator="learned").train()
    with torch.no_grad():
        quantizer.scale.fill_(0.25)
    quantizer(weight)[0, :2].sum().backward()
    step, sums = 0.0625, []
    for sign in (1, -1):
        with torch.no_grad():
            quantizer.scale.fill_(0.25 + sign * step)
            sums.append(quantizer(weight)[0, :2].sum())
    slope = (sums[0] - sums[1]) / (2 * step)
    torch.testing.assert_close(quantizer.scale.grad.squeeze(), slope / (3 * 7) ** 0.5)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_learned_scale_is_brought_back_and_keeps_its_range_at_another_width(bits):
    weight = weight_of()
    quantizer = quantizer_of(weight, 8, weight_estimator="learned").train()
    reach = quantizer.scale.detach() * 127
    quantizer.set_bits(bits, weight)
    torch.testing.assert_close(quantizer.scale.detach() * quantizer.grid.high, reach)
    assert quantizer.codes(weight).abs().max() <= 2 ** (bits - 1) - 1
    with torch.no_grad():
        quantizer.scale.fill_(-1.0)
    quantizer(weight).sum().backward()
    assert (quantizer.scale > 0).all()
    assert quantizer.scale.grad.isfinite().all()


def test_codebook_follows_weights_in_training_until_it_is_frozen():
    weight = weight_of()
    quantizer = quantizer_of(weight, 2, mapping="kmeans").train()
    before = quantizer.codebook.clone()
    quantizer.eval()(weight * torch.randn_like(weight))
    assert torch.equal(quantizer.codebook, before), "evaluation moves nothing"
    quantizer.train()(weight * torch.randn_like(weight))
    assert not torch.equal(quantizer.codebook, before)
    quantizer.frozen, before = True, quantizer.codebook.clone()
    quantizer(weight * torch.randn_like(weight))
    assert torch.equal(quantizer.codebook, before)
    quantizer.set_bits(3, weight)
    assert len(quantizer.codebook) == 8


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_checkpointing_moves_a_codebook_once_and_draws_the_same_channels(reentrant, share):
    weight = weight_of(16).requires_grad_()
    twin = weight.detach().clone().requires_grad_()
    plain = quantizer_of(weight, 2, mapping="kmeans").train()
    plain.share = share
    again = copy.deepcopy(plain)
    for seed in range(2):
        with torch.no_grad():
            twin.copy_(weight.copy_(weight_of(16)))
        torch.manual_seed(seed)
        expected = plain(weight)
        torch.manual_seed(seed)
        found = checkpoint(again, twin, use_reentrant=reentrant)
        assert torch.equal(found, expected)
        expected.square().sum().backward()
        found.square().sum().backward()
    assert torch.equal(plain.codebook, again.codebook)
    assert torch.equal(weight.grad, twin.grad)


@pytest.mark.parametrize("sharing", ["tensor", "channel", "group"])
@pytest.mark.parametrize("transposed", [True, False])
def test_a_share_of_the_channels_is_quantized_in_training(sharing, transposed):
    weight = torch.randn(400, 32)
    weight = weight.t() if transposed else weight
    quantizer = quantizer_of(weight, 2, sharing=sharing, transposed=transposed).train()
    quantizer.share = 0.3
    whole = quantizer.eval()(weight)
    assert not torch.equal(whole, weight), "evaluation quantizes everything"
    torch.manual_seed(1)
    found = quantizer.train()(weight)
    rows = [t.t() if transposed else t for t in (weight, whole, found)]
    quantized = (rows[2] == rows[1]).all(dim=1)
    assert ((rows[2] == rows[0]).all(dim=1) | quantized).all()
    assert quantized.float().mean().item() == pytest.approx(0.3, abs=0.07)
    torch.manual_seed(1)
    assert torch.equal(quantizer(weight), found)
    assert not torch.equal(quantizer(weight), found)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("symmetric", "estimator"), [(True, "min_max"), (False, "min_max"), (True, "learned")])
def test_scales_are_rounded_to_the_storage_precision(dtype, symmetric, estimator):
    weight = weight_of()
    settings = {"weight_estimator": estimator}
    quantizer = quantizer_of(weight, 4, symmetric, storage_dtype=dtype, **settings)
    full = quantizer_of(weight, 4, symmetric, **settings).qparams(weight)[0]
    scale, zero_point = quantizer.qparams(weight)
    assert scale.dtype == torch.float32
    assert torch.equal(scale, full.to(getattr(torch, dtype)).float())
    assert not torch.equal(scale, full)
    codes = quantizer.codes(weight).float()
    zero = 0.0 if zero_point is None else zero_point.reshape(4, 1)
    assert torch.equal(quantizer(weight), (codes - zero) * scale.reshape(4, 1))


def test_forward_and_codes_agree_where_float16_scales_are_coarse():
    weight = torch.linspace(-1, 1, 64)[None] * torch.tensor([[127 * 8.9e-8], [127 * 3e-7], [1.0]])
    quantizer = quantizer_of(weight, storage_dtype="float16")
    assert torch.equal(quantizer(weight), quantizer.codes(weight).float() * quantizer.qparams(weight)[0].reshape(3, 1))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits_keep_weights_in_the_storage_precision(dtype):
    weight, upstream = torch.randn(4, 64, requires_grad=True), torch.randn(4, 64)
    quantizer = quantizer_of(weight, 16, storage_dtype=dtype)
    out = quantizer(weight)
    assert torch.equal(out, weight.detach().to(getattr(torch, dtype)).float())
    assert torch.equal(torch.autograd.grad(out, weight, upstream)[0], upstream)
    with pytest.raises(ValueError, match=f"16 bits are {dtype} numbers and have no integers"):
        quantizer.codes(weight)


@pytest.mark.parametrize(
    ("weight", "settings"),
    [
        (torch.full((2, 4), 1e7), {"bits": 8}),
        (torch.full((2, 4), 1e-9), {"bits": 8}),
        (torch.full((2, 4), 1e7), {"bits": 4, "weight_estimator": "learned"}),
        (torch.full((2, 4), 1e5), {"bits": 16}),
    ],
)
def test_what_float16_cannot_hold_is_refused_by_name(weight, settings):
    with pytest.raises(ValueError, match=r"layer\.7.*float16.*bfloat16"):
        quantizer_of(weight, storage_dtype="float16", name="layer.7", **settings)
    quantizer_of(weight, storage_dtype="bfloat16", name="layer.7", **settings)
    zeros = torch.zeros(2, 4)
    assert torch.equal(quantizer_of(zeros, storage_dtype="float16", **settings)(zeros), zeros), "nothing is lost"


def test_groups_must_divide_the_inputs_of_a_channel():
    message = r"group_size=32 does not divide the 48 inputs of a channel of layer\.7.*group_size.: None"
    for shape, transposed in (((4, 48), False), ((48, 4), True), ((4, 16, 3), False)):
        with pytest.raises(ValueError, match=message):
            quantizer_of(torch.randn(shape), sharing="group", transposed=transposed, name="layer.7")


@pytest.mark.parametrize(
    "settings",
    [{}, {"symmetric": False}, {"mapping": "kmeans", "bits": 4}, {"mapping": "power_law"},
     {"mapping": "power_of_two", "bits": 4}, {"bits": 2}, {"bits": 1}, {"weight_estimator": "learned"}],
)  # fmt: skip
def test_keeps_its_precision_and_writes_nothing(settings):
    weight = weight_of()
    quantizer = quantizer_of(weight, **settings).eval()
    assert quantizer.state_dict() == {}
    expected = quantizer(weight)
    for twin in (copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer)), quantizer.bfloat16().half()):
        assert torch.equal(twin(weight), expected)
        assert all(tensor.dtype == torch.float32 for tensor in [*twin.parameters(), *twin.buffers()])
    half = weight.bfloat16()
    assert quantizer(half).dtype == torch.bfloat16
    assert torch.equal(quantizer(half), quantizer(half.float()).bfloat16()), "computed in float32, rounded once"
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer(weight), expected)


def test_an_empty_channel_stays_empty():
    weight = weight_of()
    weight[2] = 0.0
    for bits, symmetric, mapping in naive.ALLOWED:
        quantized = quantizer_of(weight, bits, symmetric, mapping)(weight)
        assert quantized.isfinite().all()
        assert quantized[2].abs().max() < 1e-10
