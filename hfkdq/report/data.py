# SPDX-License-Identifier: Apache-2.0
"""The measured facts of a report as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..export.precisions import recorded_precision
from ..export.record import Export, FileFacts, Timing
from ..facts import Facts
from ..measuring.latency import Latency
from ..schema import check


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """The data set of the metrics, for people and for the Hub.

    Args:
        name (`str`): name to read, such as `"Rotten Tomatoes"`.
        id (`str`, *optional*): id on the Hub, such as `"cornell-movie-review-data/rotten_tomatoes"`.
        config (`str`, *optional*): the configuration given to `load_dataset`.
        split (`str`, *optional*): the split, such as `"test"`.
        revision (`str`, *optional*): commit of the data set.
    """

    name: str
    id: str | None = None
    config: str | None = None
    split: str | None = None
    revision: str | None = None


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One row of the report: a model in PyTorch or a file in ONNX Runtime.

    Args:
        name (`str`): name of the row.
        kind (`str`): `"torch"` or `"onnx"`.
        metrics (`dict[str, float]`): what `compute_metrics` gave.
        size (`int`): bytes on disk: `model.safetensors`, or `model.onnx` with its external data.
        parameters (`int`, *optional*): parameters in the checkpoint; for PyTorch.
        sparsity (`float`, *optional*): share of zeros in the weights of linear layers; for PyTorch.
        latency ([`Latency`], *optional*): if it was timed.
        parity (`dict`, *optional*): what the export recorded about the file's difference from the model; for ONNX.
        files (`dict`): size (`bytes`) and `sha256` of every file with weights in the folder, by name; for ONNX.
    """

    name: str
    kind: str
    metrics: dict[str, float]
    size: int
    parameters: int | None = None
    sparsity: float | None = None
    latency: Latency | None = None
    parity: dict[str, Any] | None = None
    files: dict[str, FileFacts] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """The fields of a [`CompressionReport`], and the ratios of its rows."""

    engines: tuple[Engine, ...]
    architecture: str
    samples: int
    task: str | None = None
    processor: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    timing: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    dataset: DatasetInfo | None = None
    base_model: str | None = None
    license: str | None = None
    language: str | list[str] | None = None

    def size_ratio(self, engine: Engine) -> float:
        """Bytes of `engine` as a share of those of the first row."""
        return engine.size / self.engines[0].size

    def speedup(self, engine: Engine) -> float | None:
        """How many times faster than the first row `engine` is, by median latency; `None` if that is unknown."""
        first = self.engines[0].latency
        return None if first is None or engine.latency is None else first.median_ms / engine.latency.median_ms

    @property
    def is_noisy(self) -> bool:
        """Whether a median is more than twice the fastest call: the machine did other work while latency was timed."""
        return any(e.latency is not None and e.latency.median_ms > 2 * e.latency.min_ms for e in self.engines)


def check_renderable(report: ReportData) -> None:
    """Refuses a report with a field that no code, table or plot can be made of; one line names it."""
    for name, value in (("architecture", report.architecture), ("processor", report.processor)):
        if value is not None and not (isinstance(value, str) and value.isidentifier() and value.isascii()):
            raise ValueError(f"{name} is {shortened(value)}, expected the name of a class")
    for number, engine in enumerate(report.engines):
        _check_engine(engine, f"engines[{number}]")
    if report.samples < 0:
        raise ValueError(f"samples is {report.samples}, expected 0 or more")
    check(report.facts, Facts, "facts")
    check(report.timing, Timing, "timing")
    if report.timing and not {"threads", "rounds", "inputs"} <= set(report.timing):
        raise ValueError("timing lacks threads, rounds or inputs")


def _check_engine(engine: Engine, where: str) -> None:
    latency = engine.latency
    wrong = {
        "kind": engine.kind not in ("torch", "onnx"),
        "size": engine.size <= 0,
        "parameters": engine.parameters is not None and engine.parameters < 0,
        "sparsity": engine.sparsity is not None and not 0 <= engine.sparsity <= 1,
        "latency": latency is not None and not (0 < latency.min_ms <= latency.median_ms and latency.calls > 0),
    }
    for name, is_wrong in wrong.items():
        if is_wrong:
            raise ValueError(f"{where}.{name} is {shortened(getattr(engine, name))}, which nothing can be measured as")
    if engine.parity is not None:
        check(engine.parity, Export, f"{where}.parity")


def shortened(value: Any) -> str:
    """The `repr` of a value, of at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def row_name(facts: Mapping[str, Any]) -> str:
    """The name of the row of a file, from what its export recorded: `"ONNX int8"`."""
    precision = recorded_precision(facts)
    label = facts.get("kind") if precision is None else precision.label
    return f"ONNX {label}" if label else "ONNX"
