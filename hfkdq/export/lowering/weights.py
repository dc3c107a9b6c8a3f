# SPDX-License-Identifier: Apache-2.0
"""The trained integers of one weight, as few bytes as they need, and how a graph gets their values back."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from ...quantization import WeightQuantizer
from ...quantization.grids import Grid, expand

# Neighbours that share a scale where a channel is one group; MatMulNBits wants a power of two.
BLOCKS = (128, 64, 32, 16)


class _Stored(nn.Module):
    """Base of stored weights: what model code asks a weight for, the type of its values and where they are."""

    dtype = torch.float32

    @property
    def device(self) -> torch.device:
        return next(self.buffers()).device


class StoredWeight(_Stored):
    """Codes of a weight, several to a byte where they are narrow, with scales, zero points and codebook.

    `packed` is (channels, bytes): int8 codes as they are, narrower or unsigned ones in uint8; `scale` and `zero_point` are
    (channels or 1, groups). `bits` of a stored code are 2, 4 or 8; `offset` was added to make narrow codes unsigned.
    `transposed`: output channels are the last axis of the weight; `unsigned`: int8 codes become uint8 too. The channels of
    a weight with gates are these.
    """

    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None
    codebook: Tensor | None

    def __init__(
        self, quantizer: WeightQuantizer, weight: Tensor, transposed: bool = False, unsigned: bool = False
    ) -> None:
        super().__init__()
        self.grid: Grid = quantizer.grid
        codes = quantizer.codes(weight)
        codes = codes.transpose(-1, -2) if transposed else codes
        codes = codes.reshape(quantizer.gates or len(codes), -1)
        self.channels, self.inputs = codes.shape
        self.bits = next(bits for bits in (2, 4, 8) if bits >= quantizer.bits)
        self.offset = 2 ** (self.bits - 1) if self.grid.low < 0 and (self.bits < 8 or unsigned) else 0
        shifted = codes.short() + self.offset
        whole = shifted.to(codes.dtype if not self.offset else torch.uint8)
        self.register_buffer("packed", pack(shifted, self.bits) if self.bits < 8 else whole)
        scale, zero_point = quantizer.qparams(weight)
        self.register_buffer("scale", scale.squeeze(-1).clone())
        self.register_buffer("zero_point", None if zero_point is None else zero_point.squeeze(-1))
        codebook = getattr(quantizer, "codebook", None)
        self.register_buffer("codebook", None if codebook is None else codebook.detach().clone())

    def values(self) -> Tensor:
        """The weight, of shape (channels, inputs), in operators that ONNX Runtime computes once, when it loads."""
        return self._values(self.packed, self.scale, self.zero_point)

    def rows(self, index: Tensor) -> Tensor:
        """Rows of a table, of shape (*index, inputs)."""
        zeros = None if self.zero_point is None else _rows(self.zero_point, index)
        return self._values(nn.functional.embedding(index, self.packed), _rows(self.scale, index), zeros)

    def _values(self, packed: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        codes = packed.float() if self.bits == 8 else unpack(packed, self.bits)[..., : self.inputs]
        if self.offset:
            codes = codes - self.offset
        if self.scale.shape[1] == 1:
            return self._on_grid(codes, scale, zero_point)
        blocks = codes.reshape(*codes.shape[:-1], self.scale.shape[1], -1)
        zeros = None if zero_point is None else zero_point.unsqueeze(-1)
        return self._on_grid(blocks, scale.unsqueeze(-1), zeros).flatten(-2)

    def _on_grid(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """[`Grid.values`] in operators that can be traced."""
        if self.codebook is not None:
            return self.codebook[codes.long()] * scale
        if self.grid.mapping == "power_of_two":
            return codes.sign() * scale * torch.pow(2.0, codes.abs() - self.grid.high)
        values = (codes if zero_point is None else codes - zero_point) * scale
        return expand(values, self.grid.power) if self.grid.mapping == "power_law" else values

    def blocks(self) -> tuple[int, Tensor, Tensor, Tensor | None]:
        """The inputs of `MatMulNBits`: its block size, codes (channels, blocks, bytes), scales and packed zero points."""
        groups = self.scale.shape[1]
        size = self.inputs // groups if groups > 1 else next((b for b in BLOCKS if self.inputs % b == 0), 32)
        count = -(-self.inputs // size)
        codes = unpack(self.packed, self.bits)[:, : self.inputs]
        # Without zero points the operator takes the middle of the unsigned codes for zero.
        codes = codes + 128 if self.packed.dtype == torch.int8 else codes
        padded = nn.functional.pad(codes, (0, count * size - self.inputs))
        packed = pack(padded.reshape(self.channels, count, size).short(), self.bits)
        scale, zero_point = (
            None if each is None else each.expand(self.channels, count).contiguous()
            for each in (self.scale, self.zero_point)
        )
        zeros = None if zero_point is None else pack(zero_point.short(), self.bits).flatten()
        return size, packed, cast(Tensor, scale).flatten(), zeros


class WideWeight(_Stored):
    """A weight of 16 bits, (channels, inputs)."""

    stored: Tensor

    def __init__(self, quantizer: WeightQuantizer, weight: Tensor, transposed: bool = False) -> None:
        super().__init__()
        rows = weight.detach().transpose(-1, -2) if transposed else weight.detach()
        rows = rows.reshape(quantizer.gates or len(rows), -1)
        self.register_buffer("stored", rows.to(getattr(torch, quantizer.scheme.storage_dtype)))

    def values(self) -> Tensor:
        return self.stored.float()

    def rows(self, index: Tensor) -> Tensor:
        return nn.functional.embedding(index, self.stored).float()


def stored_weight(
    quantizer: WeightQuantizer, weight: Tensor, transposed: bool = False, unsigned: bool = False
) -> WideWeight | StoredWeight:
    """A weight in as few bits as its quantizer gives it."""
    if quantizer.bits == 16:
        return WideWeight(quantizer, weight, transposed)
    return StoredWeight(quantizer, weight, transposed, unsigned)


def _rows(table: Tensor, index: Tensor) -> Tensor:
    """`table[index]`; the one row for all stays as it is."""
    return nn.functional.embedding(index, table) if len(table) > 1 else table


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
