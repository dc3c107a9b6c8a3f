# SPDX-License-Identifier: Apache-2.0
"""Functions of training progress, for weights, temperatures and sparsities.

A schedule is any callable from progress in [0, 1] to a number; it knows neither steps nor trainers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

Schedule = Callable[[float], float]


def value_at(value: float | Schedule, progress: float) -> float:
    """The number that `value` stands for at `progress`: itself, or what the schedule gives."""
    return float(value(progress)) if callable(value) else float(value)


def extremes(value: float | Schedule, samples: int = 101) -> tuple[float, float]:
    """Smallest and largest number that `value` takes over `samples` points of progress, for validation up front."""
    values = [value_at(value, i / (samples - 1)) for i in range(samples)]
    return min(values), max(values)


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
        if not 0.0 <= self.begin < self.until <= 1.0:
            raise ValueError(f"Need 0 <= begin < until <= 1, got begin={self.begin!r} and until={self.until!r}.")

    def __call__(self, progress: float) -> float:
        done = (progress - self.begin) / (self.until - self.begin)
        return self.start + (self.end - self.start) * self._shape(min(max(done, 0.0), 1.0))

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

    def __call__(self, progress: float) -> float:
        return self.end if progress >= self.at else self.start
