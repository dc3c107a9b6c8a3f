# SPDX-License-Identifier: Apache-2.0
"""The trained integers of one weight, as few bytes as they need, and how a graph gets their values back.

Knows codes, scales and codebooks; nothing of layers.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from ...quantization import QuantizedModule
from ...quantization.grids import Grid, expand

# Neighbours that share a scale where a channel is one group; MatMulNBits wants a power of two.
BLOCKS = (128, 64, 32, 16)


class StoredWeight(nn.Module):
    """Codes of a weight, several to a byte where they are narrow, with scales, zero points and codebook.

    Args:
        module (`QuantizedModule`): the layer.
        transposed (`bool`): whether output channels are the last axis of its weight.

    Attributes:
        packed (`torch.Tensor`): uint8, of shape (channels, bytes).
        scale (`torch.Tensor`): of shape (channels or 1, groups, 1).
        zero_point (`torch.Tensor`, *optional*): in the shape of `scale`.
        offset (`int`): what was added to make codes unsigned.
        bits (`int`): of one stored code: 2, 4 or 8.
    """

    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None
    codebook: Tensor | None

    def __init__(self, module: QuantizedModule, transposed: bool = False) -> None:
        super().__init__()
        quantizer = module.weight_quantizer
        self.grid: Grid = quantizer.grid
        codes = module.integer_weight()
        self.shape = codes.shape
        codes = (codes.t() if transposed else codes.reshape(len(codes), -1)).short()
        self.channels, self.inputs = codes.shape
        self.bits = next(bits for bits in (2, 4, 8) if bits >= quantizer.bits)
        self.offset = 2 ** (self.bits - 1) if self.grid.low < 0 else 0
        self.register_buffer("packed", pack(codes + self.offset, self.bits))
        scale, zero_point = quantizer.qparams(module.effective_weight())
        self.register_buffer("scale", scale.clone())
        self.register_buffer("zero_point", zero_point)
        codebook = getattr(quantizer, "codebook", None)
        self.register_buffer("codebook", None if codebook is None else codebook.detach().clone())

    @property
    def is_linear(self) -> bool:
        """Whether a value is a scale times an integer."""
        return self.grid.mapping == "linear"

    def values(self) -> Tensor:
        """The weight, of shape (channels, inputs), in operators that ONNX Runtime computes once, when it loads."""
        return self._values(self.packed, self.scale, self.zero_point)

    def rows(self, index: Tensor) -> Tensor:
        """Rows of a table, of shape (*index, inputs)."""
        # One scale for all stays as it is.
        scale, zero_point = (
            None if each is None else each[index] if len(each) > 1 else each for each in (self.scale, self.zero_point)
        )
        return self._values(nn.functional.embedding(index, self.packed), cast(Tensor, scale), zero_point)

    def _values(self, packed: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        codes = unpack(packed, self.bits)[..., : self.inputs]
        if self.offset:
            codes = codes - self.offset
        blocks = codes.reshape(*codes.shape[:-1], scale.shape[-2], -1)
        if self.codebook is not None:
            values = self.codebook[blocks.long()] * scale
        elif self.grid.mapping == "power_of_two":
            values = blocks.sign() * scale * torch.pow(2.0, blocks.abs() - self.grid.high)
        else:
            values = (blocks if zero_point is None else blocks - zero_point) * scale
            values = expand(values, self.grid.power) if self.grid.mapping == "power_law" else values
        return values.flatten(-2)

    def blocks(self) -> tuple[int, Tensor, Tensor, Tensor | None]:
        """What `MatMulNBits` takes: its block size, codes (channels, blocks, bytes), scales and packed zero points."""
        groups = self.scale.shape[1]
        size = self.inputs // groups if groups > 1 else next((b for b in BLOCKS if self.inputs % b == 0), 32)
        count = -(-self.inputs // size)
        codes = unpack(self.packed, self.bits)[:, : self.inputs]
        padded = nn.functional.pad(codes, (0, count * size - self.inputs))
        packed = pack(padded.reshape(self.channels, count, size).short(), self.bits)
        scale, zero_point = (
            None if each is None else each.squeeze(-1).expand(self.channels, count).contiguous()
            for each in (self.scale, self.zero_point)
        )
        zeros = None if zero_point is None else pack(zero_point.short(), self.bits).flatten()
        return size, packed, cast(Tensor, scale).flatten(), zeros


def pack(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes as bytes, the first in the lowest bits: (..., n) becomes (..., ceil(n * bits / 8))."""
    count = 8 // bits
    padded = nn.functional.pad(codes, (0, -codes.shape[-1] % count))
    digits = padded.reshape(*codes.shape[:-1], -1, count)
    return (digits * 2 ** (bits * torch.arange(count))).sum(-1).to(torch.uint8)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack`, as float32 of shape (..., bytes * 8 / bits), in operators that all opsets have."""
    rest, base, digits = packed.float(), 2.0**bits, []
    for _ in range(8 // bits - 1):
        higher = torch.floor(rest / base)
        digits.append(rest - higher * base)
        rest = higher
    return torch.stack([*digits, rest], dim=-1).flatten(-2) if digits else rest
