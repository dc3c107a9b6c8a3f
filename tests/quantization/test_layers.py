# SPDX-License-Identifier: Apache-2.0
"""Single quantized modules against integer arithmetic and the published gradients."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from hfkdq import QuantizationSpec
from hfkdq.quantization import QuantizedEmbedding, QuantizedLinear, prepare_qat_, quantized_modules
from hfkdq.quantization.layers import swap_in_, swap_out_, weight_quantizers_of
from tests import tiny
from tests.closeness import UNIT, assert_same_sum
from tests.quantization import naive

# How a layer is made, the shape of its input, and where its output channels are.
KINDS = {
    "linear": (lambda: nn.Linear(32, 6), (5, 32)),
    "gpt2": (lambda: Conv1D(6, 32), (5, 32)),
    "conv1d": (lambda: nn.Conv1d(32, 6, 3, padding=1), (2, 32, 7)),
    "conv2d": (lambda: nn.Conv2d(32, 6, 3, stride=2), (2, 32, 7, 7)),
    "depthwise1d": (lambda: nn.Conv1d(6, 12, 3, groups=6), (2, 6, 7)),
    "depthwise2d": (lambda: nn.Conv2d(6, 6, 3, groups=6, dilation=2), (2, 6, 7, 7)),
    "embedding": (lambda: nn.Embedding(20, 32, padding_idx=0), None),
    "lstm": (lambda: nn.LSTM(5, 6, num_layers=2, bidirectional=True, batch_first=True), (2, 4, 5)),
    "gru": (lambda: nn.GRU(5, 6, num_layers=2, bidirectional=True, batch_first=True), (2, 4, 5)),
}
SCHEMES = {
    "int8": {},
    "int4 affine": {"weight_bits": 4, "symmetric": False, "activation_bits": 4},
    "per tensor": {"per_channel": False},
    "groups": {"weight_bits": 4, "group_size": 32},
    "power law": {"weight_mapping": "power_law", "activation_mapping": "power_law"},
    "power of two": {"weight_bits": 4, "weight_mapping": "power_of_two"},
    "kmeans": {"weight_bits": 3, "weight_mapping": "kmeans"},
    "ternary": {"weight_bits": 2},
    "binary": {"weight_bits": 1, "activation_symmetric": True},
    "lsq": {"weight_bits": 4, "weight_estimator": "learned", "range_estimator": "learned"},
    "mse": {"weight_bits": 4, "weight_estimator": "mse", "range_estimator": "mse", "storage_dtype": "bfloat16"},
    "bfloat16": {"weight_bits": 16, "storage_dtype": "bfloat16", "activation_bits": None},
}
ALL = [
    (kind, scheme) for kind in KINDS for scheme in SCHEMES if not (kind.startswith("depthwise") and scheme == "groups")
]


def quantized(module, **spec):
    # Tables have a width of their own, unless told.
    spec = QuantizationSpec(**{"embedding_bits": spec.get("weight_bits"), **spec})
    return swap_in_(module, "layer", spec.scheme("layer", module), spec)


def linear(features=8, outputs=6, **spec):
    return quantized(nn.Linear(features, outputs), **spec)


def input_of(kind):
    shape = KINDS[kind][1]
    return torch.randint(0, 20, (3, 4)) if shape is None else torch.randn(shape)


def output_of(layer, inputs):
    out = layer(inputs)
    return out[0] if isinstance(out, tuple) else out


def skip_without_bfloat16(kind):
    """Not every processor has the kernels: oneDNN's LSTM of bfloat16 needs AVX512."""
    with torch.autocast("cpu", torch.bfloat16):
        try:
            output_of(KINDS[kind][0](), input_of(kind))
        except RuntimeError as error:
            pytest.skip(f"PyTorch has no such layer in bfloat16 on this processor: {error}")


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


@pytest.mark.parametrize("activation_bits", [16, 8, 4])
@pytest.mark.parametrize(
    ("weight_bits", "symmetric"),
    [(8, True), (8, False), (6, True), (4, True), (4, False), (3, True), (3, False), (2, True), (2, False), (1, True)],
)
@pytest.mark.parametrize("activation_symmetric", [True, False])
def test_every_width_equals_integer_arithmetic_exactly(weight_bits, symmetric, activation_bits, activation_symmetric):
    # Two inputs, so that sums of products of 16 and 8 bits still fit into the 24 bits of float32.
    layer = linear(2, 40, weight_bits=weight_bits, symmetric=symmetric, activation_bits=activation_bits,
                   activation_symmetric=activation_symmetric).eval()  # fmt: skip
    largest = max(2 ** (weight_bits - 1) - 1, 1) if symmetric else 2**weight_bits - 1
    scales = 2.0 ** torch.randint(-9, -3, (40,)).float()
    if symmetric:
        codes, zeros = torch.randint(-largest, largest + 1, (40, 2)), torch.zeros(40, dtype=torch.long)
        codes[:, 0] = largest
        codes[:, 1] = torch.where(codes[:, 1] == 0, -1, codes[:, 1]) if weight_bits == 1 else codes[:, 1]
    else:
        codes, zeros = torch.tensor([[0, largest], [largest, 0]] * 20), torch.randint(0, largest + 1, (40,))
    layer.weight.data = (codes - zeros[:, None]) * scales[:, None]
    layer.bias.data = torch.arange(40.0)
    middle = 2 ** (activation_bits - 1) if activation_symmetric else 2**activation_bits // 3
    scale = 2.0 ** (3 - activation_bits)
    layer.activation_quantizer.set_range(scale, middle)
    inputs = torch.randn(50, 2) * 8
    integers = ((inputs / scale).round().long() + middle).clamp(0, 2**activation_bits - 1)
    assert (integers.min(), integers.max()) == (0, 2**activation_bits - 1), "the input should reach both ends"
    sums = (integers - middle) @ (codes - zeros[:, None]).T
    expected = sums.double() * scales * scale + torch.arange(40.0)
    terms = (integers - middle).abs() @ (codes - zeros[:, None]).abs().T * scales.double() * scale + torch.arange(40.0)
    if activation_bits < 16:  # the sums with the bias fit too, so that no order rounds them
        assert torch.equal(layer(inputs), expected.float())
    assert_same_sum(layer(inputs), expected, terms, length=3)
    assert torch.equal(layer.integer_weight().long(), codes)
    assert torch.equal(layer.weight_scale(), scales)
    assert symmetric or torch.equal(layer.weight_zero_point().long(), zeros)


@pytest.mark.parametrize(("kind", "scheme"), ALL)
def test_equals_the_plain_layer_with_weights_and_input_quantized_before(kind, scheme):
    plain = KINDS[kind][0]()
    layer = quantized(copy.deepcopy(plain), **SCHEMES[scheme])
    inputs = input_of(kind)
    output_of(layer.train(), inputs)
    layer.eval()
    for name, (quantizer, weight) in weight_quantizers_of(layer).items():
        plain.get_parameter(name).data = quantizer(weight).detach()
        if scheme in ("int8", "int4 affine", "kmeans"):  # what else there is equals its reference in test_weights.py
            bits, symmetric = layer.quantization_scheme.weight_bits, layer.quantization_scheme.symmetric
            gates = {"lstm": 4, "gru": 3}.get(kind)
            rows = weight.t() if kind == "gpt2" else weight
            values = naive.quantize_weight(
                rows, bits, symmetric, layer.quantization_scheme.weight_mapping, blocks=gates,
                codebook=getattr(quantizer, "codebook", None),
            )[1]  # fmt: skip
            assert torch.equal(plain.get_parameter(name), values.t() if kind == "gpt2" else values)
    quantizer = layer.activation_quantizer
    assert (quantizer is None) == (kind in ("embedding", "lstm", "gru") or scheme == "bfloat16")
    seen = inputs
    if quantizer is not None and scheme == "power law":
        seen = quantizer(inputs).detach()
    elif quantizer is not None:
        scale, zero_point = (value.item() for value in quantizer.qparams())
        seen = naive.quantize_activation(inputs, scale, zero_point, layer.quantization_scheme.activation_bits)[1]
    # A table quantizes the rows that are looked up: scales that are means sum up 32 weights of them, in an order of their own.
    rtol = 2 * 32 * UNIT if kind == "embedding" and scheme in ("ternary", "binary") else 0
    torch.testing.assert_close(output_of(layer, inputs), output_of(plain, seen), rtol=rtol, atol=0)


@pytest.mark.parametrize(("kind", "scheme"), ALL)
def test_lives_as_its_plain_layer_does(kind, scheme):
    plain, inputs = KINDS[kind][0](), input_of(kind)
    layer = quantized(copy.deepcopy(plain), **SCHEMES[scheme])
    assert list(layer.state_dict()) == list(plain.state_dict())
    assert layer.load_state_dict(plain.state_dict(), strict=True).missing_keys == []
    output_of(layer.train(), inputs).sum().backward()
    assert all(layer.get_parameter(name).grad.abs().sum() > 0 for name in dict(plain.named_parameters()))
    expected = output_of(layer.eval(), inputs)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is type(layer)
        assert twin.quantization_spec == layer.quantization_spec
        assert torch.equal(output_of(twin, inputs), expected)
        assert not set(map(id, twin.parameters())) & set(map(id, layer.parameters()))
    empty = output_of(layer, inputs[:0])
    assert empty.shape == output_of(plain, inputs[:0]).shape
    if layer.activation_quantizer is not None:
        assert (output_of(layer, inputs[:1]) != output_of(plain, inputs[:1])).any()
    layer.fake_quantize_enabled = False
    assert torch.equal(output_of(layer, inputs), output_of(plain, inputs))
    layer.fake_quantize_enabled = True
    assert not torch.equal(output_of(layer, inputs), output_of(plain, inputs))
    swap_out_(layer)
    assert type(layer) is type(plain)
    assert vars(layer).keys() == vars(plain).keys()
    assert not [name for name, _ in layer.named_modules() if name]
    assert torch.equal(output_of(layer, inputs), output_of(plain, inputs))


@pytest.mark.parametrize(("kind", "scheme"), ALL)
def test_keeps_its_precision_in_half_precision_models_and_under_autocast(kind, scheme):
    skip_without_bfloat16(kind)
    layer, inputs = quantized(KINDS[kind][0](), **SCHEMES[scheme]).train(), input_of(kind)
    output_of(layer, inputs)
    expected = output_of(layer.eval(), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        out = output_of(layer.train(), inputs)
        out.float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())
    torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.1)
    modules = [quantizer for quantizer, _ in weight_quantizers_of(layer).values()]
    modules += [layer.activation_quantizer] if layer.activation_quantizer is not None else []
    before = {id(m): [t.clone() for t in [*m.parameters(), *m.buffers()]] for m in modules}
    layer.bfloat16().eval()
    assert layer.get_parameter(next(iter(weight_quantizers_of(layer)))).dtype == torch.bfloat16
    floats = inputs if inputs.dtype == torch.long else inputs.bfloat16()
    assert output_of(layer, floats).dtype == torch.bfloat16
    for module in modules:
        now = [*module.parameters(), *module.buffers()]
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(before[id(module)], now, strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(("kind", "scheme"), [pair for pair in ALL if pair[1] in ("int8", "kmeans", "lsq")])
def test_gradient_checkpointing_updates_once(kind, scheme, reentrant):
    layer = quantized(KINDS[kind][0](), **SCHEMES[scheme]).train()
    twin, anchor = (
        copy.deepcopy(layer),
        torch.zeros((), requires_grad=True),
    )  # reentrant needs an input with a gradient
    for _ in range(2):
        inputs = input_of(kind)
        output_of(layer, inputs).square().sum().backward()
        checkpoint(
            lambda x, zero: output_of(twin, x) + zero, inputs, anchor, use_reentrant=reentrant
        ).square().sum().backward()
        with torch.no_grad():  # so far that a codebook moves at every step
            for one, two in zip(layer.parameters(), twin.parameters(), strict=True):
                two.copy_(one.mul_(torch.rand_like(one) + 0.5))
    for (name, a), (_, b) in zip(layer.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=lambda text, name=name: f"{name}: {text}")
    states = [[*m.buffers()] for m in (layer, twin)]
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_weight_that_is_computed_is_quantized_as_it_comes_out(scheme):
    normed = weight_norm(nn.Conv1d(32, 6, 3, padding=1), dim=2)
    plain = nn.Conv1d(32, 6, 3, padding=1)
    plain.load_state_dict({"weight": normed.weight, "bias": normed.bias})
    layer, expected = (quantized(copy.deepcopy(module), **SCHEMES[scheme]) for module in (normed, plain))
    assert list(layer.state_dict()) == list(normed.state_dict())
    inputs = torch.randn(2, 32, 7)
    assert torch.equal(layer.train()(inputs), expected.train()(inputs))
    layer(inputs).sum().backward()
    parameters = dict(normed.named_parameters())
    assert set(parameters) == {"bias", "parametrizations.weight.original0", "parametrizations.weight.original1"}
    assert all(layer.get_parameter(name).grad.abs().sum() > 0 for name in parameters)
    with torch.no_grad():
        layer.get_parameter("parametrizations.weight.original0").mul_(1.5)
    assert torch.equal(copy.deepcopy(layer)(inputs), layer(inputs))
    assert not torch.equal(layer(inputs), expected(inputs))
    swap_out_(layer)
    assert list(layer.state_dict()) == list(normed.state_dict())
    torch.testing.assert_close(layer.weight, 1.5 * normed.weight)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("dims", [1, 2])
def test_convolutions_pad_the_quantized_input(mode, dims):
    make, size = {1: (nn.Conv1d, (7,)), 2: (nn.Conv2d, (7, 6))}[dims]
    plain = make(4, 6, 3, padding=2, padding_mode=mode, bias=False)
    layer, inputs = quantized(copy.deepcopy(plain)), torch.randn(2, 4, *size)
    layer.train()(inputs)
    layer.eval()
    plain.weight.data = naive.quantize_weight(layer.weight, 8)[1]
    scale, zero_point = (value.item() for value in layer.activation_quantizer.qparams())
    assert torch.equal(layer(inputs), plain(naive.quantize_activation(inputs, scale, zero_point, 8)[1]))


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU])
def test_recurrent_layers_run_packed_sequences_and_pass_gradients_through(make):
    plain = make(5, 6, num_layers=2, bidirectional=True, batch_first=True)
    layer = quantized(copy.deepcopy(plain), weight_bits=4)
    gates = 4 if make is nn.LSTM else 3
    weights = [name for name in plain.state_dict() if name.startswith("weight")]
    assert len(weights) == len(layer.integer_weights()) == 8
    for name in weights:
        codes, values = naive.quantize_weight(plain.get_parameter(name), 4, blocks=gates)
        assert torch.equal(layer.integer_weights()[name].int(), codes.int())
        plain.get_parameter(name).data = values
    inputs = pack_padded_sequence(torch.randn(3, 5, 5), [5, 3, 2], batch_first=True)
    outputs = [module(inputs)[0].data for module in (layer, plain)]
    assert torch.equal(*outputs)
    for out in outputs:
        out.square().sum().backward()
    for name, parameter in plain.named_parameters():
        assert torch.equal(layer.get_parameter(name).grad, parameter.grad), name
    assert all(found is layer.get_parameter(name) for name, found in
               zip(layer._flat_weights_names, layer._flat_weights, strict=True))  # fmt: skip


@pytest.mark.parametrize("scheme", [*SCHEMES, "lsq per tensor", "percentile", "mean_abs", "groups affine"])
def test_looked_up_rows_equal_those_of_the_whole_quantized_table(scheme):
    more = {
        "lsq per tensor": {"weight_bits": 4, "weight_estimator": "learned", "per_channel": False},
        "percentile": {"weight_bits": 4, "weight_estimator": "percentile", "percentile": 90.0},
        "mean_abs": {"weight_bits": 4, "weight_estimator": "mean_abs"},
        "groups affine": {"weight_bits": 4, "group_size": 32, "symmetric": False},
    }
    table = quantized(nn.Embedding(20, 64), **{**SCHEMES, **more}[scheme]).train()
    twin, ids = copy.deepcopy(table), torch.tensor([[3, 7, 7], [0, 19, 3]])
    upstream = torch.randn(2, 3, 64)
    found = table(ids)
    expected = F.embedding(ids, twin.weight_quantizer(twin.weight))
    # Scales that are means sum up 64 weights, of rows or of the whole table; all else is computed number by number.
    mean = scheme in ("ternary", "binary", "mean_abs")
    torch.testing.assert_close(found, expected, rtol=2 * 64 * UNIT if mean else 0, atol=0)
    for out in (found, expected):
        out.backward(upstream)
    for (name, a), (_, b) in zip(table.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=lambda text, name=name: f"{name}: {text}")
    if scheme != "bfloat16":
        codes = table.integer_weight()
        assert codes.shape == (20, 64)
        assert codes[3].unique().numel() <= 2**table.quantization_scheme.weight_bits


def test_a_share_of_the_rows_of_a_table_is_quantized_in_training():
    table = quantized(nn.Embedding(500, 8), weight_bits=2).train()
    table.weight_quantizer.share = 0.3
    ids = torch.arange(500).repeat(2).reshape(4, 250)
    found, whole = table(ids), table.eval()(ids)
    rows = (found == whole).all(dim=-1).reshape(2, 500)
    assert ((found == table.weight[ids]).all(dim=-1).reshape(2, 500) | rows).all()
    assert torch.equal(rows[0], rows[1]), "a row is the same wherever it is looked up"
    assert rows[0].float().mean().item() == pytest.approx(0.3, abs=0.07)


@pytest.mark.parametrize("module", [nn.Linear(48, 4), nn.Conv2d(8, 8, 3, groups=8), nn.Conv1d(64, 64, 3, groups=64)])
def test_group_size_that_does_not_divide_leaves_the_layer_alone(module):
    kind, before = type(module), set(vars(module))
    with pytest.raises(ValueError, match=r"group_size=32 does not divide the \d+ inputs of a channel of layer"):
        quantized(module, group_size=32)
    assert type(module) is kind
    assert set(vars(module)) == before


def test_group_size_that_does_not_divide_leaves_the_model_alone():
    model = tiny.bert(hidden=64, intermediate_size=96)
    with pytest.raises(ValueError, match=r"group_size=64.*96 inputs.*layer\.0\.output\.dense"):
        prepare_qat_(model, QuantizationSpec(weight_bits=4, group_size=64))
    assert not quantized_modules(model)
    assert not hasattr(model.config, "hfkdq")
    prepare_qat_(model, QuantizationSpec(weight_bits=4, group_size=64, overrides={"output.dense": {"group_size": 32}}))


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


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU])
def test_recurrent_layers_are_quantized_from_the_first_call_after_loading(make):
    """PyTorch gathers the weights anew where a parameter is another tensor than at the last call."""
    layer, inputs = quantized(make(5, 6, batch_first=True), weight_bits=2).eval(), torch.randn(2, 4, 5)
    expected = layer(inputs)[0]
    loaded = quantized(make(5, 6, batch_first=True), weight_bits=2).eval()
    loaded(inputs)
    loaded.load_state_dict({k: v.clone() for k, v in layer.state_dict().items()}, assign=True)
    assert torch.equal(loaded(inputs)[0], expected)
