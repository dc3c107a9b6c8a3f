# SPDX-License-Identifier: Apache-2.0
"""Times engines side by side, each in a process of its own, in turn."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ..bars import progress_bar
from ..fields import MOST_THREADS
from ..schema import brief
from ..secrets import without_secrets
from . import worker

TURN_SECONDS = 0.5
# The threads of ONNX Runtime keep a core busy for about 20 ms after its last call.
SETTLE_SECONDS = 0.05
STDERR_TAIL = 2000
BUSY = 2.0
"""The factor between two estimates of one ratio, or two rounds of it, from which on it is not told."""
_PACKAGES = ("numpy", "onnxruntime", "openvino", "torch", "transformers", "safetensors")


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Milliseconds of one call.

    Args:
        median_ms (`float`): median of all timed calls.
        min_ms (`float`): the fastest of them.
        calls (`int`): how many were timed.
        rounds (`tuple[float]`): the median of each turn; empty in records of earlier releases.
    """

    median_ms: float
    min_ms: float
    calls: int
    rounds: tuple[float, ...] = ()


@dataclass(frozen=True)
class TimedEngine:
    """What a worker needs to know: row name, how to load it, checkpoint folder or ONNX file, and inputs.

    `load` takes path, inputs and threads, and returns what is timed; the worker imports it by its name.
    """

    name: str
    load: Callable[..., Any]
    path: Path
    inputs: Mapping[str, np.ndarray[Any, Any]]


class _Worker:
    """The process of one engine, from its start until `close`."""

    def __init__(self, engine: TimedEngine, folder: Path, number: int, threads: int) -> None:
        self.name = engine.name
        inputs = folder / f"{number}.npz"
        np.savez(inputs, **engine.inputs)  # type: ignore[arg-type]
        task = {
            "engine": f"{engine.load.__module__}:{engine.load.__qualname__}", "path": str(engine.path.absolute()),
            "inputs": str(inputs), "threads": threads, "packages": package_folders(),
            "hfkdq": str(Path(__file__).parents[1]),
        }  # fmt: skip
        environment = without_secrets(os.environ) | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        self._errors = (folder / f"{number}.stderr").open("w+", errors="replace")
        # Isolated: neither the current folder, where anybody's files may lie, nor PYTHONPATH says what is imported.
        self._process = subprocess.Popen(
            [sys.executable, "-I", worker.__file__, json.dumps(task)], cwd=folder, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self._errors, text=True, env=environment,
        )  # fmt: skip

    def time(self, seconds: float) -> list[float]:
        """Milliseconds of each call of a turn."""
        if self._process.stdin is None:
            raise RuntimeError(f"The process that times {self.name!r} has no input.")
        with contextlib.suppress(BrokenPipeError):  # `read` tells why it is gone
            self._process.stdin.write(f"{seconds}\n")
            self._process.stdin.flush()
        return list(map(float, json.loads(self.read())))

    def close(self) -> None:
        """Ends the process: its input ends, and if that does not do it, it is killed."""
        with contextlib.suppress(BrokenPipeError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._errors.close()

    def read(self) -> str:
        """The next line that the process says; the first one, once it is ready."""
        line = self._process.stdout.readline() if self._process.stdout is not None else ""
        if line:
            return line
        code = self._process.wait()
        self._errors.seek(0)
        tail = self._errors.read()[-STDERR_TAIL:].strip() or "it said nothing"
        last = brief(RuntimeError(tail.splitlines()[-1])).rstrip(".")
        raise RuntimeError(
            f"The process that times {self.name!r} ended with code {code}: {last}. Where quality is measured too, "
            "latency_rounds=0 leaves latency out."
        ) from RuntimeError(tail)


def package_folders() -> list[str]:
    """The entries of `sys.path` that the packages of an engine come from, in their order."""
    specs = [find_spec(name) for name in _PACKAGES]
    homes = {Path(spec.origin).parents[1] for spec in specs if spec is not None and spec.origin is not None}
    return [str(Path(entry).absolute()) for entry in sys.path if entry and Path(entry).absolute() in homes]


def check_counts(**limits: tuple[Any, int]) -> None:
    """Refuses what is no integer or too small, and too many threads; names of arguments to their values and the least
    that they may be. Raises `ValueError`: one of them is."""
    for name, (value, least) in limits.items():
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}.")
        if name == "threads" and value > MOST_THREADS:
            raise ValueError(f"threads must be at most {MOST_THREADS}, got {value!r}.")


def time_engines(engines: Sequence[TimedEngine], *, threads: int, rounds: int) -> list[Latency]:
    """As [`time_calls`]: the latency of each engine, over all its turns."""
    return [latency_of(turns) for turns in time_calls(engines, threads=threads, rounds=rounds)]


def time_calls(engines: Sequence[TimedEngine], *, threads: int, rounds: int) -> list[list[list[float]]]:
    """Milliseconds of every call of every turn of each engine, timed in turn (A B C A B C ...), each in a process of its
    own with as many threads.

    The spinning threads of an idle ONNX Runtime session slow other engines in the same process, and machines drift; so
    engines share no process, and none has a stretch of time to itself. A turn is about half a second, 10 to 2,000
    calls, after 3 that do not count; each engine has `rounds` of them. Raises `RuntimeError`: a process ended early; the
    message holds the last line of what it wrote to its standard error, and its cause the lines before.
    """
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        workers = []
        for number, engine in enumerate(engines):
            workers.append(_Worker(engine, Path(folder), number, threads))
            stack.callback(workers[-1].close)
        for worker in workers:
            worker.read()
        timings: list[list[list[float]]] = [[] for _ in workers]
        turns = [(index, worker) for _ in range(rounds) for index, worker in enumerate(workers)]
        for index, worker in progress_bar(turns, desc="Latency"):
            time.sleep(SETTLE_SECONDS)
            timings[index].append(worker.time(TURN_SECONDS))
    return timings


def latency_of(turns: Sequence[Sequence[float]]) -> Latency:
    """Median, minimum and medians by turn of the calls of an engine."""
    calls = [ms for turn in turns for ms in turn]
    rounds = tuple(statistics.median(turn) for turn in turns)
    return Latency(median_ms=statistics.median(calls), min_ms=min(calls), calls=len(calls), rounds=rounds)


def paired_ratios(first: Latency, other: Latency) -> list[float]:
    """How many times faster `other` was in each round: by the medians of the turns of both, which followed one another."""
    return [a / b for a, b in zip(first.rounds, other.rounds, strict=False)]


def is_busy(first: Latency, other: Latency) -> bool:
    """Whether the machine was too busy for a ratio of two engines: by the medians it is more than `BUSY` times or less than a
    `BUSY`th of what it is by the fastest calls, or one paired round gives more than `BUSY` times what another does."""
    two = [first.median_ms / other.median_ms, first.min_ms / other.min_ms]
    return any(max(ratios) > BUSY * min(ratios) for ratios in (two, paired_ratios(first, other)) if ratios)


def speedup(first: Latency, other: Latency) -> float | None:
    """How many times faster `other` is: the median of the ratios of paired rounds, or the ratio of the medians where there are no
    rounds; `None` where the machine was too busy to tell."""
    if is_busy(first, other):
        return None
    ratios = paired_ratios(first, other)
    return statistics.median(ratios) if ratios else first.median_ms / other.median_ms


def speedup_interval(first: Latency, other: Latency) -> tuple[float, float] | None:
    """The lowest and the highest ratio of paired rounds; `None` where there are no two rounds, or no ratio is given."""
    ratios = paired_ratios(first, other)
    return None if len(ratios) < 2 or is_busy(first, other) else (min(ratios), max(ratios))


def rounds_confidence(rounds: int) -> float:
    """How often the lowest and the highest of so many paired ratios hold the median ratio (sign test)."""
    return 1 - 0.5 ** (rounds - 1)


def total_latency(found: Iterable[tuple[Latency, int]]) -> Latency:
    """The latency of several calls, each so many times: a sum of medians, and of minima."""
    found = list(found)
    each_round = zip(*([median * times for median in latency.rounds] for latency, times in found), strict=False)
    return Latency(
        median_ms=sum(latency.median_ms * times for latency, times in found),
        min_ms=sum(latency.min_ms * times for latency, times in found),
        calls=min(latency.calls for latency, _ in found), rounds=tuple(map(sum, each_round)),
    )  # fmt: skip
