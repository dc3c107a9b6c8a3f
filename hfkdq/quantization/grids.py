# SPDX-License-Identifier: Apache-2.0
"""Grids of integers, and fake quantization to them: pure functions of tensors, in float32."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Keeps empty channels and ranges from dividing by zero; far below any scale that training produces.
SMALLEST_SCALE = 1e-12
MaybeTensor = Tensor | None


def compand(values: Tensor, power: float) -> Tensor:
    """`sign(x) * |x| ** power`, elementwise."""
    return values.sign() * values.abs().pow(power)


def expand(values: Tensor, power: float) -> Tensor:
    """The inverse of [`compand`]: `sign(x) * |x| ** (1 / power)`."""
    return values.sign() * values.abs().pow(1.0 / power)


@dataclass(frozen=True)
class Grid:
    r"""The integers of one tensor, and the values they stand for.

    `values(codes(x))` is the quantized x. With scale s and zero point z, both broadcast against x:

    - `"linear"`: \\(q = \mathrm{clamp}(\mathrm{round}(x / s) + z, low, high)\\), value \\(s (q - z)\\), ties to even; one
      symmetric bit: \\(q = 1\\) where \\(x \ge 0\\), else -1.
    - `"power_law"`: the same of \\(f(x) = sign(x)|x|^p\\), value \\(f^{-1}(s (q - z))\\).
    - `"power_of_two"`: \\(q = 0\\) is 0, other q stand for \\(\pm s 2^{|q| - high}\\); the nearest is taken.
    - `"kmeans"`: q is the index of the nearest value of a sorted codebook, in units of s.
    """

    bits: int
    symmetric: bool = True  # codes in [-Q, Q] without a zero point, rather than [0, 2**bits - 1] with one
    mapping: str = "linear"
    power: float = 0.5  # of the power law

    @property
    def low(self) -> int:
        return -self.high if self.symmetric and self.mapping != "kmeans" else 0

    @property
    def high(self) -> int:
        if self.mapping == "kmeans" or not self.symmetric:
            return int(2**self.bits) - 1
        return max(int(2 ** (self.bits - 1)) - 1, 1)

    @property
    def top(self) -> float:
        """The largest value at scale 1 and zero point 0, in the domain where the scale counts."""
        return 1.0 if self.mapping in ("power_of_two", "kmeans") else float(self.high)

    def domain(self, values: Tensor) -> Tensor:
        """`values` where scales count: companded for the power law."""
        return compand(values, self.power) if self.mapping == "power_law" else values

    def codes(self, values: Tensor, scale: Tensor, zero_point: MaybeTensor, codebook: MaybeTensor = None) -> Tensor:
        """The codes of `values`, as float32 integers of their shape."""
        if self.mapping == "kmeans" and codebook is not None:
            borders = (codebook[1:] + codebook[:-1]) / 2
            return torch.bucketize((values / scale).contiguous(), borders).float()
        if self.mapping == "power_of_two":
            return self._nearest_power(values / scale)
        if self.bits == 1 and self.symmetric:
            return torch.where(values >= 0, 1.0, -1.0)
        # Times the reciprocal, and rounded before the zero point is added, as torch's fused kernels do it.
        codes = (self.domain(values) * (1.0 / scale)).round()
        return (codes if zero_point is None else codes + zero_point).clamp(self.low, self.high)

    def _nearest_power(self, ratio: Tensor) -> Tensor:
        size = ratio.abs()
        # Between 2**-k and 2**-(k+1) the middle is 0.75 * 2**-k; frexp gives the exponent exactly.
        exponent = torch.frexp(size / 0.75).exponent - 1
        code = (self.high + exponent).clamp(1, self.high).float()
        return torch.where(size * 2.0**self.high >= 1.0, code, torch.zeros_like(code)) * ratio.sign()

    def values(self, codes: Tensor, scale: Tensor, zero_point: MaybeTensor, codebook: MaybeTensor = None) -> Tensor:
        """The values of `codes`, float32."""
        if self.mapping == "kmeans" and codebook is not None:
            return codebook[codes.long()] * scale
        if self.mapping == "power_of_two":
            return torch.ldexp(codes.sign() * scale, torch.where(codes == 0, codes, codes.abs() - self.high).int())
        values = (codes if zero_point is None else codes - zero_point) * scale
        return expand(values, self.power) if self.mapping == "power_law" else values

    def quantize(self, values: Tensor, scale: Tensor, zero_point: MaybeTensor, codebook: MaybeTensor = None) -> Tensor:
        return self.values(self.codes(values, scale, zero_point, codebook), scale, zero_point, codebook)


def constant(tensor: Tensor) -> Tensor:
    """`tensor` as a value that a tracer records as a constant, whatever it was computed from."""
    if not torch.jit.is_tracing():  # type: ignore[attr-defined]
        return tensor
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's warning of what is wanted here
        return torch.tensor(tensor.tolist(), dtype=tensor.dtype, device=tensor.device)


def fake_quantize(
    values: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int, clips: bool = True
) -> Tensor:
    """Rounds `values` to a linear grid, per tensor or per row, with the straight-through gradient inside the range.
    `clips=False` says that none is outside, which saves looking."""
    scale, zero_point = constant(scale), constant(zero_point)
    if torch.compiler.is_compiling():  # torch.compile cannot look into the kernels, and makes one of these itself
        with torch.no_grad():
            quantized, inside = _on_grid(values.detach(), scale, zero_point, low, high, clips)
        return straight_through(values, quantized, inside)
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined]
    if values.device.type == "cpu" and not tracing:  # there the kernels are several times slower than what they fuse
        return _FakeQuantize.apply(values, scale, zero_point, low, high, clips)
    # They compute in float32 for bfloat16 and float16 values too, and round once at the end.
    if scale.ndim:
        return torch.fake_quantize_per_channel_affine(values, scale, zero_point, 0, low, high)
    return torch.fake_quantize_per_tensor_affine(values, scale, zero_point, low, high)


def _on_grid(
    values: Tensor, scale: Tensor, zero_point: Tensor | int, low: int, high: int, clips: bool
) -> tuple[Tensor, Tensor | None]:
    """The result of the fused kernels, in float32, and a mask of values inside the range if they may be outside."""
    if scale.ndim and isinstance(zero_point, Tensor):
        shape = (-1, *[1] * (values.ndim - 1))
        scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
    steps = (values.float() * (1.0 / scale)).round_()
    if not clips:
        return steps.mul_(scale), None
    lowest: Any = low - zero_point
    quantized = steps.clamp(lowest, high - zero_point)
    inside = steps == quantized
    return quantized.mul_(scale), inside


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int, clips: bool
    ) -> Tensor:
        # On the CPU a number costs no wait, and bounds that are numbers are faster.
        zero = zero_point if zero_point.ndim else int(zero_point)
        quantized, inside = _on_grid(values, scale, zero, low, high, clips)
        ctx.save_for_backward(inside)
        return quantized.to(values.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (inside,) = ctx.saved_tensors
        return grads[0] if inside is None else grads[0] * inside, None, None, None, None, None


class _LearnedFakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor, offset: Tensor, zero_point: Tensor, high: int) -> Tensor:
        floats = values.float()
        steps = (floats * (1.0 / scale)).round_()
        codes = steps.clamp(-zero_point, high - zero_point)
        inside = steps == codes
        quantized = codes.mul_(scale)
        ctx.save_for_backward(floats, quantized, inside, scale, offset)
        return quantized.to(values.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        floats, quantized, inside, scale, offset = ctx.saved_tensors
        grad = grads[0].float()
        within = grad * inside
        without = (grad - within).flatten()
        to_scale = within.flatten().dot((quantized - floats).flatten()) + without.dot((quantized - offset).flatten())
        return within.to(grads[0].dtype), to_scale / scale, without.sum(), None, None


def learned_fake_quantize(values: Tensor, scale: Tensor, offset: Tensor, zero_point: Tensor, high: int) -> Tensor:
    """Rounds `values` to an unsigned linear grid whose scale and offset have the gradients of LSQ+. Inside the range
    that of the scale is `(x̂ - x) / s` and that of the offset 0; outside they are `(x̂ - offset) / s` and 1. Scale,
    offset (the value of the smallest code; 0 where it does not move) and zero point are float32 scalars; `high` is the
    largest code."""
    return _LearnedFakeQuantize.apply(values, scale, offset, zero_point, high)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, quantized: Tensor, mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(mask)
        return quantized.to(values.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (mask,) = ctx.saved_tensors
        return grads[0] if mask is None else grads[0] * mask, None, None


def straight_through(values: Tensor, quantized: Tensor, mask: Tensor | None = None) -> Tensor:
    """`quantized`, whose gradient goes to `values` unchanged, or only where `mask` is 1."""
    return _StraightThrough.apply(values, quantized, mask)


def scale_gradient(values: Tensor, factor: float) -> Tensor:
    """`values`, whose gradient arrives multiplied by `factor`."""
    return values.detach() + (values - values.detach()) * factor
