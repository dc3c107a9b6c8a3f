# SPDX-License-Identifier: Apache-2.0
"""Turns fake quantizers into modules that hold integer codes and trace to standard ONNX operators.

Knows torch's tracer and the modules of `hfkdq.quantization`; no exporter, no file.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..quantization import (
    AttentionQuantizer,
    QuantizedConv1D,
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedModule,
    quantized_modules,
)
from .operators import onnx_op

# Of the operators written here; the opset of the file may be higher.
OPSET = 13


def _quantize(values: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """The uint8 codes `clamp(round(x / scale) + zero_point, 0, 255)`."""

    def compute(values: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        # Torch multiplies by the inverse, ONNX Runtime divides: at ties they may differ by one.
        return torch.clamp(torch.round(values / scale) + zero_point, 0, 255).to(torch.uint8)

    return onnx_op("QuantizeLinear", values, scale, zero_point, compute=compute, opset=OPSET)


def _dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int = 1) -> Tensor:
    """`(codes - zero_point) * scale`, with one scale for all, or one for each place along `axis`, 0 or the last."""

    def compute(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        return (codes.float() - zero_point.float()) * scale

    return onnx_op("DequantizeLinear", codes, scale, zero_point, compute=compute, opset=OPSET, axis=axis)


class _IntegerModule(nn.Module):
    """What layers that hold int8 codes have in common: the grid of their input."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    input_scale: Tensor
    input_zero_point: Tensor

    def __init__(self, module: QuantizedModule) -> None:
        super().__init__()
        quantizer = module.activation_quantizer
        self.quantizes_input = quantizer is not None and quantizer.initialized
        if quantizer is not None and self.quantizes_input:
            scale, zero_point = quantizer.qparams()
            self.register_buffer("input_scale", scale.detach().clone())
            self.register_buffer("input_zero_point", zero_point.to(torch.uint8))

    def quantized_input(self, values: Tensor) -> Tensor:
        if not self.quantizes_input:
            return values
        codes = _quantize(values, self.input_scale, self.input_zero_point)
        return _dequantize(codes, self.input_scale, self.input_zero_point)


class _IntegerLinear(_IntegerModule):
    """A linear layer that holds int8 codes, transposed as MatMul wants them: (in_features, out_features)."""

    def __init__(self, linear: QuantizedLinear | QuantizedConv1D) -> None:
        super().__init__(linear)
        codes = linear.integer_weight()
        self.register_buffer("codes", codes if isinstance(linear, QuantizedConv1D) else codes.t().contiguous())
        self.register_buffer("scale", linear.weight_scale())
        self.register_buffer("zero_point", torch.zeros_like(self.scale, dtype=torch.int8))
        self.bias = cast("Tensor | None", linear.bias)

    def forward(self, input: Tensor) -> Tensor:
        # ONNX Runtime makes a Gemm of what has two axes and has no fused integer kernel for it; with three it has.
        flat = input.dim() == 2
        values = input.unsqueeze(0) if flat else input
        values = self.quantized_input(values) @ self._weight()
        if self.bias is not None:
            values = values + self.bias
        return values.squeeze(0) if flat else values

    def _weight(self) -> Tensor:
        if not self.quantizes_input:
            # ONNX Runtime would fuse a DequantizeLinear here into a kernel that rounds the activations to 8 bits too.
            return self.codes.float() * self.scale
        return _dequantize(self.codes, self.scale, self.zero_point)


class _IntegerConv(_IntegerModule):
    """A convolution that holds int8 codes; ONNX Runtime computes it in floating point."""

    def __init__(self, conv: QuantizedConv1d | QuantizedConv2d) -> None:
        super().__init__(conv)
        self.register_buffer("codes", conv.integer_weight())
        scale = conv.weight_scale()
        self.register_buffer("scale", scale.reshape(-1, *[1] * (conv.weight.ndim - 1)) if scale.ndim else scale)
        self.bias = conv.bias
        self.kind = nn.Conv1d if isinstance(conv, nn.Conv1d) else nn.Conv2d
        for name in ("stride", "padding", "dilation", "groups", "padding_mode", "_reversed_padding_repeated_twice"):
            setattr(self, name, getattr(conv, name))

    @property
    def weight(self) -> Tensor:
        """The values of the codes; some models ask their convolution for its precision."""
        return self.codes.float() * self.scale

    def forward(self, input: Tensor) -> Tensor:
        values = self.quantized_input(input)
        output: Tensor = self.kind._conv_forward(self, values, self.weight, self.bias)  # type: ignore[arg-type]
        return output


class _IntegerEmbedding(nn.Module):
    """An embedding that gathers int8 codes and the scales of their rows."""

    codes: Tensor
    scale: Tensor

    def __init__(self, embedding: QuantizedEmbedding) -> None:
        super().__init__()
        self.register_buffer("codes", embedding.integer_weight())
        scale = embedding.weight_scale()
        self.register_buffer("scale", scale.unsqueeze(1) if scale.ndim else scale)

    def forward(self, input: Tensor) -> Tensor:
        codes = F.embedding(input, self.codes)
        return codes.float() * (F.embedding(input, self.scale) if self.scale.ndim else self.scale)


def check_lowerable(model: PreTrainedModel) -> None:
    """Refuses what this release cannot write as integers.

    Raises:
        ValueError: a module whose weights are not linear, symmetric integers with one scale a channel, whose activations
            have another width than 8, or that is recurrent, smoothed, or an attention with quantized products.
    """
    for name, module in quantized_modules(model).items():
        reason = _not_lowerable(module)
        if reason:
            raise ValueError(
                f"{name} has {reason}. This release writes linear symmetric weights of up to 8 bits with a scale per "
                "channel or module, and activations of 8 bits or none. load_quantized runs the rest in torch."
            )
    attention = next((name for name, m in model.named_modules() if isinstance(m, AttentionQuantizer)), None)
    if attention is not None:
        raise ValueError(
            f"{attention.rpartition('.')[0]} has quantized matrix products (attention=True), which this release does not "
            "write. load_quantized runs them in torch."
        )


_LOWERABLE = (QuantizedLinear, QuantizedConv1D, QuantizedConv1d, QuantizedConv2d, QuantizedEmbedding)


def _not_lowerable(module: QuantizedModule) -> str:
    scheme = module.quantization_scheme
    bits, activations = scheme.weight_bits, scheme.activation_bits
    if not module.fake_quantize_enabled:
        return "fake quantizers that are off: its training has not reached the point where they begin"
    if not isinstance(module, _LOWERABLE):
        return f"recurrent weights ({type(module).__name__})"
    if bits == 16 or not scheme.symmetric or scheme.weight_mapping != "linear":
        return f"weight_bits={bits}, weight_mapping={scheme.weight_mapping!r}, symmetric={scheme.symmetric}"
    if module.weight_quantizer.bits != bits:
        return f"weights of {module.weight_quantizer.bits} bits, on the way to the {bits} of its spec"
    if scheme.group_size is not None:
        return f"group_size={scheme.group_size}"
    if module.activation_quantizer is not None and (activations, scheme.activation_mapping) != (8, "linear"):
        return f"activation_bits={activations}, activation_mapping={scheme.activation_mapping!r}"
    smoothing = getattr(module, "smoothing", None)
    return "" if smoothing is None or smoothing.factors is None else "smoothed inputs"


def lower_quantizers_(model: PreTrainedModel) -> int:
    """Replaces every fake-quantized layer by one that holds int8 codes, in place.

    What it computes stays the same; it can be traced but no longer trained.

    Args:
        model (`PreTrainedModel`): a model with fake quantizers, on the CPU.

    Returns:
        `int`: how many linear layers were replaced.

    Raises:
        ValueError: as `check_lowerable` does.
    """
    check_lowerable(model)
    linears = 0
    for name, module in quantized_modules(model).items():
        if isinstance(module, (QuantizedLinear, QuantizedConv1D)):
            model.set_submodule(name, _IntegerLinear(module))
            linears += 1
        elif isinstance(module, (QuantizedConv1d, QuantizedConv2d)):
            model.set_submodule(name, _IntegerConv(module))
        elif isinstance(module, QuantizedEmbedding):
            model.set_submodule(name, _IntegerEmbedding(module))
    return linears
