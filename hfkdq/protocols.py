# SPDX-License-Identifier: Apache-2.0
"""The contracts between rooms of the package that do not import one another."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import Tensor, nn

_Weight = TypeVar("_Weight")

QUANT_METHOD = "hfkdq"
"""What `quantization_config` of a configuration calls a quantization that hfkdq recorded in it."""


@runtime_checkable
class FakeQuantized(Protocol):
    """A module with fake quantizers; while `fake_quantize_enabled` is `False` it computes in floating point."""

    fake_quantize_enabled: bool


@runtime_checkable
class SwappedLayer(Protocol):
    """A layer whose class was changed in place."""

    @property
    def plain_class(self) -> type[nn.Module]:
        """The class that the layer had before."""


@runtime_checkable
class FollowsPruning(Protocol):
    """A layer that keeps values per channel besides its weight and bias, such as scales."""

    def check_inputs(self, count: int) -> None:
        """Raises `ValueError` where the layer cannot be left with `count` inputs."""

    def keep_outputs_(self, kept: Tensor) -> None:
        """Follows a pruning that has left the output channels `kept`, indices in ascending order."""


@runtime_checkable
class Adapted(Protocol):
    """A layer whose weight is quantized together with the `adapter` of PEFT around it; `None` without one."""

    adapter: Any


@runtime_checkable
class Bypassable(Protocol):
    """A layer of a stack; while `bypassed` is `True` it returns its input unchanged."""

    bypassed: bool


@runtime_checkable
class Adaptive(Protocol):
    """A weight of an objective that follows measurements of the training rather than its progress."""

    def adapt(self, sums: list[float]) -> None:
        """Takes in what was measured in an optimizer step, summed over micro batches and processes."""

    def copy(self: _Weight) -> _Weight:
        """The same weight without measurements."""
