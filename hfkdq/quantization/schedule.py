# SPDX-License-Identifier: Apache-2.0
"""The QAT schedule: when fake quantizers begin, weights get fewer bits, ranges freeze, and how fast they are learned."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..specs import QuantizationSpec
from .batch_norm import freeze_batch_norm_
from .layers import weight_quantizers_of
from .naming import quantized_modules
from .records import activation_quantizers, set_enabled_, set_weight_bits_, weight_quantizers

BitSchedule = Mapping[float, int] | Sequence[Sequence[float]]


@dataclass(frozen=True)
class QATState:
    """State of the quantizers at a point of training; weights have at least `bits` bits, 0 for those of the spec."""

    enabled: bool
    frozen: bool
    batch_norm_frozen: bool
    bits: int
    share: float

    def apply_(self, model: nn.Module) -> None:
        set_enabled_(model, self.enabled)
        for quantizer in activation_quantizers(model).values():
            quantizer.frozen = self.frozen
        for module in quantized_modules(model).values():
            width = module.quantization_scheme.weight_bits
            set_weight_bits_(module, max(width, self.bits))
            for weights, _ in weight_quantizers_of(module).values():
                weights.frozen, weights.share = self.frozen, self.share
        if self.batch_norm_frozen:
            freeze_batch_norm_(model)


@dataclass
class QATSchedule:
    """The QAT schedule; see `QATCallback` for the arguments. Raises `ValueError`: a point of training outside [0, 1],
    bits that do not fall, or end above those of the spec."""

    spec: InitVar[QuantizationSpec]
    begin: float
    freeze_ranges: float | None
    freeze_batch_norm: float | None
    lower_bits: Any  # a `BitSchedule` or `None`; then pairs of progress and bits
    quantized_share: float

    def __post_init__(self, spec: QuantizationSpec) -> None:
        steps = self.lower_bits.items() if isinstance(self.lower_bits, Mapping) else self.lower_bits or ()
        self.lower_bits = sorted([float(at), int(bits)] for at, bits in steps)
        for name, value in (
            ("begin", self.begin), ("freeze_ranges", self.freeze_ranges), ("freeze_batch_norm", self.freeze_batch_norm),
            *(("a key of lower_bits", at) for at, _ in self.lower_bits),
        ):  # fmt: skip
            if value is not None and not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} is a point of training, 0 the start and 1 the end; got {value!r}.")
        if self.begin == 1.0:
            raise ValueError("begin=1.0 leaves no training with fake quantizers. Use quantize(model, spec) for that.")
        if self.freeze_ranges is not None and self.freeze_ranges <= self.begin:
            told = f"freeze_ranges={self.freeze_ranges} must come after begin={self.begin}"
            raise ValueError(f"{told}: ranges are found between.")
        if not 0.0 < self.quantized_share <= 1.0:
            raise ValueError(f"quantized_share must be in (0, 1], got {self.quantized_share!r}.")
        widths = [bits for _, bits in self.lower_bits]
        unknown = [bits for bits in widths if bits not in spec.WEIGHT_BITS[1:]]
        if unknown or widths != sorted(widths, reverse=True) or len(set(widths)) < len(widths):
            raise ValueError(
                f"lower_bits must fall, through {', '.join(map(str, spec.WEIGHT_BITS[1:]))}, as "
                f"{{0.0: 8, 0.3: 4, 0.6: 2}}; got {dict(self.lower_bits)}."
            )
        if widths and widths[-1] != spec.weight_bits:
            raise ValueError(f"lower_bits ends at {widths[-1]} bits, the spec has weight_bits={spec.weight_bits}.")

    @property
    def schedule_end(self) -> float:
        return max([self.begin, *(at for at, _ in self.lower_bits)])

    def at(self, progress: float) -> QATState:
        due = [bits for at, bits in self.lower_bits if at <= progress]
        # Before the first entry its bits hold too.
        bits = due[-1] if due else self.lower_bits[0][1] if self.lower_bits else 0
        return QATState(
            enabled=progress >= self.begin, bits=bits, share=self.quantized_share,
            frozen=self.freeze_ranges is not None and progress >= self.freeze_ranges,
            batch_norm_frozen=self.freeze_batch_norm is not None and progress >= self.freeze_batch_norm,
        )  # fmt: skip


def learned_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The learned ranges of activations and scales of weights of `model`, which the optimizer trains with the rest."""
    quantizers = [*activation_quantizers(model).values(), *weight_quantizers(model).values()]
    # A table and the head that shares it have one quantizer.
    return [parameter for quantizer in dict.fromkeys(quantizers) for parameter in quantizer.parameters(recurse=False)]


class UpdateScaling:
    """Multiplies what an optimizer step does to some parameters. For every optimizer whose step is proportional to its
    learning rate, this is a learning rate of their own. A parameter group, which would say the same, cannot be added
    by a callback before the Trainer loads the state of the optimizer that it resumes. Raises `ValueError`: the factor
    is negative or not finite."""

    def __init__(self, factor: float) -> None:
        if not (factor >= 0.0 and math.isfinite(factor)):
            raise ValueError(f"learning_rate_factor must be a number of 0 or more, got {factor!r}.")
        self.factor = factor
        self._before: list[tuple[nn.Parameter, Tensor]] = []
        self._now = factor

    def before_step(self, model: nn.Module, frozen: bool) -> None:
        """Remembers the learned parameters of a model; `frozen` ones will stay where they are."""
        self._now = 0.0 if frozen else self.factor
        if self._now != 1.0:
            self._before = [(parameter, parameter.detach().clone()) for parameter in learned_parameters(model)]

    @torch.no_grad()
    def after_step_(self) -> None:
        for parameter, before in self._before:
            parameter.copy_(before + self._now * (parameter - before))
        self._before = []
