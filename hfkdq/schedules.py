# SPDX-License-Identifier: Apache-2.0
"""Functions of training progress, for weights, temperatures and sparsities. A schedule is any callable from progress
in [0, 1] to a number."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .fields import check_fields, extremes, value_at  # noqa: F401  (for users too)

Schedule = Callable[[float], float]
LayerSchedule = Callable[[float, int], Sequence[float]]
"""From progress and a number of layers to a weight for each of them."""


@dataclass(frozen=True)
class _Ramp:
    """From `start` to `end`, constant before progress `begin` and after progress `until`.

    Args:
        start (`float`): the value up to progress `begin`.
        end (`float`): the value from progress `until` on.
        begin (`float`, defaults to 0.0): progress at which the change begins.
        until (`float`, defaults to 1.0): progress at which the change is complete.

    Raises:
        ValueError: unless 0 <= begin < until <= 1.
    """

    start: float
    end: float
    begin: float = 0.0
    until: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0.0 <= self.begin < self.until <= 1.0:
            raise ValueError(f"Need 0 <= begin < until <= 1, got begin={self.begin!r} and until={self.until!r}.")

    def __call__(self, progress: float) -> float:
        return self._at(min(max((progress - self.begin) / (self.until - self.begin), 0.0), 1.0))

    def _at(self, done: float) -> float:
        return self.start + (self.end - self.start) * self._shape(done)

    def _shape(self, done: float) -> float:
        raise NotImplementedError


class Linear(_Ramp):
    """A straight line; arguments as for every ramp: `start`, `end`, `begin`, `until`."""

    def _shape(self, done: float) -> float:
        return done


class Cosine(_Ramp):
    """Half a cosine wave, `(1 - cos(pi * t)) / 2`: slow, fast, slow; arguments as for every ramp."""

    def _shape(self, done: float) -> float:
        return (1.0 - math.cos(math.pi * done)) / 2.0


class Cubic(_Ramp):
    """`1 - (1 - t) ** 3`: fast, then ever slower (Zhu and Gupta 2017); arguments as for every ramp."""

    def _shape(self, done: float) -> float:
        return 1.0 - (1.0 - done) ** 3


@dataclass(frozen=True)
class Step:
    """One value before progress `at`, another from there on.

    Args:
        start (`float`): the value before.
        end (`float`): the value from `at` on.
        at (`float`, defaults to 0.5): progress in [0, 1].
    """

    start: float
    end: float
    at: float = 0.5

    def __post_init__(self) -> None:
        check_fields(self)

    def __call__(self, progress: float) -> float:
        return self.end if progress >= self.at else self.start


@dataclass(frozen=True)
class Exponential(_Ramp):
    """`start * (end / start) ** t`: by the same factor in equal times; arguments as for every ramp.

    Raises:
        ValueError: unless `start` and `end` are larger than 0.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if not min(self.start, self.end) > 0:
            told = f"start and end must be larger than 0, got {self.start!r} and {self.end!r}"
            raise ValueError(f"Exponential multiplies, so {told}.")

    def _at(self, done: float) -> float:
        return float(self.start * (self.end / self.start) ** done)


@dataclass(frozen=True)
class Piecewise:
    """Straight lines between points.

    Args:
        points (sequence of pairs): `(progress, value)` by rising progress; constant before the first and after the last.

    Raises:
        ValueError: no point, progress outside of [0, 1] or not rising.

    Example:
        ```python
        >>> from hfkdq.schedules import Piecewise
        >>> Piecewise([(0.0, 1.0), (0.5, 1.0), (1.0, 0.0)])(0.75)
        0.5

        ```
    """

    points: Sequence[tuple[float, float]]

    def __post_init__(self) -> None:
        places = [place for place, _ in self.points]
        if not all(math.isfinite(value) for _, value in self.points):
            raise ValueError(f"Piecewise needs finite values, got {self.points!r}.")
        if not places or places != sorted(set(places)) or not 0.0 <= places[0] <= places[-1] <= 1.0:
            raise ValueError(f"Piecewise needs points at rising progress in [0, 1], got {self.points!r}.")

    def __call__(self, progress: float) -> float:
        before = [(place, value) for place, value in self.points if place <= progress]
        after = [(place, value) for place, value in self.points if place > progress]
        if not before or not after:
            return float((before or after)[-1 if before else 0][1])
        (a, low), (b, high) = before[-1], after[0]
        return low + (high - low) * (progress - a) / (b - a)


@dataclass(frozen=True)
class BottomUp:
    """Layers by stages of equal length, the lowest first.

    Args:
        cumulative (`bool`, defaults to `True`): layers stay when others are added; else one at a time.
    """

    cumulative: bool = True

    def __call__(self, progress: float, layers: int) -> list[float]:
        """1 for the layers that count at `progress`, 0 for the others, the lowest first."""
        stage = min(int(progress * layers), layers - 1)
        return [float(i <= stage if self.cumulative else i == stage) for i in range(layers)]


@dataclass(frozen=True)
class TopDown(BottomUp):
    """Layers by stages of equal length, the highest first; arguments as for [`BottomUp`]."""

    def __call__(self, progress: float, layers: int) -> list[float]:
        """1 for the layers that count at `progress`, 0 for the others, the lowest first."""
        return super().__call__(progress, layers)[::-1]
