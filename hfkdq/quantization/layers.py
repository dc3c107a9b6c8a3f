# SPDX-License-Identifier: Apache-2.0
"""The layers of torch and Transformers that compute with fake-quantized weights and inputs.

An existing layer becomes one by changing its class, so that its parameters, and their names, stay what they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from ..specs import QuantizationScheme, QuantizationSpec
from ..specs.quantization import RECURRENT
from .activations import ActivationQuantizer, make_activation_quantizer
from .weights import Stateless, WeightQuantizer


class QuantizedModule(nn.Module):
    """Base class of all fake-quantized layers.

    Attributes:
        quantization_spec (`QuantizationSpec`): the spec of the whole model.
        quantization_scheme (`QuantizationScheme`): how this module is quantized.
        weight_quantizer (`WeightQuantizer`): simulates `weight`; recurrent layers have `weight_quantizers` by name.
        activation_quantizer (`ActivationQuantizer`, *optional*): simulates the input.
        fake_quantize_enabled (`bool`): `False` computes in floating point.
    """

    quantization_spec: QuantizationSpec
    quantization_scheme: QuantizationScheme
    weight_quantizer: WeightQuantizer
    activation_quantizer: ActivationQuantizer | None
    fake_quantize_enabled = True
    weight: Tensor

    @property
    def plain_class(self) -> type[nn.Module]:
        """The class of the layer without its fake quantizers."""
        return next(PLAIN[cls] for cls in type(self).__mro__ if cls in PLAIN)

    def weight_scale(self) -> Tensor:
        """Scales of the weights, float32: of shape `(channels,)`, `()` for one, `(channels, groups)` for groups."""
        return self._shaped(self.weight_quantizer.qparams(self.effective_weight())[0])

    def weight_zero_point(self) -> Tensor | None:
        """Zero points of affine weights in the shape of `weight_scale`, else `None`."""
        zero_point = self.weight_quantizer.qparams(self.effective_weight())[1]
        return None if zero_point is None else self._shaped(zero_point)

    def integer_weight(self) -> Tensor:
        """The integers that the forward pass stands for, in the shape of the weight: int8, or uint8 without a sign."""
        return self.weight_quantizer.codes(self.effective_weight())

    def effective_weight(self) -> Tensor:
        """The floating-point weight that is quantized."""
        return self.weight

    def _shaped(self, found: Tensor) -> Tensor:
        scheme = self.quantization_scheme
        if not scheme.per_channel:
            return found.reshape(())
        return found.squeeze(-1) if scheme.group_size is not None else found.reshape(-1)

    def input_and_weight(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """The fake-quantized input and weight; as they are while fake quantization is off."""
        if not self.fake_quantize_enabled:
            return input, self.weight
        if self.activation_quantizer is not None:
            input = self.activation_quantizer(input)
        return input, self.weight_quantizer(self.effective_weight())

    def adapted_weight(self) -> Tensor:
        """The weight with the adapters of PEFT that belong to it."""
        return self.weight

    def check_inputs(self, count: int) -> None:
        """Refuses to be left with `count` inputs, if groups of them share a scale that would be cut.

        Raises:
            ValueError: the group size does not divide `count`.
        """
        size = self.quantization_scheme.group_size
        if size is not None and count % size:
            raise ValueError(
                f"Pruning would leave {count} inputs, which group_size={size} does not divide. Choose another sparsity "
                "or group size, or a scale per channel."
            )

    def keep_outputs_(self, kept: Tensor) -> None:
        """Follows a pruning that has left the output channels `kept`, indices in ascending order."""
        scale = getattr(self.weight_quantizer, "scale", None)
        if scale is not None and self.quantization_scheme.per_channel:
            self.weight_quantizer.scale = nn.Parameter(scale.detach()[kept.to(scale.device)])

    def attach_quantizers(self, scheme: QuantizationScheme, name: str) -> None:
        """Makes the quantizers; the class has been changed already."""
        weight = self.adapted_weight()
        self.weight_quantizer = WeightQuantizer(scheme, weight, transposed=isinstance(self, Conv1D), name=name)
        # Through register_module, so that None is an entry too.
        self.register_module("activation_quantizer", make_activation_quantizer(scheme, self.weight.device))

    def detach_quantizers(self) -> None:
        """Takes away what `attach_quantizers` made."""
        del self.weight_quantizer, self.activation_quantizer


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

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(*self.input_and_weight(input), self.bias)


class QuantizedConv1D(SmoothedModule, Conv1D):  # type: ignore[misc]
    """The `Conv1D` of GPT-2, a linear layer with a transposed weight, quantized as [`QuantizedLinear`] is."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.fake_quantize_enabled:
            result: Tensor = super().forward(x)
            return result
        x, weight = self.input_and_weight(x)
        return F.linear(x, weight.t(), self.bias)


class QuantizedConv1d(QuantizedModule, nn.Conv1d):
    """An `nn.Conv1d`, also depthwise, with fake-quantized weights and inputs."""

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self._conv_forward(*self.input_and_weight(input), self.bias)
        return output


class QuantizedConv2d(QuantizedModule, nn.Conv2d):
    """An `nn.Conv2d`, also depthwise, with fake-quantized weights and inputs."""

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self._conv_forward(*self.input_and_weight(input), self.bias)
        return output


class QuantizedEmbedding(QuantizedModule, nn.Embedding):
    """An `nn.Embedding` with a fake-quantized table, a scale per row."""

    def attach_quantizers(self, scheme: QuantizationScheme, name: str) -> None:
        self.weight_quantizer = WeightQuantizer(scheme, self.weight, name=name)
        self.register_module("activation_quantizer", None)

    def forward(self, input: Tensor) -> Tensor:
        rows = super().forward(input)
        return self.weight_quantizer.rows(rows, input, self.weight) if self.fake_quantize_enabled else rows


class _Recurrent(QuantizedModule):
    """A recurrent layer with fake-quantized weights, a scale per gate; biases and states stay in floating point."""

    weight_quantizers: nn.ModuleDict
    _gates: int
    _flat_weights: Any
    _flat_weights_names: Any

    def attach_quantizers(self, scheme: QuantizationScheme, name: str) -> None:
        self.weight_quantizers = nn.ModuleDict(
            {
                key: WeightQuantizer(scheme, getattr(self, key), gates=self._gates, name=f"{name}.{key}")
                for key in self._flat_weights_names
                if key.startswith("weight_ih") or key.startswith("weight_hh")
            }
        )

    def detach_quantizers(self) -> None:
        del self.weight_quantizers

    @property
    def activation_quantizer(self) -> None:  # type: ignore[override]
        return None

    def integer_weights(self) -> dict[str, Tensor]:
        """The integers of every weight, by the name of its parameter."""
        return {key: self._quantizer(key).codes(getattr(self, key)) for key in self.weight_quantizers}

    def _quantizer(self, key: str) -> WeightQuantizer:
        return self.weight_quantizers[key]  # type: ignore[return-value]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kept = self._flat_weights
        if self.fake_quantize_enabled:
            self._flat_weights = [
                self._quantizer(name)(getattr(self, name)) if name in self.weight_quantizers else weight
                for name, weight in zip(self._flat_weights_names, kept, strict=True)
            ]
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._flat_weights = kept


class QuantizedLSTM(_Recurrent, nn.LSTM):
    """An `nn.LSTM` with fake-quantized weights."""

    _gates = 4


class QuantizedGRU(_Recurrent, nn.GRU):
    """An `nn.GRU` with fake-quantized weights."""

    _gates = 3


CLASSES: Mapping[type[nn.Module], type[QuantizedModule]] = {
    nn.Linear: QuantizedLinear,
    Conv1D: QuantizedConv1D,
    nn.Conv1d: QuantizedConv1d,
    nn.Conv2d: QuantizedConv2d,
    nn.Embedding: QuantizedEmbedding,
    nn.LSTM: QuantizedLSTM,
    nn.GRU: QuantizedGRU,
}
PLAIN: Mapping[type[QuantizedModule], type[nn.Module]] = {new: old for old, new in CLASSES.items()}


def layer_class(module: nn.Module) -> type[nn.Module]:
    """The class of a layer; weight norm and other parametrizations, which give it one of its own, do not count."""
    return parametrize.type_before_parametrizations(module)


def weight_of(module: nn.Module) -> Any:
    """The weight of a layer that decides how it is quantized: of a recurrent one that of its states."""
    return getattr(module, "weight_hh_l0" if isinstance(module, RECURRENT) else "weight", None)


def _set_layer_class(module: nn.Module, new: type[nn.Module]) -> None:
    """Changes the class of a layer; a weight that is computed goes on being computed."""
    if parametrize.is_parametrized(module):
        computed = {key: value for key, value in vars(type(module)).items() if key not in ("__module__", "__doc__")}
        new = type(f"Parametrized{new.__name__}", (new,), computed)
    module.__class__ = new


def weight_quantizers_of(module: QuantizedModule) -> dict[str, tuple[WeightQuantizer, Tensor]]:
    """The weight quantizers of a layer and what each quantizes, by the name of the parameter."""
    if isinstance(module, _Recurrent):
        return {key: (module._quantizer(key), getattr(module, key)) for key in module.weight_quantizers}
    return {"weight": (module.weight_quantizer, module.effective_weight())}


def swap_in_(module: nn.Module, name: str, scheme: QuantizationScheme, spec: QuantizationSpec) -> QuantizedModule:
    """Turns a layer into its fake-quantized kind, in place."""
    plain = layer_class(module)
    _set_layer_class(module, CLASSES[plain])
    quantized = cast(QuantizedModule, module)
    try:
        quantized.attach_quantizers(scheme, name)
    except BaseException:
        _set_layer_class(module, plain)
        raise
    quantized.quantization_spec, quantized.quantization_scheme = spec, scheme
    return quantized.train(quantized.training)


def swap_out_(module: QuantizedModule) -> None:
    """Undoes `swap_in_`."""
    module.detach_quantizers()
    del module.quantization_spec, module.quantization_scheme
    vars(module).pop("fake_quantize_enabled", None)
    _set_layer_class(module, PLAIN[layer_class(module)])  # type: ignore[index]
