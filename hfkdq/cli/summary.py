# SPDX-License-Identifier: Apache-2.0
"""The summary of an export for the terminal, from its record."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from textwrap import wrap
from typing import Any, TextIO

import datasets
from rich.console import Console
from transformers.utils import logging

from ..export.precisions import recorded_precision
from ..export.record import read_export
from ..export.selection import Candidate, render
from ..facts import three_digits
from ..report.table import megabytes
from .messages import as_options


@contextmanager
def quietly() -> Iterator[None]:
    """Keeps the tracer's notes to developers, and progress bars that nobody sees, off the terminal."""
    is_seen, verbosity = sys.stderr.isatty(), datasets.logging.get_verbosity()
    if not is_seen:
        logging.disable_progress_bar()
        datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            datasets.logging.set_verbosity_error()  # rows are encoded when they are read, which nothing caches
            yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not is_seen:
            logging.enable_progress_bar()
            datasets.enable_progress_bars()


def print_summary(folder: Path, stream: TextIO) -> None:
    """Prints what `export_onnx` wrote into `folder` and measured; the folder is the last line."""
    facts = read_export(folder)
    width = Console(file=stream).width
    lines = []
    if "choice" in facts:
        choice = facts["choice"]
        lines += [*_candidates(choice["candidates"], choice["chosen"], width), *wrap(choice["reason"], width), ""]
    float_bytes = sum(
        file.stat().st_size for file in folder.glob("model*.safetensors")
    )  # the checkpoint beside the file
    for name, text in summary_lines(facts, float_bytes):
        lines += wrap(text, width, initial_indent=f"{name:<14}", subsequent_indent=" " * 14)
    stream.write("\n".join([*lines, str(folder), ""]))


def summary_lines(facts: Mapping[str, Any], float_bytes: int) -> list[tuple[str, str]]:
    """The lines of a summary: a topic each, and its text. `float_bytes` of the float32 weights are 0 if unknown."""
    size = f"{megabytes(facts['bytes'])} MB"
    if float_bytes:
        size += f", {facts['bytes'] / float_bytes:.2f} of the float32 weights ({megabytes(float_bytes)} MB)"
    lines = [("file", f"{_precision(facts)}, {facts['task']}, opset {facts['opset']}"), ("size", size)]
    share = facts["max_abs_diff"] / facts["max_abs_logit"] if facts["max_abs_logit"] else 0.0
    difference = f"at most {facts['max_abs_diff']:.2g} from PyTorch, {share:.2g} of the largest output; "
    difference += f"allowed {facts['tolerance']:g} ({facts['samples']} examples)"
    lines.append(("difference", difference))
    if "quantized_linears" in facts:
        lines.append(("layers", _layers(facts)))
    if "metrics" in facts:
        lines += _metric_lines(facts["metrics"])
    lines.append(("latency", _latency(facts["latency"])))
    if not facts.get("accepted", True):
        lines.append(("not accepted", as_options(facts["reason"])))
    return lines


def _layers(facts: Mapping[str, Any]) -> str:
    """The numbers of layers that compute in integers and in floating point."""
    quantized, fused, floats = (facts.get(f"{name}_linears") for name in ("quantized", "fused", "float"))
    text = f"{quantized} with integer weights"
    precision = recorded_precision(facts)
    if precision is not None and precision.multiplies_integers and fused is not None:
        text += f", {'all' if fused == quantized else fused} of them in an integer kernel"
    return f"{text}; {floats} linear {'layer' if floats == 1 else 'layers'} in floating point"


def _metric_lines(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    name = metrics["metric"]
    before, after = metrics["torch"][name], metrics["onnx"][name]
    text = f"{after:.4f}, in PyTorch {before:.4f}"
    if "float" in metrics:
        text += f", without fake quantizers {metrics['float'][name]:.4f}"
    text += f" ({metrics['examples']:,} examples)"
    lines = [(name, text)]
    if metrics["top1_compared"]:
        lines.append(("other class", f"{metrics['top1_different']:,} of {metrics['top1_compared']:,} examples"))
    return lines


def _latency(latency: Mapping[str, Any]) -> str:
    if "left_out" in latency:
        return f"not measured: {latency['left_out']}"
    name, sizes = next(iter(latency["inputs"].items()))  # the others are as long
    shape = f"{name} {' x '.join(map(str, sizes))}"
    tokens = sum(part["times"] for name, part in latency.get("parts", {}).items() if name != "encoder")
    unit = "a call" if not tokens else "for a token" if tokens == 1 else f"for {tokens} tokens"
    text = f"{three_digits(latency['onnx']['median_ms'])} ms {unit}"
    if "speedup" in latency:
        before = three_digits(latency["float32"]["median_ms"])
        text += f", {latency['speedup']:.2f} times as fast as float32 ({before} ms)"
    if "speedup_interval" in latency:
        text += f", {' to '.join(f'{bound:.2f}' for bound in latency['speedup_interval'])} in the rounds"
    if "speedup_left_out" in latency:
        text += f"; no ratio to float32: {latency['speedup_left_out']}"
    return f"{text}; {shape}, {latency['threads']} {'thread' if latency['threads'] == 1 else 'threads'}"


def _precision(facts: Mapping[str, Any]) -> str:
    """The name of the precision, after that of the candidate if it was chosen under another."""
    precision, chosen = recorded_precision(facts), facts.get("choice", {}).get("chosen")
    name = facts["kind"] if precision is None else precision.name
    return f"{chosen} ({name})" if chosen not in (None, name) else str(name)


def _candidates(rows: list[dict[str, Any]], chosen: str, width: int) -> list[str]:
    """The table that a choice was made from and what was wrong with some, in lines."""

    def verdict(row: Mapping[str, Any]) -> str:
        if row["bytes"] is None:
            return "not written"
        return "chosen" if row["name"] == chosen else "accepted" if row["accepted"] else "refused"

    table = render([Candidate(**{**row, "accepted": False, "error": verdict(row)}) for row in rows])
    errors = [as_options(f"{row['name']}: {row['error'].splitlines()[0]}") for row in rows if row["error"]]
    return [*table.splitlines(), *(line for error in errors for line in wrap(error, width, subsequent_indent="  "))]
