# SPDX-License-Identifier: Apache-2.0
"""The base class of layers with fake quantizers."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..specs import QuantizationScheme, QuantizationSpec
from .activations import ActivationQuantizer, make_activation_quantizer
from .weights import WeightQuantizer


class QuantizedModule(nn.Module):
    """Base class of all fake-quantized layers.

    Attributes:
        quantization_spec (`QuantizationSpec`): the spec of the whole model.
        quantization_scheme (`QuantizationScheme`): how this module is quantized.
        weight_quantizer (`WeightQuantizer`): simulates `weight`; a [`SeveralWeights`] has `weight_quantizers` by name.
        activation_quantizer (`ActivationQuantizer`, *optional*): simulates the input.
        fake_quantize_enabled (`bool`): `False` computes in floating point.
        plain_class (`type`): the class of the layer without its fake quantizers.
    """

    quantization_spec: QuantizationSpec
    quantization_scheme: QuantizationScheme
    weight_quantizer: WeightQuantizer
    activation_quantizer: ActivationQuantizer | None
    fake_quantize_enabled = True
    weight: Tensor
    plain_class: ClassVar[type[nn.Module]]

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
        # A table and the head that shares it have one quantizer.
        if scale is not None and self.quantization_scheme.per_channel and len(scale) != len(kept):
            self.weight_quantizer.scale = nn.Parameter(scale.detach()[kept.to(scale.device)])

    def attach_quantizers(self, scheme: QuantizationScheme, name: str) -> None:
        """Makes the quantizers; the class has been changed already."""
        weight = self.adapted_weight()
        self.weight_quantizer = WeightQuantizer(scheme, weight, transposed=isinstance(self, Conv1D), name=name)
        # Through register_module, so that None is an entry too.
        self.register_module("activation_quantizer", make_activation_quantizer(scheme, self.weight.device))

    def detach_quantizers(self) -> None:
        del self.weight_quantizer, self.activation_quantizer
