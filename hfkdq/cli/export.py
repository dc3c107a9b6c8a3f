# SPDX-License-Identifier: Apache-2.0
"""`hfkdq export`: a checkpoint as ONNX files, with data from files or the Hub."""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path
from typing import Any

from ..export.choices import FLAT, HUB, LAYOUTS, NO_POOLING, ONNXRUNTIME, POOLINGS, TARGETS
from ..export.precisions import AUTO, FLOAT, PRECISIONS, TRAINED
from ..files import check_new, refuse_missing
from .names import check_data
from .options import DATA, add_data, add_timing, check_least

HELP = "write a checkpoint as ONNX files that are compared with PyTorch"
DESCRIPTION = (
    "Writes a checkpoint as ONNX files, compares them with PyTorch, measures what is lost and how fast they are, and "
    "keeps all that in export_facts.json."
)
_QUANTIZATION = f"""{"; ".join(f"{entry.name}: {entry.help}" for entry in PRECISIONS.values())}; {TRAINED}: the integers
that a QATCallback trained; {AUTO}: the fastest of these that loses at most --max-drop on the evaluation data. Default:
trained for a checkpoint that was saved with fake quantizers, else {FLOAT}. With --layout hub it may be given several times; the first is the one that the record is about"""
LEFT = "Nothing was written; the same command begins again."


class _OneOrMore(argparse.Action):
    """Keeps what an option is given once as it is, and as a list what it is given several times."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        before = _listed(getattr(namespace, self.dest))
        setattr(namespace, self.dest, [*before, values] if before else values)


def _listed(given: str | list[str] | None) -> list[str]:
    return [] if given is None else [given] if isinstance(given, str) else given


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command to `parser`, which may be that of another program."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder or Hub id of a Transformers checkpoint")
    parser.add_argument(
        "folder", metavar="FOLDER", nargs="?",
        help="where to write; must not exist (default: the checkpoint's name and -onnx, beside it)",
    )  # fmt: skip
    parser.add_argument(
        "--quantization", metavar="PRECISION", action=_OneOrMore, choices=(*PRECISIONS, TRAINED, AUTO, "none"),
        help=" ".join(_QUANTIZATION.split()),
    )  # fmt: skip
    parser.add_argument("--task", help="Optimum's name of the task (default: what the model's class is for)")
    parser.add_argument(
        "--target", choices=TARGETS, default=ONNXRUNTIME,
        help="with ONNX Runtime's own operators, with none but ONNX's, or OpenVINO's own files (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--weight-type", choices=("auto", "int8", "uint8"), default="auto",
        help="8-bit weights as int8, fastest with VNNI and wrong on x86 without it, or as uint8, exact everywhere "
        "(default: int8 if it is exact on this processor)",
    )  # fmt: skip
    parser.add_argument(
        "--layout", choices=LAYOUTS, default=FLAT,
        help="ONNX files beside the checkpoint, or in onnx/, under the names that transformers.js finds (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--pooling", choices=(*POOLINGS, NO_POOLING),
        help="one embedding for each text as a further output of an encoder (default: as the files of sentence-transformers "
        "beside the checkpoint say)",
    )  # fmt: skip
    parser.add_argument(
        "--normalize", action=argparse.BooleanOptionalAction, help="embeddings of length 1 (default: likewise)"
    )
    parser.add_argument(
        "--tolerance", type=float, metavar="X",
        help="largest difference from PyTorch, as a share of the largest logit (default: by precision, see export_onnx)",
    )  # fmt: skip
    group = parser.add_argument_group("data")
    group.add_argument(
        "--calibration-data", metavar="DATA",
        help=f"what ranges are found and files compared on: a {DATA} (split: train first)",
    )  # fmt: skip
    group.add_argument(
        "--calibration-samples", type=int, default=256, metavar="N",
        help="rows of it, drawn at random, the same at every call (default: %(default)s)",
    )  # fmt: skip
    add_data(group)
    group = parser.add_argument_group("validation")
    group.add_argument(
        "--metric", metavar="NAME",
        help="what may drop, one of the metrics of the model's task (default: the first; f1 of classifiers is macro F1)",
    )  # fmt: skip
    group.add_argument(
        "--max-drop", type=float, metavar="X",
        help="refuse a file whose metric is worse than PyTorch's by more, in its unit: [0, 1], BLEU 100 (default: refuse none; auto: a hundredth)",
    )  # fmt: skip
    group.add_argument("--allow-drop", action="store_true", help="keep such a file, and say so in its report")
    add_timing(group, rounds=3)


def run(options: argparse.Namespace) -> None:
    """Exports, and prints what was written and measured."""
    _check_options(options)
    refuse_missing(options.checkpoint)
    if Path(options.checkpoint).is_file():
        raise ValueError(f"{options.checkpoint} is a file. Name the folder of a checkpoint, or a model on the Hub.")
    folder = default_folder(options.checkpoint) if options.folder is None else Path(options.folder)
    check_new(folder)
    for where in (options.calibration_data, options.eval_data):
        if where is not None:
            check_data(where)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch is imported
    from ..export import export_onnx
    from ..report.sample import record_sample
    from .checkpoint import load_for, load_processor
    from .data import CALIBRATION, EVALUATION
    from .inputs import Reader
    from .summary import print_summary, quietly

    with quietly():
        names: list[str | None] = [*_listed(options.quantization)] or [None]
        model, wanted = load_for(options.checkpoint, names, calibrated=options.calibration_data is not None)
        processor = load_processor(options.checkpoint)
        reader = Reader(model, processor, options.text_columns, options.max_length)
        given: dict[str, Any] = {}
        if options.calibration_data is not None:
            given["calibration"] = reader.batches(options.calibration_data, CALIBRATION, options.calibration_samples)
        if options.eval_data is not None:
            given |= reader.evaluation(options.eval_data, EVALUATION, options.eval_samples)
            given |= {"metric": options.metric, "max_drop": options.max_drop}
        folder = export_onnx(
            model, folder, quantization=wanted if len(wanted) > 1 else wanted[0], processing_class=processor, task=options.task,
            target=options.target, weight_type=options.weight_type, tolerance=options.tolerance, allow_drop=options.allow_drop,
            latency_rounds=options.latency_rounds, threads=options.threads, layout=options.layout, pooling=options.pooling,
            normalize=options.normalize, **given,
        )  # fmt: skip
        record_sample(folder, model, processor, [] if reader.rows is None else [reader.rows])
    print_summary(folder, sys.stdout)


def default_folder(checkpoint: str, ending: str = "-onnx") -> Path:
    """Beside a checkpoint in a folder; in the current folder for one on the Hub."""
    path = Path(checkpoint).expanduser()
    if path.is_dir():
        path = path.resolve() if path.name in ("", "..") else path
        return path.parent / f"{path.name}{ending}"
    return Path(f"{checkpoint.rstrip('/').split('/')[-1]}{ending}")


def _check_options(options: argparse.Namespace) -> None:
    names = _listed(options.quantization)
    if len(names) > 1 and (options.layout != HUB or AUTO in names):
        raise ValueError(
            f"--quantization {names[1]} is one too many: several precisions in one folder need --layout hub, and {AUTO} chooses one."
        )
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"--quantization {twice} is given twice. Its files would have one name.")
    if options.eval_data is None:
        needy = {
            "--quantization auto": AUTO in names, "--metric": options.metric is not None,
            "--max-drop": options.max_drop is not None, "--eval-samples": options.eval_samples is not None,
            "--allow-drop": options.allow_drop,
        }  # fmt: skip
        for name, is_given in needy.items():
            if is_given:
                raise ValueError(f"{name} needs --eval-data: there is nothing to measure on.")
    check_least(options, calibration_samples=1, eval_samples=1, max_length=1, threads=1, latency_rounds=0)
    if options.tolerance is not None and not 0 < options.tolerance < math.inf:
        raise ValueError(
            f"--tolerance must be a positive number, a share of the largest logit, got {options.tolerance}."
        )
    if options.max_drop is not None and not 0 <= options.max_drop < math.inf:
        raise ValueError(
            f"--max-drop must be 0 or a positive number, in the unit of the metric, got {options.max_drop}."
        )
