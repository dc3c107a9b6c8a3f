# SPDX-License-Identifier: Apache-2.0
"""Goals in the place of settings: what a smaller model must keep, and how large and slow it may be."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

_SIZES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_TIMES = {"": 1.0, "us": 1e-3, "ms": 1.0, "s": 1e3}
_AMOUNT = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*([a-zA-Z]*)\s*")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a trial.

    Args:
        kept (`float`): the file's metric as a share of the model's.
        size (`float`): bytes of the file.
        latency (`float`, *optional*): milliseconds of a call, where it was timed.
    """

    kept: float
    size: float
    latency: float | None = None

    def is_beaten_by(self, other: Outcome) -> bool:
        """Whether another is as good in everything and better in something."""
        own, others = self._costs(), other._costs()
        return own != others and all(theirs <= mine for mine, theirs in zip(own, others, strict=True))

    def _costs(self) -> tuple[float, float, float]:
        return (-self.kept, self.size, math.inf if self.latency is None else self.latency)


@dataclass(frozen=True, kw_only=True)
class Goals:
    """The bounds of a search.

    Args:
        keep (`float`, *optional*): least share of the model's metric that the file keeps, in (0, 1.5].
        max_size (`float`, *optional*): bytes of the file at most.
        max_latency (`float`, *optional*): milliseconds of a call at most.

    Raises:
        ValueError: a bound that no file could meet or miss.
    """

    keep: float | None = None
    max_size: float | None = None
    max_latency: float | None = None

    def __post_init__(self) -> None:
        if self.keep is not None and not 0 < self.keep <= 1.5:
            raise ValueError(f"--keep is a share of the model's metric such as 0.99, got {self.keep}.")
        for name, value in (("--max-size", self.max_size), ("--max-latency", self.max_latency)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be larger than 0, got {value}.")

    def missed(self, outcome: Outcome) -> dict[str, float]:
        """By how much, as a share of each bound, an outcome misses those that it does not meet."""
        found = {}
        if self.keep is not None and outcome.kept < self.keep:
            found["--keep"] = 1 - outcome.kept / self.keep
        for name, bound, value in (
            ("--max-size", self.max_size, outcome.size), ("--max-latency", self.max_latency, outcome.latency),
        ):  # fmt: skip
            if bound is not None and value is not None and value > bound:
                found[name] = value / bound - 1
        return found

    def score(self, outcome: Outcome) -> float:
        """What a search maximizes: what is kept, where all bounds are met, else below 0 the more they are missed."""
        missed = sum(self.missed(outcome).values())
        return -missed if missed else outcome.kept

    def best(self, outcomes: Mapping[int, Outcome]) -> int | None:
        """The trial that meets all bounds and keeps most, of equal ones the smallest; `None` if none meets them."""
        fine = {number: outcome for number, outcome in outcomes.items() if not self.missed(outcome)}
        return max(fine, key=lambda number: (fine[number].kept, -fine[number].size, -number), default=None)

    def explain(self, outcomes: Mapping[int, Outcome]) -> str:
        """Which bounds no trial met and by how much, or that all are met but not together; one sentence."""
        if not outcomes:
            return "No trial came to its end, so nothing is known of the bounds."
        told = []
        for name, best, bound in (
            ("--keep", max(o.kept for o in outcomes.values()), self.keep),
            ("--max-size", min(o.size for o in outcomes.values()), self.max_size),
            ("--max-latency", min((o.latency for o in outcomes.values() if o.latency is not None), default=None), self.max_latency),
        ):  # fmt: skip
            if bound is None or best is None:
                continue
            if (best < bound) if name == "--keep" else (best > bound):
                told.append(f"{name} {_amount(name, bound)} is missed by all: the best has {_amount(name, best)}")
        nearest = max(outcomes, key=lambda number: self.score(outcomes[number]))
        if not told:
            missed = self.missed(outcomes[nearest])
            told = ["every bound is met by some trial, and never all together"]
            told += [f"trial {nearest} misses {name} by {share:.1%}" for name, share in missed.items()]
        return f"Of {len(outcomes)} trials that came to their end none meets all bounds; {'; '.join(told)}."


def parse_size(text: str) -> float:
    """Bytes of `10MB`, `800kB` or `1.5 GiB`. Raises `ValueError`: it is no size."""
    return _parsed(text, _SIZES, "a size such as 10MB")


def parse_time(text: str) -> float:
    """Milliseconds of `5ms` or `0.2s`; of a number alone, milliseconds. Raises `ValueError`: it is no time."""
    return _parsed(text, _TIMES, "a time such as 5ms")


def _parsed(text: str, units: Mapping[str, float], words: str) -> float:
    found = _AMOUNT.fullmatch(text)
    if found is None or found[2].lower() not in units:
        raise ValueError(f"expected {words}, got {text[:40]!r}")
    return float(found[1]) * units[found[2].lower()]


def _amount(name: str, value: float) -> str:
    return {"--keep": f"{value:.4g}", "--max-size": f"{value / 1e6:.3g} MB", "--max-latency": f"{value:.3g} ms"}[name]
