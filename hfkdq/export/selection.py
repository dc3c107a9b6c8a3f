# SPDX-License-Identifier: Apache-2.0
"""Writes a model in every precision that makes sense and keeps the fastest that is good enough."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..bars import progress_bar
from ..modeling import is_convolutional
from ..quantization import quantized_spec
from .job import ExportJob
from .precisions import PRECISIONS, TRAINED, Precision, precision_of
from .validation import NOISE, Quality, Timed, Timing

logger = logging.get_logger(__name__)
MAX_DROP = 0.01
CONVOLUTIONS = "_convolutions"
"""The end of the names of candidates with `integer_convolutions=True`."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A row of the table that a choice is made from; sizes in bytes, `drop` in the unit of the metric.

    `name` is `"trained"`, or what `quantization=` of [`export_onnx`] would be, and [`CONVOLUTIONS`] where convolutions compute
    with integers; `error` says why there is no file, or why it
    is not accepted.
    """

    name: str
    bytes: int | None = None
    drop: float | None = None
    median_ms: float | None = None
    min_ms: float | None = None
    accepted: bool = False
    error: str | None = None


def write_best(
    job: ExportJob, quality: Quality, timing: Timing, folder: Path, calibrated: bool, allow_drop: bool
) -> dict[str, Any]:
    """Writes all candidates below `folder`, leaves the files of the best one in it, and returns its facts.

    `calibrated` says whether there are real data to find ranges on; `allow_drop` keeps the best of those that all drop too
    far. `RuntimeError` if no candidate could be written, or none is good enough.
    """
    precisions, left_out = _candidates(job, calibrated)
    facts, rows = _write_all(job, quality, precisions, folder)
    found: dict[str, Timed] = {}
    inputs = job.example()
    if timing.skip_reason is None:
        found = timing.time({name: folder / name for name in facts}, job.task, inputs)
        rows = [_timed(row, found.get(row.name)) for row in rows]
    table = [*rows, *left_out]
    chosen, reason = choose(rows, quality.metric or "", quality.max_drop or 0.0)
    if chosen is None and not allow_drop:
        advice = "Pass a larger max_drop=, or allow_drop=True."
        raise RuntimeError(f"{reason} Nothing was written. {advice}\n{render(table)}")
    if chosen is None:
        chosen = min((row for row in rows if row.drop is not None), key=lambda row: row.drop or 0.0)
        reason += f" {chosen.name} drops least, and allow_drop keeps it."
    for name in facts:
        for path in (folder / name).iterdir() if name == chosen.name else ():
            path.rename(folder / path.name)
        shutil.rmtree(folder / name)
    logger.info(f"{render(table)}\n{reason}")
    latency = {"left_out": timing.skip_reason} if timing.skip_reason else timing.facts(chosen.name, found, inputs)
    choice = {"chosen": chosen.name, "reason": reason, "candidates": [asdict(row) for row in table]}
    verdict = {"accepted": chosen.accepted, "reason": chosen.error}
    return {**facts[chosen.name], "latency": latency, **verdict, "choice": choice}


def choose(rows: Sequence[Candidate], metric: str, max_drop: float) -> tuple[Candidate | None, str]:
    """The fastest of the accepted candidates, the smallest of those as fast within 5 %, and the reason in words.

    Without latencies it is the smallest; `None` if none is accepted. `RuntimeError` if there is no file at all.
    """
    if all(row.drop is None for row in rows):
        errors = "\n".join(f"{row.name}: {row.error}" for row in rows)
        raise RuntimeError(f"The model could be exported in no way. Nothing was written.\n{errors}")
    accepted = [row for row in rows if row.accepted]
    bound = f"whose {metric} drops by at most {max_drop:g}"
    if not accepted:
        return None, f"There is no candidate {bound}."
    timed = [row for row in accepted if row.median_ms is not None]
    if not timed:
        best = min(accepted, key=lambda row: row.bytes or 0)
        told = f"{best.name} is the smallest of the {len(accepted)} candidates {bound}"
        return best, f"{told}; latency was not measured."
    fastest = min(row.median_ms for row in timed if row.median_ms is not None)
    alike = [row for row in timed if row.median_ms is not None and row.median_ms <= (1 + NOISE) * fastest]
    best = min(alike, key=lambda row: row.bytes or 0)
    reason = f"{best.name} is the fastest of the {len(accepted)} candidates {bound}: {best.median_ms:.3g} ms."
    others = ", ".join(row.name for row in alike if row is not best)
    return best, f"{reason} As fast within {NOISE:.0%}, and larger: {others}." if others else reason


def render(table: Sequence[Candidate]) -> str:
    """The candidates as a table for the terminal."""
    lines = [f"{'candidate':<21}{'MB':>9}{'drop':>10}{'median ms':>11}{'min ms':>9}  verdict"]
    for row in table:
        size = "-" if row.bytes is None else f"{row.bytes / 1e6:.2f}"
        numbers = ["-" if value is None else f"{value:.4g}" for value in (row.drop, row.median_ms, row.min_ms)]
        verdict = "accepted" if row.accepted else (row.error or "").splitlines()[0]
        lines.append(f"{row.name:<21}{size:>9}{numbers[0]:>10}{numbers[1]:>11}{numbers[2]:>9}  {verdict}")
    return "\n".join(lines)


def _candidates(job: ExportJob, calibrated: bool) -> tuple[dict[str, Precision], list[Candidate]]:
    """The precisions to write, by name, and rows for those that are left out."""
    trained = quantized_spec(job.model)
    found = _named(calibrated) if trained is None else {TRAINED: precision_of(trained), **_named(calibrated=False)}
    if is_convolutional(job.model) and not job.integer_convolutions:
        found = {f"{n}{CONVOLUTIONS}": entry for n, entry in found.items() if entry.needs_calibration} | found
    missing = [] if calibrated or trained is not None else sorted(PRECISIONS.keys() - found.keys())
    return found, [Candidate(name=name, error="left out: it needs calibration=") for name in missing]


def _named(calibrated: bool) -> dict[str, Precision]:
    return {name: entry for name, entry in PRECISIONS.items() if calibrated or not entry.needs_calibration}


def _write_all(
    job: ExportJob, quality: Quality, precisions: Mapping[str, Precision], folder: Path
) -> tuple[dict[str, dict[str, Any]], list[Candidate]]:
    """Facts of those that could be written, each below `folder`, and a row for every one."""
    facts: dict[str, dict[str, Any]] = {}
    rows = []
    integer = copy.copy(job)
    integer.integer_convolutions = True
    bar = progress_bar(precisions, desc="Candidates")
    for name in bar:
        bar.set_postfix_str(name)
        own = folder / name
        own.mkdir()
        try:
            facts[name] = (integer if name.endswith(CONVOLUTIONS) else job).write(precisions[name], own)
        except OSError:
            raise  # a disk that is full is so for all
        except Exception as error:  # exporters and runtimes raise their own, and another precision may do
            shutil.rmtree(own)
            # The report is published; the folder is nobody's business.
            rows.append(Candidate(name=name, error=f"{type(error).__name__}: {error}".replace(str(folder), "")))
            continue
        metrics = facts[name]["metrics"]
        reason = quality.rejection_reason(metrics)
        size, drop = facts[name]["bytes"], metrics["drop"]
        rows.append(Candidate(name=name, bytes=size, drop=drop, accepted=reason is None, error=reason))
    return facts, rows


def _timed(row: Candidate, timed: Timed | None) -> Candidate:
    return row if timed is None else replace(row, median_ms=timed.whole.median_ms, min_ms=timed.whole.min_ms)
