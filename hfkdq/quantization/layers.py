# SPDX-License-Identifier: Apache-2.0
"""The layers of torch and Transformers that compute with fake-quantized weights and inputs. An existing layer becomes
one by changing its class, so that its parameters, and their names, stay what they were."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from ..specs import QuantizationScheme, QuantizationSpec
from ..specs.quantization import RECURRENT, expert_weights
from .quantized_module import QuantizedModule
from .several_weights import QuantizedExperts, QuantizedGRU, QuantizedLSTM, SeveralWeights
from .weights import Stateless, WeightQuantizer


class SmoothedModule(QuantizedModule):
    """A layer whose inputs may be divided, feature by feature, by what its weights are multiplied with."""

    smoothing: Smoothing
    adapter: Any = None

    def attach_quantizers(self, scheme: QuantizationScheme, name: str) -> None:
        super().attach_quantizers(scheme, name)
        self.smoothing = Smoothing()

    def detach_quantizers(self) -> None:
        super().detach_quantizers()
        del self.smoothing

    def effective_weight(self) -> Tensor:
        factors, weight = self.smoothing.factors, self.adapted_weight()
        if factors is None:
            return weight
        return weight * (factors.unsqueeze(1) if isinstance(self, Conv1D) else factors).to(weight.dtype)

    def adapted_weight(self) -> Tensor:
        return self.weight if self.adapter is None else self.adapter.merged_weight(self.weight)

    def input_and_weight(self, input: Tensor) -> tuple[Tensor, Tensor]:
        if self.smoothing.factors is not None and self.fake_quantize_enabled:
            input = input / self.smoothing.factors.to(input.dtype)
        return super().input_and_weight(input)


class Smoothing(Stateless):
    """The factors of SmoothQuant, one for each input feature, float32; `None` without."""

    factors: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factors", None, persistent=False)


class QuantizedLinear(SmoothedModule, nn.Linear):
    """An `nn.Linear` with fake-quantized weights and, if its scheme says so, inputs."""

    plain_class = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(*self.input_and_weight(input), self.bias)


class QuantizedConv1D(SmoothedModule, Conv1D):  # type: ignore[misc]
    """The `Conv1D` of GPT-2, a linear layer with a transposed weight, quantized as [`QuantizedLinear`] is."""

    plain_class = Conv1D

    def forward(self, x: Tensor) -> Tensor:
        if not self.fake_quantize_enabled:
            return super().forward(x)
        x, weight = self.input_and_weight(x)
        return F.linear(x, weight.t(), self.bias)


class _Convolution(QuantizedModule):
    _conv_forward: Any
    bias: Any

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(*self.input_and_weight(input), self.bias)


class QuantizedConv1d(_Convolution, nn.Conv1d):
    """An `nn.Conv1d`, also depthwise, with fake-quantized weights and inputs."""

    plain_class = nn.Conv1d


class QuantizedConv2d(_Convolution, nn.Conv2d):
    """An `nn.Conv2d`, also depthwise, with fake-quantized weights and inputs."""

    plain_class = nn.Conv2d


class QuantizedEmbedding(QuantizedModule, nn.Embedding):
    """An `nn.Embedding` with a fake-quantized table, a scale per row.

    Subclasses that scale rows, or shift indices, do it as ever around this lookup.
    """

    plain_class = nn.Embedding

    def attach_quantizers(self, scheme: QuantizationScheme, name: str) -> None:
        self.weight_quantizer = WeightQuantizer(scheme, self.weight, name=name)
        self.register_module("activation_quantizer", None)

    def forward(self, input: Tensor) -> Tensor:
        rows = super().forward(input)
        return self.weight_quantizer.rows(rows, input, self.weight) if self.fake_quantize_enabled else rows


CLASSES: Mapping[type[nn.Module], type[QuantizedModule]] = {
    nn.Linear: QuantizedLinear, Conv1D: QuantizedConv1D, nn.Conv1d: QuantizedConv1d, nn.Conv2d: QuantizedConv2d,
    nn.Embedding: QuantizedEmbedding, nn.LSTM: QuantizedLSTM, nn.GRU: QuantizedGRU,
}  # fmt: skip


def layer_class(module: nn.Module) -> type[nn.Module]:
    """The class of a layer; weight norm and other parametrizations, which give it one of its own, do not count."""
    return parametrize.type_before_parametrizations(module)


@cache
def _quantized_class(plain: type[nn.Module], has_experts: bool) -> type[QuantizedModule] | None:
    if plain in CLASSES:
        return CLASSES[plain]
    base = QuantizedExperts if has_experts else next((CLASSES[cls] for cls in plain.__mro__ if cls in CLASSES), None)
    # What torch itself derives may never be called, as the output projection of nn.MultiheadAttention.
    if base is None or plain.__module__.startswith("torch."):
        return None
    if not has_experts and not _keeps_forward(plain, base.plain_class):
        return None
    order = (base, plain) if has_experts else (plain, base)
    return type(f"Quantized{plain.__name__}", order, {"plain_class": plain})


def _keeps_forward(cls: type[nn.Module], base: type[nn.Module]) -> bool:
    """Whether a subclass computes with the forward pass of `base`; a table's may be called from its own."""
    between = cls.__mro__[: cls.__mro__.index(base)]
    own = [inspect.unwrap(vars(each)["forward"]) for each in between if "forward" in vars(each)]
    codes = [each.__code__ for each in own if hasattr(each, "__code__")]
    names = [{*code.co_names, *code.co_freevars} for code in codes]
    calls = all("forward" in known and {"super", "__class__"} & known for known in names)
    return not own or (base is nn.Embedding and calls and len(codes) == len(own))


def quantized_class(module: nn.Module) -> type[QuantizedModule] | None:
    """The fake-quantized kind of a layer, `None` if it has none: with a forward pass of its own, it may do anything."""
    if isinstance(module, QuantizedModule):
        return None
    plain: Any = layer_class(module)
    return _quantized_class(plain, bool(expert_weights(module)))


def weight_of(module: nn.Module) -> Any:
    """The weight of a layer that decides how it is quantized: of a recurrent one that of its states."""
    if experts := expert_weights(module):
        return next(iter(experts.values()))
    return getattr(module, "weight_hh_l0" if isinstance(module, RECURRENT) else "weight", None)


def _set_layer_class(module: nn.Module, new: type[nn.Module]) -> None:
    """Changes the class of a layer; a weight that is computed goes on being computed."""
    if parametrize.is_parametrized(module):
        computed = {key: value for key, value in vars(type(module)).items() if key not in ("__module__", "__doc__")}
        new = type(f"Parametrized{new.__name__}", (new,), computed)
    module.__class__ = new


def weight_quantizers_of(module: QuantizedModule) -> dict[str, tuple[WeightQuantizer, Tensor]]:
    """The weight quantizers of a layer and what each quantizes, by the name of the parameter."""
    if isinstance(module, SeveralWeights):
        return {key: (module._quantizer(key), getattr(module, key)) for key in module.weight_quantizers}
    return {"weight": (module.weight_quantizer, module.effective_weight())}


def swap_in_(module: nn.Module, name: str, scheme: QuantizationScheme, spec: QuantizationSpec) -> QuantizedModule:
    """Turns a layer into its fake-quantized kind, in place."""
    plain = layer_class(module)
    _set_layer_class(module, cast("type[QuantizedModule]", quantized_class(module)))
    quantized = cast(QuantizedModule, module)
    try:
        quantized.attach_quantizers(scheme, name)
    except BaseException:
        _set_layer_class(module, plain)
        raise
    quantized.quantization_spec, quantized.quantization_scheme = spec, scheme
    return quantized.train(quantized.training)


def share_tables_(modules: Iterable[QuantizedModule]) -> None:
    """Gives a linear layer whose weight is the table of an embedding the quantizer of that table, if they are alike."""
    modules = list(modules)
    tables = {id(module.weight): module for module in modules if isinstance(module, QuantizedEmbedding)}
    for module in modules:
        table = tables.get(id(module.weight)) if isinstance(module, QuantizedLinear) and not module.adapter else None
        if table is None:
            continue
        bits = module.quantization_scheme.activation_bits
        if replace(table.quantization_scheme, activation_bits=bits) == module.quantization_scheme:
            module.weight_quantizer = table.weight_quantizer


def swap_out_(module: QuantizedModule) -> None:
    """Undoes `swap_in_`."""
    module.detach_quantizers()
    del module.quantization_spec, module.quantization_scheme
    vars(module).pop("fake_quantize_enabled", None)
    _set_layer_class(module, type(module).plain_class)
