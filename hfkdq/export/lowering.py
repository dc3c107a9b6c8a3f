# SPDX-License-Identifier: Apache-2.0
"""Turns fake quantizers into modules that hold integer codes and trace to standard ONNX operators.

Knows torch's tracer and the modules of `hfkdq.quantization`; no exporter, no file.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..quantization import ActivationQuantizer, QuantizedEmbedding, QuantizedLinear, quantized_modules


class _QuantizeDequantize(torch.autograd.Function):
    """`(clamp(round(x / scale) + zero_point, 0, 255) - zero_point) * scale`, traced as a pair of Q and DQ."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(values, scale, zero_point.int(), 0, 255)

    @staticmethod
    def symbolic(g: Any, values: Any, scale: Any, zero_point: Any) -> Any:
        return g.op("DequantizeLinear", g.op("QuantizeLinear", values, scale, zero_point), scale, zero_point)


class _Dequantize(torch.autograd.Function):
    """`codes * scale`, with one scale per column or one for all, traced as one DequantizeLinear."""

    @staticmethod
    def forward(ctx: Any, codes: Tensor, scale: Tensor) -> Tensor:
        return codes * scale

    @staticmethod
    def symbolic(g: Any, codes: Any, scale: Any) -> Any:
        # Ignored for a scalar scale; in a transposed weight, 1 is the axis of the output channels.
        return g.op("DequantizeLinear", codes, scale, axis_i=1)


class _IntegerLinear(nn.Module):
    """A linear layer that holds int8 codes, transposed as MatMul wants them: (in_features, out_features)."""

    codes: Tensor
    scale: Tensor
    input_scale: Tensor
    input_zero_point: Tensor

    def __init__(self, linear: QuantizedLinear) -> None:
        super().__init__()
        self.register_buffer("codes", linear.integer_weight().t().contiguous())
        self.register_buffer("scale", linear.weight_scale())
        self.bias = linear.bias
        quantizer = linear.activation_quantizer
        self.quantizes_input = isinstance(quantizer, ActivationQuantizer) and quantizer.initialized
        if quantizer is not None and self.quantizes_input:
            scale, zero_point = quantizer.qparams()
            self.register_buffer("input_scale", scale.detach().clone())
            self.register_buffer("input_zero_point", zero_point.to(torch.uint8))

    def forward(self, input: Tensor) -> Tensor:
        # ONNX Runtime makes a Gemm of what has two axes and has no fused integer kernel for it; with three it has.
        flat = input.dim() == 2
        values = input.unsqueeze(0) if flat else input
        values = self._quantized_input(values) @ self._weight()
        if self.bias is not None:
            values = values + self.bias
        return values.squeeze(0) if flat else values

    def _quantized_input(self, values: Tensor) -> Tensor:
        if not self.quantizes_input:
            return values
        quantized: Tensor = _QuantizeDequantize.apply(values, self.input_scale, self.input_zero_point)  # type: ignore[no-untyped-call]
        return quantized

    def _weight(self) -> Tensor:
        if not self.quantizes_input:
            # ONNX Runtime would fuse a DequantizeLinear here into a kernel that rounds the activations to 8 bits too.
            return self.codes.float() * self.scale
        weight: Tensor = _Dequantize.apply(self.codes, self.scale)  # type: ignore[no-untyped-call]
        return weight


class _IntegerEmbedding(nn.Module):
    """An embedding that gathers int8 codes and scales what it gathered."""

    codes: Tensor
    scale: Tensor

    def __init__(self, embedding: QuantizedEmbedding) -> None:
        super().__init__()
        self.register_buffer("codes", embedding.integer_weight())
        self.register_buffer("scale", embedding.weight_scale())

    def forward(self, input: Tensor) -> Tensor:
        rows: Tensor = _Dequantize.apply(F.embedding(input, self.codes), self.scale)  # type: ignore[no-untyped-call]
        return rows


def lower_quantizers_(model: PreTrainedModel) -> int:
    """Replaces every fake-quantized linear layer and embedding by one that holds int8 codes, in place.

    What it computes stays the same; it can be traced but no longer trained.

    Args:
        model (`PreTrainedModel`): a model with fake quantizers, on the CPU.

    Returns:
        `int`: how many linear layers were replaced.
    """
    linears = 0
    for name, module in quantized_modules(model).items():
        if isinstance(module, QuantizedLinear):
            model.set_submodule(name, _IntegerLinear(module))
            linears += 1
        else:
            model.set_submodule(name, _IntegerEmbedding(module))
    return linears
