# SPDX-License-Identifier: Apache-2.0
"""`hfkdq bench`: how fast checkpoints and ONNX files are, side by side, at several sizes."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from typing import Any

from .options import check_least

HELP = "time checkpoints and ONNX files side by side"
DESCRIPTION = (
    "Times checkpoints, exported folders and ONNX files on made-up inputs, each in a process of its own, in turn: percentiles, "
    "throughput, and how many times faster than the first each is, with the lowest and highest of paired rounds."
)
LEFT = "Nothing was written."

_USUAL = 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command to `parser`."""
    parser.add_argument("candidates", metavar="FILE", nargs="+", help="checkpoint, exported folder, ONNX file or Hub id; NAME=PLACE names it")  # fmt: skip
    parser.add_argument("--threads", type=int, nargs="+", default=[1], metavar="N", help="threads (default: 1)")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1], metavar="N", help="examples of a call (default: 1)")  # fmt: skip
    parser.add_argument("--length", type=int, nargs="+", metavar="N", help=f"tokens of a text (default: {_USUAL}, or fewer where a model takes no more); images and sounds are as large as the model takes them")  # fmt: skip
    parser.add_argument(
        "--rounds", type=int, default=6, metavar="N", help="turns of half a second of each (default: 6)"
    )
    parser.add_argument("--json", action="store_true", help="print all that was measured as JSON")


def run(options: argparse.Namespace) -> None:
    """Times, and prints a row for each file and size."""
    check_least(options, threads=1, batch_size=1, length=2, rounds=1)
    from ..modeling.checkpoints import load_config
    from ..report.table import told_doubts
    from ..report.timing import Timed, time_files
    from .candidates import find_place, split_names
    from .summary import quietly

    named = split_names(options.candidates)
    found: list[Timed] = []
    told: list[str] = []
    with quietly():
        places = [find_place(name, where) for name, where in named]
        # A file without a configuration beside it has the inputs of the first one, as in a report.
        folders = [place.folder if place.path is None or place.is_configured else places[0].folder for place in places]
        limits = [getattr(load_config(str(folder)), "max_position_embeddings", None) for folder in folders]
        lengths = options.length or [min([_USUAL, *(limit for limit in limits if isinstance(limit, int))])]
        candidates = [(place.name, folder, place.path) for place, folder in zip(places, folders, strict=True)]
        for threads, size, length in itertools.product(options.threads, options.batch_size, lengths):
            sizes = {"threads": threads, "batch_size": size, "length": length}
            rows, report = time_files(candidates, **sizes, rounds=options.rounds)
            found += rows
            told += [sentence for sentence in told_doubts(report) if sentence not in told]
    if options.json:
        sys.stdout.write(f"{json.dumps([row.to_dict() for row in found], indent=2)}\n")
    else:
        _print(found, told)


def _print(found: list[Any], told: list[str]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from ..facts import three_digits
    from ..report.markdown import one_line
    from ..report.table import NONE, add_column, speedup_text

    console, table = Console(file=sys.stdout), Table(box=box.SIMPLE_HEAD, padding=0)
    titles = ["File", "Threads", "Batch", "Length", *(f"{name} (ms)" for name in found[0].percentiles), "Fastest (ms)", "Examples/s", "Speed-up"]  # fmt: skip
    for title in titles:
        add_column(table, title, left=title == "File")
    for row in found:
        numbers = [*row.percentiles.values(), row.latency.min_ms, row.throughput]
        sizes = [NONE if size is None else str(size) for size in (row.threads, row.batch_size, row.length)]
        ratio = speedup_text(row.speedup, row.speedup_interval).replace(" [", "\n[")
        table.add_row(Text(one_line(row.name)), *sizes, *map(three_digits, numbers), ratio.replace("[", "\\["))
    console.print(table)
    for sentence in told:
        console.print(Text(one_line(sentence)))
