# SPDX-License-Identifier: Apache-2.0
"""Quantized activations in operators of ONNX."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...quantization import ActivationQuantizer
from ...quantization.grids import compand, expand
from ..operators import onnx_op

# Of the operators written here; the opset of the file may be higher.
OPSET = 13


def quantize(values: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """The uint8 codes `clamp(round(x / scale) + zero_point, 0, 255)`."""

    def compute(values: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        # Fake quantizers multiply by the inverse, ONNX Runtime divides: at ties they may differ by one.
        return torch.clamp(torch.round(values / scale) + zero_point, 0, 255).to(torch.uint8)

    return onnx_op("QuantizeLinear", values, scale, zero_point, compute=compute, opset=OPSET)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int = 1) -> Tensor:
    """`(codes - zero_point) * scale`, with one scale for all, or one for each index along `axis`."""
    ones = (1,) * (codes.dim() - 1) if axis == 0 else ()

    def compute(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        if scale.dim() and ones:
            scale, zero_point = scale.reshape(-1, *ones), zero_point.reshape(-1, *ones)
        return (codes.float() - zero_point.float()) * scale

    return onnx_op("DequantizeLinear", codes, scale, zero_point, compute=compute, opset=OPSET, axis=axis)


class ActivationQDQ(nn.Module):
    """Puts its input on the grid of a trained quantizer; without one, or without a range, it does nothing.

    At 8 bits that is QuantizeLinear and DequantizeLinear. Other widths and mappings have no integer kernels, and are
    computed in floating point as in training.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, quantizer: ActivationQuantizer | None) -> None:
        super().__init__()
        self.is_on = quantizer is not None and quantizer.initialized
        self.power: float | None = None
        self.is_integer = False
        if quantizer is not None and self.is_on:
            scale, zero_point = quantizer.qparams()
            self.largest = quantizer.maximum_code
            if quantizer.scheme.activation_mapping == "power_law":
                self.power = quantizer.scheme.power
            self.is_integer = self.largest == 255 and self.power is None
            self.register_buffer("scale", scale.detach().clone())
            self.register_buffer("zero_point", zero_point.to(torch.uint8 if self.is_integer else torch.float32))

    def forward(self, values: Tensor) -> Tensor:
        """`values`, rounded to the grid."""
        if not self.is_on:
            return values
        if self.is_integer:
            return dequantize(quantize(values, self.scale, self.zero_point), self.scale, self.zero_point)
        mapped = values if self.power is None else compand(values, self.power)
        codes = torch.clamp(torch.round(mapped * (1.0 / self.scale)) + self.zero_point, 0, self.largest)
        quantized = (codes - self.zero_point) * self.scale
        return quantized if self.power is None else expand(quantized, self.power)
