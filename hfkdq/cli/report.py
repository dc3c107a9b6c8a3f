# SPDX-License-Identifier: Apache-2.0
"""`hfkdq report`: checkpoints, exported folders, ONNX files and models of the Hub, measured side by side."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..files import check_new
from .names import check_data, split_name
from .options import add_data, add_timing, check_least

HELP = "measure and compare checkpoints, files and models of the Hub; writes a page"
DESCRIPTION = (
    "Measures quality, size and latency of checkpoints, exported folders and ONNX files on the same rows, against a teacher or the "
    "first of them, and writes report.json, report.md, report.png and report.html, a page that opens without a network."
)
LEFT = "Nothing was written; the same command begins again."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command to `parser`."""
    parser.add_argument(
        "candidates", metavar="CANDIDATE", nargs="+",
        help="checkpoint, folder of hfkdq export, ONNX file or Hub id; NAME=PLACE gives it a name. The report is about the last",
    )  # fmt: skip
    parser.add_argument(
        "--teacher", metavar="MODEL", help="what ratios and drops refer to, likewise (default: the first candidate)"
    )
    parser.add_argument("--output-dir", "--output_dir", required=True, help="where to write; must not exist")
    add_data(parser.add_argument_group("data"), required=True)
    group = parser.add_argument_group("measuring")
    group.add_argument(
        "--batch-size", type=int, default=32, metavar="N", help="rows in a batch (default: %(default)s)"
    )
    group.add_argument(
        "--resamples", type=int, metavar="N",
        help="how often rows are drawn anew for the intervals of metrics, 0 for none (default: 1000)",
    )  # fmt: skip
    group.add_argument(
        "--examples", type=int, default=12, metavar="N",
        help="rows to show at most that the first one gets right and the last one wrong (default: %(default)s)",
    )  # fmt: skip
    add_timing(group, rounds=6)


def run(options: argparse.Namespace) -> None:
    """Measures, writes the folder and prints the table."""
    from .candidates import each_file, find_place, load_candidates, split_names

    check_least(
        options, batch_size=1, resamples=0, examples=0, latency_rounds=0, threads=1, eval_samples=1, max_length=1
    )
    teacher = [] if options.teacher is None else [f"teacher={options.teacher}"]
    named = split_names([*teacher, *options.candidates])
    folder = Path(options.output_dir)
    check_new(folder)
    check_data(options.eval_data)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch is imported
    from rich.console import Console

    from ..files import staged
    from ..report import Candidate, CompressionReport
    from ..report.curves import read_curves, read_settings
    from ..report.plots import check_plots
    from .inputs import Reader
    from .summary import quietly

    check_plots()
    with quietly():
        loaded = load_candidates([one for name, where in named for one in each_file(find_place(name, where))])
        candidates: list[Candidate] = []
        readers: list[Reader] = []
        for place, model, processor in loaded:
            readers.append(Reader(model, processor, options.text_columns, options.max_length))
            read = _read(place.name, readers[-1], options)
            one = Candidate(name=place.name, model=model, path=place.path, processing_class=processor, **read)
            candidates.append(one)
        with staged(folder) as staging:
            report = CompressionReport.compare(
                candidates, batch_size=options.batch_size, latency_rounds=options.latency_rounds, threads=options.threads,
                resamples=options.resamples, examples=options.examples, rows=readers[0].rows,
                dataset=_dataset(options.eval_data),
            )  # fmt: skip
            trained = [place.folder for place, _, _ in reversed(loaded) if place.name != "teacher"]
            trained = [folder for folder in trained if read_curves(folder)][:1]
            for place in trained:
                report = replace(report, curves=read_curves(place), training=read_settings(place))
            report.save(staging.files / "report.json")
            report.save_html(staging.files / "report.html")
            report.save_plot(staging.files / "report.png")
            (staging.files / "report.md").write_text(f"{report.to_markdown()}\n", encoding="utf-8")
    console = Console(file=sys.stdout)
    console.print(report.table())
    sys.stdout.write(f"{staging.folder / 'report.html'}\n")


def _read(name: str, reader: Any, options: argparse.Namespace) -> dict[str, Any]:
    """The rows as one candidate reads them; an error names it."""
    from .data import EVALUATION

    try:
        return reader.evaluation(options.eval_data, EVALUATION, options.eval_samples)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _dataset(where: str) -> Any:
    """What the data are: by the name of the file or folder, or by their id on the Hub."""
    from ..report import DatasetInfo

    path, config, split = split_name(where)
    if Path(path).expanduser().exists():
        return DatasetInfo(name=Path(path).expanduser().resolve().name, split=split)
    return DatasetInfo(name=path, id=path, config=config, split=split)
