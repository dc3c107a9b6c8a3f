# SPDX-License-Identifier: Apache-2.0
"""Times checkpoints and ONNX files on made-up inputs of given sizes, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..export.dummies import dummy_batch
from ..export.record import export_file, read_export, runtime_of
from ..export.runner import GeneratingFiles, open_recorded
from ..export.runtime import onnx_call
from ..measuring.latency import Latency, TimedEngine, latency_of, time_calls
from ..measuring.torch_engine import torch_call
from ..modeling import build_empty, checkpoint_class, load_config
from ..modeling.tasks import task_of
from .data import Engine, ReportData

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, kw_only=True)
class Timed:
    """The times of one candidate at one size."""

    name: str
    threads: int
    batch_size: int  # examples of a call
    length: int | None  # tokens of each, of models of texts
    latency: Latency  # of a call
    percentiles: dict[str, float]  # such as {"p50": 1.9, "p90": 2.0, "p99": 2.4}, milliseconds of a call
    throughput: float  # examples a second, by the median
    speedup: float | None  # times faster than the first candidate; `None` where the machine was too busy to tell
    speedup_interval: tuple[float, float] | None  # the lowest and the highest of paired rounds

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON has them."""
        return asdict(self)


def time_files(
    candidates: Sequence[tuple[str, Path, Path | None]], *, threads: int, batch_size: int, length: int, rounds: int
) -> tuple[list[Timed], ReportData]:
    """Times candidates in turn, each in a process of its own: the times of each, and a report that tells ratios and doubts
    of them. A candidate is a name, a folder with the configuration, and the exported folder or file, `None` for the
    checkpoint itself. `batch_size` are the examples of a call and `length` the tokens of a text; images and sounds are
    as large as the model takes them. A round is half a second of each. Raises `ValueError`: a folder has no
    configuration, there are no made-up inputs for its model, or it does not take such sizes. Raises `RuntimeError`: a
    process ended early."""
    engines = [_engine(*one, batch_size=batch_size, length=length) for one in candidates]
    turns = time_calls(engines, threads=threads, rounds=rounds)
    rows = [
        Engine(
            name=name, kind="torch" if path is None else runtime_of(engine.path), metrics={}, size=1,
            latency=latency_of(calls),
        )
        for (name, _, path), engine, calls in zip(candidates, engines, turns, strict=True)
    ]  # fmt: skip
    timing = {"device": "cpu", "threads": threads, "rounds": rounds, "inputs": {}}
    report = ReportData(engines=tuple(rows), architecture="Model", samples=0, timing=timing)
    return [
        _timed(report, row, calls, threads, batch_size, length if "input_ids" in engine.inputs else None)
        for row, engine, calls in zip(rows, engines, turns, strict=True)
    ], report


def _timed(
    report: ReportData, row: Engine, turns: list[list[float]], threads: int, batch_size: int, length: int | None
) -> Timed:
    calls = [ms for turn in turns for ms in turn]
    latency = latency_of(turns)
    return Timed(
        name=row.name, threads=threads, batch_size=batch_size, length=length, latency=latency,
        percentiles={f"p{share}": float(np.percentile(calls, share)) for share in PERCENTILES},
        throughput=1000 * batch_size / latency.median_ms, speedup=report.speedup(row),
        speedup_interval=report.speedup_interval(row),
    )  # fmt: skip


def _engine(name: str, folder: Path, path: Path | None, *, batch_size: int, length: int) -> TimedEngine:
    config = load_config(str(folder))
    model_class = checkpoint_class(config)
    model = build_empty(model_class, config)
    task = task_of(model_class.__name__)
    facts = {} if path is None else _recorded(path)
    made = dummy_batch(model, facts.get("task", "" if task is None else task.name), batch_size, length)
    longest = getattr(config, "max_position_embeddings", None)
    if "input_ids" in made and isinstance(longest, int) and length > longest:
        raise ValueError(f"{name} takes {longest} tokens at most, got --length {length}.")
    batch = {key: value.numpy() for key, value in made.items()}
    if path is None:
        if not any(folder.glob("*.safetensors")):
            raise ValueError(
                f"{name}: {folder} has no weights in safetensors to time. Name a folder of save_pretrained."
            )
        return TimedEngine(name, torch_call, folder, batch)
    files = open_recorded(path, facts)
    if isinstance(files, GeneratingFiles) and batch_size != 1:
        raise ValueError(f"{name} writes texts token by token; such files are timed with --batch-size 1.")
    call = files.calls(batch)[0]  # of a model that generates the first part; hfkdq export times all of them
    return TimedEngine(name, onnx_call, call.path, call.inputs)


def _recorded(path: Path) -> dict[str, Any]:
    return read_export(path) if path.is_dir() and export_file(path).is_file() else {}
