# SPDX-License-Identifier: Apache-2.0
"""The measured facts of a report as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..export.choices import OPENVINO
from ..export.precisions import recorded_precision
from ..export.record import Export, FileFacts, Timing, each_precision
from ..facts import Facts
from ..measuring.latency import Latency, is_busy, rounds_confidence, speedup, speedup_interval
from ..schema import Count, FreeText, check, shortened
from .environment import MEDIUM

if TYPE_CHECKING:
    Text = str
else:
    Text = FreeText  # what JSON is held against

RUNTIMES = {"onnx": ("ONNX", "ONNX Runtime"), OPENVINO: ("OpenVINO", "OpenVINO")}
"""What files of a kind are called, and what runs them."""


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """The data set of the metrics, for people and for the Hub.

    Args:
        name (`str`): name to read, such as `"Rotten Tomatoes"`.
        id (`str`, *optional*): id on the Hub, such as `"cornell-movie-review-data/rotten_tomatoes"`.
        config (`str`, *optional*): the configuration given to `load_dataset`.
        split (`str`, *optional*): the split, such as `"test"`.
        revision (`str`, *optional*): commit of the data set.
        task_id (`str`, *optional*): where the data set is a benchmark of the Hub, the name of the task in it. [`push_to_hub`] then adds
            the first metric of the last row as a file in `.eval_results`, which the leaderboard of the benchmark reads.
    """

    name: str
    id: str | None = None
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    task_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What the sample call of the card printed on the last file.

    Args:
        runner (`str`): what ran it: `"optimum"`, or `"exporters"`, those of Transformers.
        printed (`str`): what was printed.
    """

    runner: Text
    printed: Text


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A weight of a model.

    Args:
        name (`str`): its name in the checkpoint.
        parameters (`int`): how many numbers it holds.
        bits (`int`): of each of them: of its fake quantizer, else of its data type, or as a file has it on disk.
        sparsity (`float`, *optional*): share of zeros; `None` for integers of a file that are packed, or whose zero is another number.
    """

    name: str
    parameters: Count
    bits: Count
    sparsity: float | None = None


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """A row that the first engine gets right, or better, and the last one wrong.

    Args:
        row (`int`): its number in the data set, from 0.
        scores (`dict[str, float]`): the first metric on this row alone, by engine.
        said (`dict[str, str]`): what each engine says of it, such as the name of a class, where that can be told.
        label (`str`, *optional*): what is right.
        texts (`dict[str, str]`): its texts, by column.
        media (`dict[str, str]`): its images and sounds, by column, as `data:` addresses of PNG and WAV files.
    """

    row: int
    scores: dict[Text, float]
    said: dict[Text, Text] = field(default_factory=dict)
    label: Text | None = None
    texts: dict[Text, Text] = field(default_factory=dict)
    media: dict[Text, Text] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One row of the report: a model in PyTorch, or a file in ONNX Runtime or OpenVINO.

    Args:
        name (`str`): name of the row.
        kind (`str`): `"torch"`, `"onnx"` or `"openvino"`.
        metrics (`dict[str, float]`): what `compute_metrics` gave.
        size (`int`): bytes on disk: `model.safetensors`, `model.onnx` with its external data, or `openvino_model.xml` and `.bin`.
        parameters (`int`, *optional*): parameters in the checkpoint; for PyTorch.
        sparsity (`float`, *optional*): share of zeros in the weights of linear layers; for PyTorch.
        latency ([`Latency`], *optional*): if it was timed.
        parity (`dict`, *optional*): what the export recorded about the file's difference from the model; for files.
        files (`dict`): size (`bytes`) and `sha256` of every file with weights in the folder, by name; for files.
        intervals (`dict[str, list[float]]`): lower and upper bound of metrics over the rows, 95 %.
        changes (`dict[str, list[float]]`): the bounds of how much metrics differ from those of the first row, on the same rows.
        layers (`tuple` of [`Layer`]): its weights of two axes and more.
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
    intervals: dict[str, list[float]] = field(default_factory=dict)
    changes: dict[str, list[float]] = field(default_factory=dict)
    layers: tuple[Layer, ...] = ()


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
    curves: dict[Text, list[list[float]]] = field(default_factory=dict)
    mistakes: tuple[Mistake, ...] = ()
    training: dict[Text, Any] = field(default_factory=dict)
    sample: Sample | None = None

    def size_ratio(self, engine: Engine) -> float:
        """Bytes of `engine` as a share of those of the first row."""
        return engine.size / self.engines[0].size

    def speedup(self, engine: Engine) -> float | None:
        """How many times faster than the first row `engine` is, by paired rounds; `None` if it was not timed, or the machine was too
        busy to tell."""
        first = self.engines[0].latency
        return None if first is None or engine.latency is None else speedup(first, engine.latency)

    def speedup_interval(self, engine: Engine) -> tuple[float, float] | None:
        """The lowest and the highest ratio of paired rounds, which hold the median with `rounds_confidence`; `None` for the first row
        itself, and where there are no two rounds or there is no ratio."""
        first = self.engines[0].latency
        if first is None or engine.latency is None or engine is self.engines[0]:
            return None
        return speedup_interval(first, engine.latency)

    @property
    def rounds_confidence(self) -> float | None:
        """How often the interval of a speed-up holds it; `None` where no two rows have rounds in a pair."""
        counts = [len(engine.latency.rounds) for engine in self.engines if engine.latency is not None]
        return rounds_confidence(min(counts)) if counts and min(counts) > 1 else None

    def is_busy(self, engine: Engine) -> bool:
        """Whether the machine was too busy for a ratio of `engine` to the first row ([`~hfkdq.measuring.latency.is_busy`])."""
        first = self.engines[0].latency
        return first is not None and engine.latency is not None and is_busy(first, engine.latency)

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
    if not all(len(point) == 2 for points in report.curves.values() for point in points):
        raise ValueError("curves has a point that is not a pair of step and value")
    for number, mistake in enumerate(report.mistakes):
        if not all(MEDIUM.fullmatch(address) for address in mistake.media.values()):
            raise ValueError(f"mistakes[{number}].media has an address that is no image or sound in base64")
    wrong = next((name for name, value in report.training.items() if not isinstance(value, (int, float, str))), None)
    if wrong is not None:
        raise ValueError(f"training[{shortened(wrong)}] is no number and no text")
    if report.timing and not {"threads", "rounds", "inputs"} <= set(report.timing):
        raise ValueError("timing lacks threads, rounds or inputs")


def _check_engine(engine: Engine, where: str) -> None:
    latency = engine.latency
    wrong = {
        "kind": engine.kind not in ("torch", *RUNTIMES),
        "size": engine.size <= 0,
        "parameters": (engine.parameters or 0) < 0,
        "sparsity": not 0 <= (engine.sparsity or 0) <= 1,
        "latency": latency is not None and not _is_possible(latency),
        "intervals": not all(map(_is_interval, engine.intervals.values())),
        "changes": not all(map(_is_interval, engine.changes.values())),
        "layers": not all(one.bits > 0 and 0 <= (one.sparsity or 0) <= 1 for one in engine.layers),
    }
    for name, is_wrong in wrong.items():
        if is_wrong:
            raise ValueError(f"{where}.{name} is {shortened(getattr(engine, name))}, which nothing can be measured as")
    if engine.parity is not None:
        check(engine.parity, Export, f"{where}.parity")


def _is_possible(latency: Latency) -> bool:
    return 0 < latency.min_ms <= latency.median_ms and latency.calls > 0 and all(ms > 0 for ms in latency.rounds)


def _is_interval(bounds: list[float]) -> bool:
    return len(bounds) == 2 and bounds[0] <= bounds[1]


def row_name(facts: Mapping[str, Any]) -> str:
    """The name of the row of a file, from what its export recorded: `"ONNX int8"`, `"OpenVINO int8"`."""
    precision = recorded_precision(facts)
    label = facts.get("kind") if precision is None else precision.label
    name, _ = RUNTIMES[kind_of(facts)]
    return f"{name} {label}" if label else name


def kind_of(facts: Mapping[str, Any]) -> str:
    """The kind of a file, from what its export recorded."""
    return OPENVINO if facts.get("target") == OPENVINO else "onnx"


def named_precisions(name: str, facts: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The rows of a folder of a name, one for each of its precisions, with their records; that of the name itself comes last."""
    found = []
    for own in each_precision(facts):
        label = row_name(own) if name == row_name(facts) else f"{name}, {row_name(own).removeprefix('ONNX ')}"
        found.append((name if own is facts else label, dict(own)))
    return found
