# SPDX-License-Identifier: Apache-2.0
"""Layers with several fake-quantized weights: recurrent ones, and all experts of a layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..specs import QuantizationScheme
from ..specs.quantization import expert_weights, outputs_last
from .quantized_module import QuantizedModule
from .weights import WeightQuantizer


class SeveralWeights(QuantizedModule):
    """A layer with several fake-quantized weights; its inputs, biases and states stay in floating point."""

    weight_quantizers: nn.ModuleDict

    def detach_quantizers(self) -> None:
        del self.weight_quantizers

    @property
    def activation_quantizer(self) -> None:  # type: ignore[override]
        return None

    @property
    def weight_quantizer(self) -> WeightQuantizer:  # type: ignore[override]
        return self._quantizer(next(iter(self.weight_quantizers)))

    def integer_weights(self) -> dict[str, Tensor]:
        """The integers of every weight, by the name of its parameter."""
        return {key: self._quantizer(key).codes(getattr(self, key)) for key in self.weight_quantizers}

    def _quantizer(self, key: str) -> WeightQuantizer:
        return self.weight_quantizers[key]  # type: ignore[return-value]

    def _values(self) -> dict[str, Tensor]:
        """The fake-quantized weights, by name; none while fake quantization is off."""
        if not self.fake_quantize_enabled:
            return {}
        return {key: self._quantizer(key)(getattr(self, key)) for key in self.weight_quantizers}


class _Recurrent(SeveralWeights):
    """A recurrent layer, with a scale per gate."""

    _gates: int
    _flat_weights: Any
    _flat_weights_names: Any
    _update_flat_weights: Any

    def attach_quantizers(self, scheme: QuantizationScheme, name: str) -> None:
        self.weight_quantizers = nn.ModuleDict()
        for key in self._flat_weights_names:
            if key.startswith(("weight_ih", "weight_hh")):
                how: dict[str, Any] = {"gates": self._gates, "name": f"{name}.{key}"}
                self.weight_quantizers[key] = WeightQuantizer(scheme, getattr(self, key), **how)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._update_flat_weights()  # the layer itself would put its weights back where one is another since the last pass
        kept, values = self._flat_weights, self._values()
        pairs = zip(self._flat_weights_names, kept, strict=True)
        self._flat_weights = [values.get(name, weight) for name, weight in pairs]
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._flat_weights = kept


class QuantizedLSTM(_Recurrent, nn.LSTM):
    """An `nn.LSTM` with fake-quantized weights."""

    plain_class, _gates = nn.LSTM, 4


class QuantizedGRU(_Recurrent, nn.GRU):
    """An `nn.GRU` with fake-quantized weights."""

    plain_class, _gates = nn.GRU, 3


class QuantizedExperts(SeveralWeights):
    """Experts of a layer in parameters of three axes, (experts, ...), with a scale per expert and output."""

    def attach_quantizers(self, scheme: QuantizationScheme, name: str) -> None:
        self.weight_quantizers = nn.ModuleDict()
        for key, weight in expert_weights(self).items():
            is_transposed = outputs_last(self, key)
            outputs = weight.shape[0] * weight.shape[2 if is_transposed else 1]
            how: dict[str, Any] = {"transposed": is_transposed, "gates": outputs, "name": f"{name}.{key}"}
            self.weight_quantizers[key] = WeightQuantizer(scheme, weight, **how)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        values = self._values()
        vars(self).update(values)  # found before the parameters of the same names
        try:
            return super().forward(*args, **kwargs)
        finally:
            for key in values:
                del vars(self)[key]
