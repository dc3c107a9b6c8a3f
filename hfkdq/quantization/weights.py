# SPDX-License-Identifier: Apache-2.0
"""The weights of one module as integers, simulated in floating point."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..specs import QuantizationScheme
from .grids import SMALLEST_SCALE, Grid, fake_quantize, scale_gradient, straight_through
from .scales import find_scale, kmeans_codebook

# Lloyd's iterations at the start; while training goes on, one a step follows the weights.
_KMEANS_STEPS = 20


def recomputing() -> bool:
    """Whether this forward is a repetition inside a backward pass, as gradient checkpointing makes it."""
    # What is compiled is not repeated: its own backward recomputes, and what checkpoint repeats around it is not compiled.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class Stateless(nn.Module):
    """A module that writes nothing to a state dict, expects nothing from one, and stays in its own precision."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Follows its model to another device, never to another precision.
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None: ...

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None: ...


class WeightQuantizer(Stateless):
    r"""Simulates a weight tensor in integers: its forward pass gives the values of the integers.

    Scales are a function of the weights, at every call, so that a checkpoint of the weights says all; but for
    `weight_estimator="learned"`, where they are parameters, and k-means, whose codebook follows the weights in training.
    The gradient goes to the weights unchanged. With learned scales it is that of LSQ (Esser et al., "Learned Step Size
    Quantization", 2020): nothing outside of the range, and for the scale \\(q - w/s\\) inside and q outside, times
    \\(1/\sqrt{N Q}\\) with the N weights that share it.

    Args:
        scheme (`QuantizationScheme`): how.
        weight (`torch.Tensor`): the weights, for their shape and as a start.
        transposed (`bool`, defaults to `False`): whether output channels are the last axis rather than the first.
        gates (`int`, *optional*): channels, where they are not the rows: the gates of a recurrent layer, blocks of rows;
            the outputs of all experts of a layer, whose weight has three axes.
        name (`str`, defaults to `"the module"`): of the module, for errors.

    Attributes:
        bits (`int`): the present bits; `scheme.weight_bits` unless `set_bits` changed it.
        share (`float`): share of the output channels that a training pass quantizes, drawn at random (Fan et al.,
            "Training with Quantization Noise for Extreme Model Compression", 2021). 1.0 by default.
        frozen (`bool`): whether a codebook stays as it is in training.

    Raises:
        ValueError: `group_size` does not divide the inputs of a channel, or a scale does not fit into `storage_dtype`.
    """

    scale: nn.Parameter
    codebook: Tensor

    def __init__(
        self,
        scheme: QuantizationScheme,
        weight: Tensor,
        *,
        transposed: bool = False,
        gates: int | None = None,
        name: str = "the module",
    ) -> None:
        super().__init__()
        self.scheme, self.transposed, self.gates = scheme, transposed, gates
        self.bits, self.share, self.frozen = scheme.weight_bits, 1.0, False
        inputs = weight.numel() // (gates or (weight.shape[-1] if transposed else weight.shape[0]))
        if scheme.group_size is not None and inputs % scheme.group_size:
            raise ValueError(
                f"group_size={scheme.group_size} does not divide the {inputs} inputs of a channel of {name}. Choose "
                f'one that does, or give this module its own: overrides={{"{name}": {{"group_size": None}}}}.'
            )
        if scheme.weight_estimator == "learned":
            blocks = self.blocks(weight.detach().float())
            self.scale = nn.Parameter(find_scale(blocks, self.grid, "mean_abs", 100.0)[0])
        self.start_codebook(weight)
        self.check_storage(weight, name)

    @property
    def grid(self) -> Grid:
        return Grid(self.bits, self.scheme.symmetric, self.scheme.weight_mapping, self.scheme.power)

    @property
    def estimator(self) -> str:
        if self.scheme.weight_mapping == "kmeans":
            return "min_max"  # the codebook is in units of the largest weight
        if self.scheme.weight_estimator is not None:
            return self.scheme.weight_estimator
        return "mean_abs" if self.grid.high == 1 and self.scheme.symmetric else "min_max"

    @torch.no_grad()
    def set_bits(self, bits: int, weight: Tensor) -> None:
        """Changes the bits; a learned scale keeps its range, a codebook starts anew."""
        before, self.bits = self.grid.high, bits
        if hasattr(self, "scale"):
            self.scale.mul_(before / self.grid.high)
        self.start_codebook(weight)

    @torch.no_grad()
    def start_codebook(self, weight: Tensor) -> None:
        """Finds the codebook of k-means from the weights as they are; nothing for other mappings."""
        if self.scheme.weight_mapping == "kmeans" and self.bits < 16:
            codebook = kmeans_codebook(self._normalised(weight), 2**self.bits, steps=_KMEANS_STEPS)
            self.register_buffer("codebook", codebook, persistent=False)

    def _normalised(self, weight: Tensor) -> Tensor:
        blocks = self.blocks(weight.detach().float())
        return blocks / self._scales(blocks)[0]

    def check_storage(self, weight: Tensor, name: str) -> None:
        """Refuses scales, and weights of 16 bits, that `storage_dtype` cannot hold.

        Raises:
            ValueError: one overflows, or a scale vanishes.
        """
        if self.scheme.storage_dtype != "float16":
            return
        if self.bits == 16:
            largest = float(weight.detach().abs().amax())
            if largest > torch.finfo(torch.float16).max:
                raise ValueError(
                    f"The largest weight of {name}, {largest:.3g}, does not fit into float16 (at most 65504). Use "
                    "storage_dtype='bfloat16'."
                )
            return
        blocks = self.blocks(weight.detach().float())
        scale = self.scale.detach() if hasattr(self, "scale") else self._scales(blocks, stored=False)[0]
        stored = scale.half()
        lost = (stored == 0) & (blocks.abs().amax(dim=-1, keepdim=True) > 0)
        if bool(stored.isinf().any()) or bool(lost.any()):
            raise ValueError(
                f"A scale of the weights of {name}, between {float(scale.min()):.3g} and {float(scale.max()):.3g}, does "
                "not fit into float16 (6e-08 to 65504). Use storage_dtype='bfloat16' or 'float32'."
            )

    def blocks(self, weight: Tensor) -> Tensor:
        """`weight` as (channels, groups, values): what shares a scale lies along the last axis."""
        if not self.scheme.per_channel:
            return weight.reshape(1, 1, -1)
        rows = weight.transpose(-1, -2) if self.transposed else weight
        channels, size = self.gates or rows.shape[0], self.scheme.group_size
        return rows.reshape(channels, 1, -1) if size is None else rows.reshape(channels, -1, size)

    def restore(self, blocks: Tensor, shape: torch.Size) -> Tensor:
        if self.transposed and self.scheme.per_channel:
            return blocks.reshape(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)
        return blocks.reshape(shape)

    def _scales(self, blocks: Tensor, stored: bool = True) -> tuple[Tensor, Tensor | None]:
        scale, zero_point = find_scale(blocks, self.grid, self.estimator, self.scheme.percentile)
        return (self._stored(scale) if stored else scale), zero_point

    def _stored(self, scale: Tensor) -> Tensor:
        if self.scheme.storage_dtype == "float32":
            return scale
        return scale.to(getattr(torch, self.scheme.storage_dtype)).float().clamp(min=SMALLEST_SCALE)

    @torch.no_grad()
    def qparams(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point (`None` for symmetric weights), float32 of shape (channels, groups, 1)."""
        if hasattr(self, "scale"):
            return self._stored(self.scale.detach().clamp(min=SMALLEST_SCALE)), None
        return self._scales(self.blocks(weight.detach().float()))

    @torch.no_grad()
    def codes(self, weight: Tensor) -> Tensor:
        """The integers that the forward pass stands for, in the shape of `weight`: int8, or uint8 if there is no sign.

        Raises:
            ValueError: the weights have 16 bits, which are no integers.
        """
        if self.bits == 16:
            raise ValueError(
                f"Weights of 16 bits are {self.scheme.storage_dtype} numbers and have no integers. Take the weight itself, "
                "or 8 bits or less."
            )
        scale, zero_point = self.qparams(weight)
        codes = self.grid.codes(self.blocks(weight.detach().float()), scale, zero_point, self._codebook())
        return self.restore(codes, weight.shape).to(torch.int8 if self.grid.low < 0 else torch.uint8)

    def _codebook(self) -> Tensor | None:
        return getattr(self, "codebook", None)

    def _in_16_bits(self, values: Tensor) -> Tensor:
        return straight_through(values, values.detach().to(getattr(torch, self.scheme.storage_dtype)))

    def forward(self, weight: Tensor) -> Tensor:
        """The values of the integers of `weight`, in its shape and precision."""
        if self.bits == 16:
            return self._in_16_bits(weight)
        if hasattr(self, "scale"):
            return self._noisy(weight, self._learned(weight, self.scale))
        self._follow(weight)
        plain = self.scheme.group_size is None and not self.transposed and self.gates is None
        # Not through `blocks` where shapes allow it, so that the fused kernel gets the weight itself.
        rows = weight if plain else self.blocks(weight).flatten(0, 1)
        quantized = self._quantized(rows, *self.qparams(weight))
        return self._noisy(weight, quantized if plain else self.restore(quantized, weight.shape))

    def _quantized(self, rows: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """`rows`, one for each scale or all for one, on the grid."""
        grid = self.grid
        if grid.mapping == "linear" and not (grid.bits == 1 and grid.symmetric):
            flat = scale.reshape(-1) if self.scheme.per_channel else scale.reshape(())
            zero = torch.zeros_like(flat) if zero_point is None else zero_point.reshape(flat.shape)
            if self.estimator == "min_max" and grid.symmetric and self.scheme.storage_dtype == "float32":
                # Nothing is clipped here. -2**(b-1) is never reached; ONNX has no grid that leaves it out.
                return fake_quantize(rows, flat, zero.int(), grid.low - 1, grid.high, clips=False)
            with torch.no_grad():
                quantized = fake_quantize(rows.detach(), flat, zero.int(), grid.low, grid.high)
        else:
            with torch.no_grad():
                blocks = rows.detach().float().reshape(*scale.shape[:2], -1)
                quantized = grid.quantize(blocks, scale, zero_point, self._codebook()).reshape(rows.shape)
        return straight_through(rows, quantized)

    def _learned(self, values: Tensor, scale: Tensor, blocked: bool = False, count: int | None = None) -> Tensor:
        with torch.autocast(values.device.type, enabled=False):
            if self.training and torch.is_grad_enabled():
                with torch.no_grad():
                    self.scale.clamp_(min=SMALLEST_SCALE)
            blocks = (values if blocked else self.blocks(values)).float()
            shared = blocks.shape[-1] if self.scheme.per_channel else count or blocks.numel()
            scale = scale_gradient(scale.clamp(min=SMALLEST_SCALE), 1.0 / math.sqrt(shared * self.grid.high))
            scale = straight_through(scale, self._stored(scale.detach()))
            codes = (blocks * (1.0 / scale)).clamp(self.grid.low, self.grid.high)
            codes = straight_through(codes, codes.detach().round())
            quantized = (codes * scale).to(values.dtype)
            return quantized if blocked else self.restore(quantized, values.shape)

    def rows(self, rows: Tensor, index: Tensor, table: Tensor) -> Tensor:
        """`rows`, which are `table[index]` of shape `(*index.shape, width)`, on the grid of the whole table."""
        if self.bits == 16:
            return self._in_16_bits(rows)
        if not rows.numel():
            return rows
        flat = rows.reshape(-1, rows.shape[-1])
        if hasattr(self, "scale"):
            scale = self.scale[index.reshape(-1)] if self.scheme.per_channel else self.scale
            quantized = self._learned(flat.unsqueeze(1), scale, blocked=True, count=table.numel()).squeeze(1)
        else:
            self._follow(table)
            if self.scheme.per_channel:  # a row's scale depends on itself alone
                blocks = self.blocks(flat)
                quantized = self._quantized(blocks.flatten(0, 1), *self._scales(blocks.detach().float()))
            else:
                quantized = self._quantized(flat, *self.qparams(table))
        quantized = quantized.reshape(rows.shape)
        if not self._draws:
            return quantized
        chosen = torch.rand(len(table), device=rows.device) < self.share
        return torch.where(chosen[index].unsqueeze(-1), quantized, rows)

    def _follow(self, weight: Tensor) -> None:
        if self.scheme.weight_mapping == "kmeans" and self.training and not self.frozen and not recomputing():
            with torch.no_grad():
                self.codebook.copy_(kmeans_codebook(self._normalised(weight), len(self.codebook), self.codebook))

    @property
    def _draws(self) -> bool:
        return self.training and self.share < 1.0

    def _noisy(self, weight: Tensor, quantized: Tensor) -> Tensor:
        """`quantized` in a random share of the output channels of a training pass, `weight` in the others."""
        if not self._draws:
            return quantized
        shape = [1] * weight.ndim
        axis = -1 if self.transposed else 0
        shape[axis] = weight.shape[axis]
        return torch.where(torch.rand(shape, device=weight.device) < self.share, quantized, weight)
