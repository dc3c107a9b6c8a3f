# SPDX-License-Identifier: Apache-2.0
"""Layers that hold trained integers, and trace to operators of ONNX."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from ...quantization import (
    QuantizedConv1D,
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedModule,
)
from ..operators import onnx_op
from .activations import ActivationQDQ, dequantize, quantize
from .weights import StoredWeight, WideWeight, stored_weight, unpack

# Fewer channels of a convolution's input make windows too narrow for products of bytes to pay.
MIN_CHANNELS = 32


class Lowered(nn.Module):
    """Base of what takes the place of a layer: it has the attributes that model code may read, such as kernel sizes."""

    def __init__(self, layer: nn.Module) -> None:
        nn.Module.__init__(self)
        known = {*vars(self), *_OF_QUANTIZERS}
        vars(self).update({name: each for name, each in vars(layer).items() if name not in known})
        self._buffers.update(layer._buffers)


_OF_QUANTIZERS = ("quantization_spec", "quantization_scheme", "fake_quantize_enabled", "adapter")


class _Linear(Lowered):
    """Base of linear layers: smoothing, the grid of the input, the bias."""

    factors: Tensor | None

    def __init__(self, linear: QuantizedLinear | QuantizedConv1D) -> None:
        super().__init__(linear)
        self.input = ActivationQDQ(linear.activation_quantizer)
        self.register_buffer("factors", linear.smoothing.factors)
        self.bias = cast("Tensor | None", linear.bias)

    def quantized_input(self, values: Tensor) -> Tensor:
        return self.input(values if self.factors is None else values / self.factors)


class _Codes(Lowered):
    """Codes of a weight, a byte each, transposed as MatMul wants them: (inputs, out_channels)."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    def _store(self, module: QuantizedModule, codes: Tensor) -> None:
        zero_point = module.weight_zero_point()
        self.register_buffer("codes", codes.contiguous())
        self.register_buffer("scale", module.weight_scale())
        zeros = torch.zeros_like(self.scale) if zero_point is None else zero_point
        self.register_buffer("zero_point", zeros.to(codes.dtype))

    @property
    def weight(self) -> Tensor:
        """The values of the codes; some models ask a layer for its precision."""
        return (self.codes.float() - self.zero_point.float()) * self.scale


class IntegerLinear(_Linear, _Codes):
    """A linear layer that multiplies int8 or uint8 codes of the weight with uint8 codes of the input."""

    def __init__(self, linear: QuantizedLinear | QuantizedConv1D, table: StoredWeight | None = None) -> None:
        super().__init__(linear)
        self.is_table = table is not None
        if table is not None:  # the file has its codes once, and they are turned when it is loaded
            self.register_buffer("codes", table.packed)
            self.register_buffer("scale", table.scale.reshape(-1))
            middle = table.zero_point
            zeros = torch.full_like(self.scale, table.offset) if middle is None else middle.reshape(-1)
            self.register_buffer("zero_point", zeros.to(table.packed.dtype))
            return
        codes = linear.integer_weight()
        self._store(linear, codes if isinstance(linear, QuantizedConv1D) else codes.t())

    def forward(self, input: Tensor) -> Tensor:
        # ONNX Runtime makes a Gemm of what has two axes and has no fused integer kernel for it; with three it has.
        flat = input.dim() == 2
        values = input.unsqueeze(0) if flat else input
        codes = self.codes.t() if self.is_table else self.codes
        values = self.quantized_input(values) @ dequantize(codes, self.scale, self.zero_point)
        if self.bias is not None:
            values = values + self.bias
        return values.squeeze(0) if flat else values


class NBitLinear(_Linear):
    """A linear layer whose weight stays in blocks of integers in memory: one `MatMulNBits`."""

    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def __init__(self, linear: QuantizedLinear | QuantizedConv1D) -> None:
        super().__init__(linear)
        transposed = isinstance(linear, QuantizedConv1D)
        self.weight = StoredWeight(linear.weight_quantizer, linear.effective_weight(), transposed)
        self.block_size, packed, scale, zero_point = self.weight.blocks()
        for name, value in (("packed", packed), ("scale", scale), ("zero_point", zero_point)):
            self.register_buffer(name, value)

    def forward(self, input: Tensor) -> Tensor:
        weight, zeros = self.weight, () if self.zero_point is None else (self.zero_point,)

        # From its arguments alone: a tracer looks inside, and knows no other tensors.
        def compute(values: Tensor, packed: Tensor, scale: Tensor, *zeros: Tensor) -> Tensor:
            middle = [unpack(each.reshape(weight.channels, -1), weight.bits) for each in zeros]
            zero = middle[0][:, : packed.shape[1], None] if middle else float(2 ** (weight.bits - 1))
            blocks = (unpack(packed, weight.bits) - zero) * scale.reshape(weight.channels, -1, 1)
            return values @ blocks.flatten(1)[:, : weight.inputs].t()

        # Accuracy level 1 is in float32; faster ones round the input to 8 bits.
        values = onnx_op(
            "com.microsoft::MatMulNBits", *(self.quantized_input(input), self.packed, self.scale, *zeros), compute=compute,
            opset=1, K=weight.inputs, N=weight.channels, bits=weight.bits, block_size=self.block_size, accuracy_level=1,
        )  # fmt: skip
        return values if self.bias is None else values + self.bias


class FoldedLinear(_Linear):
    """A linear layer whose weight is small in the file, and made floating point when the file is loaded."""

    def __init__(
        self, linear: QuantizedLinear | QuantizedConv1D, table: WideWeight | StoredWeight | None = None
    ) -> None:
        super().__init__(linear)
        self.weight = _stored(linear) if table is None else table

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(self.quantized_input(input), self.weight.values(), self.bias)


class IntegerConv1d(_Codes):
    """A convolution over a sequence that multiplies the codes of its windows with those of its weight.

    ONNX Runtime's integer convolution takes longer than its float one; its product of bytes is several times as fast.
    The codes of the weight are (kernel_size * in_channels, out_channels), in the order in which windows lie side by side.
    """

    kernel_size: tuple[int]
    stride: tuple[int]
    padding: tuple[int]
    dilation: tuple[int]

    def __init__(self, conv: QuantizedConv1d) -> None:
        super().__init__(conv)
        self.input = ActivationQDQ(conv.activation_quantizer)
        self._store(conv, conv.integer_weight().permute(2, 1, 0).flatten(0, 1))
        self.bias = conv.bias

    @staticmethod
    def fits(conv: QuantizedConv1d) -> bool:
        """Whether a convolution can be written so, and has enough channels to be faster for it."""
        is_plain = conv.groups == 1 and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
        return is_plain and conv.in_channels >= MIN_CHANNELS and IntegerConv.fits(conv)

    def forward(self, input: Tensor) -> Tensor:
        codes = quantize(input, self.input.scale, self.input.zero_point).transpose(1, 2)
        (kernel,), (stride,), (padding,), (dilation,) = self.kernel_size, self.stride, self.padding, self.dilation
        if padding:
            edge = self.input.zero_point.expand(codes.shape[0], padding, codes.shape[2])
            codes = torch.cat([edge, codes, edge], dim=1)
        # Window by window, what lies `dilation` apart; ends count from the end, so that no length need be known.
        reach = dilation * (kernel - 1)
        starts = [dilation * index for index in range(kernel)]
        windows = [codes[:, start : (start - reach) or None : stride] for start in starts]
        rows = dequantize(torch.cat(windows, dim=2), self.input.scale, self.input.zero_point)
        values = rows @ dequantize(self.codes, self.scale, self.zero_point)
        if self.bias is not None:
            values = values + self.bias
        return values.transpose(1, 2)


class _Conv(Lowered):
    """Base of convolutions that stay such: the grid of the input, the bias."""

    def __init__(self, conv: QuantizedConv1d | QuantizedConv2d) -> None:
        super().__init__(conv)
        self.input = ActivationQDQ(conv.activation_quantizer)
        self.bias = conv.bias
        self.kind = nn.Conv1d if isinstance(conv, nn.Conv1d) else nn.Conv2d

    def forward(self, input: Tensor) -> Tensor:
        return self.kind._conv_forward(self, self.input(input), self.weight, self.bias)  # type: ignore[arg-type]


class IntegerConv(_Conv, _Codes):
    """A convolution of codes of its weight, (out_channels, in_channels / groups, *kernel_size), with codes of its input."""

    def __init__(self, conv: QuantizedConv1d | QuantizedConv2d) -> None:
        super().__init__(conv)
        self._store(conv, conv.integer_weight())

    @staticmethod
    def fits(conv: QuantizedConv1d | QuantizedConv2d) -> bool:
        """Whether there is an integer kernel for such codes."""
        scheme = conv.quantization_scheme
        is_linear = scheme.weight_mapping == "linear" and scheme.weight_bits <= 8 and scheme.group_size is None
        return is_linear and ActivationQDQ(conv.activation_quantizer).is_integer

    @property
    def weight(self) -> Tensor:
        """The values of the codes."""
        return dequantize(self.codes, self.scale, self.zero_point, axis=0)


class FoldedConv(_Conv):
    """A convolution whose weight is small in the file, and made floating point when the file is loaded."""

    def __init__(self, conv: QuantizedConv1d | QuantizedConv2d) -> None:
        super().__init__(conv)
        self.stored = _stored(conv)
        self.shape = tuple(conv.weight.shape)

    @property
    def weight(self) -> Tensor:
        """The values of the codes; some models ask their convolution for its precision."""
        return self.stored.values().reshape(self.shape)


class StoredEmbedding(Lowered, nn.Embedding):
    """A table that gathers the codes of rows and what they are multiplied with."""

    def __init__(self, embedding: QuantizedEmbedding, unsigned: bool = False) -> None:
        super().__init__(embedding)
        # Who takes it without a lookup has it in floating point in training too, as relative positions are.
        self.weight = embedding.weight
        self.stored = _stored(embedding, unsigned)

    @classmethod
    def of(cls, embedding: QuantizedEmbedding, unsigned: bool) -> StoredEmbedding:
        """The table in the place of `embedding`; a subclass that scales rows or shifts indices goes on doing so."""
        stored, plain = cls(embedding, unsigned), type(embedding).plain_class
        if plain is not nn.Embedding:
            stored.__class__ = type(f"Stored{plain.__name__}", (plain, cls), {})
        return stored

    def forward(self, input: Tensor) -> Tensor:
        return self.stored.rows(input)


def _stored(module: QuantizedModule, unsigned: bool = False) -> WideWeight | StoredWeight:
    """The weight of a module in as few bits as it has."""
    transposed = isinstance(module, QuantizedConv1D)
    return stored_weight(module.weight_quantizer, module.effective_weight(), transposed, unsigned)
