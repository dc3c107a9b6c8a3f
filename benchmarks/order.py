#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""In which order are a student distilled, pruned and trained for integers? The same steps in every order, measured on files.

    make bench-order TEXT=path/to/banking77 IMAGES=path/to/fashion_mnist

Data, teachers and their cached outputs are those of `teacher_gain.py`, with all labels. An order is a row of trainings, each with a
schedule of its own, that share the steps. Half of the neurons go from text, three tenths of the channels from images. Every run is
kept in a file of its own, so that the command goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantization import extremes, slug, spread
from rich.console import Console
from rich.table import Table
from teacher_gain import BY_32, BY_64, Data, arguments, copied_layers, images, small_network, text
from transformers import PreTrainedModel, TrainerCallback, set_seed

from hfkdq import (
    DistillationTrainer,
    LogitKD,
    PruningCallback,
    PruningSpec,
    QATCallback,
    QuantizationSpec,
    TaskLoss,
    export_onnx,
    prune,
)
from hfkdq.export.record import EXPORT_FACTS
from hfkdq.metrics import classification_metrics


@dataclass(frozen=True)
class Stage:
    """A training: its share of the steps, and whether it prunes and quantizes besides."""

    share: float
    prunes: bool = False
    quantizes: bool = False


@dataclass(frozen=True)
class Order:
    """Trainings in a row; `prunes_first` in one shot before them. `is_pruned` and `is_int8` say what comes out."""

    stages: tuple[Stage, ...]
    prunes_first: bool = False
    is_pruned: bool = True
    is_int8: bool = True


FLOAT = "neither pruned nor quantized"
ORDERS = {
    FLOAT: Order((Stage(1),), is_pruned=False, is_int8=False),
    "all at once": Order((Stage(1, prunes=True, quantizes=True),)),
    "prune | quantize": Order((Stage(1 / 2, prunes=True), Stage(1 / 2, quantizes=True))),
    "distil | prune | quantize": Order((Stage(1 / 3), Stage(1 / 3, prunes=True), Stage(1 / 3, quantizes=True))),
    "prune in one shot | quantize": Order((Stage(1, quantizes=True),), prunes_first=True),
    "distil | prune and quantize": Order((Stage(1 / 2), Stage(1 / 2, prunes=True, quantizes=True))),
    "prune | integers by calibration": Order((Stage(1, prunes=True),)),
}


@dataclass(frozen=True)
class Setting:
    """A student and its data, how it is trained, what is pruned and how its int8 file is written."""

    data: Any
    student: Any
    steps: int
    rate: float
    training: dict[str, Any]
    pruning: PruningSpec
    export: dict[str, Any]


SETTINGS = {
    "text": Setting(text, copied_layers, 210, 5e-4, BY_32, PruningSpec(sparsity=0.5, structure="neuron", end=0.5), {}),
    "images": Setting(
        images, small_network, 600, 3e-3, BY_64,
        PruningSpec(sparsity=0.3, structure="channel", end=0.5, plain_checkpoint=False), {"integer_convolutions": True},
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, help="folder of banking77: train and test parquet files")
    parser.add_argument("--images", type=Path, help="folder of fashion_mnist: train and test parquet files")
    parser.add_argument("--output_dir", type=Path, default=Path("out/bench-order"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="of every student, in the place of those of its setting")
    parser.add_argument("--max_rows", type=int, help="of the training split, for a quick look")
    parser.add_argument("--image_teacher_steps", type=int, default=1500, help="128 rows each")
    parser.add_argument("--text_teacher_epochs", type=float, default=3)
    options = parser.parse_args()
    for name, setting in SETTINGS.items():
        if getattr(options, name) is None:
            continue
        data, steps = setting.data(options), options.steps or setting.steps
        for seed in options.seeds:
            for order in ORDERS:
                run(setting, data, order, seed, steps, options.output_dir / name)
        show(name, steps, options.output_dir / name)


def run(setting: Setting, data: Data, name: str, seed: int, steps: int, folder: Path) -> None:
    """Trains, exports, measures and records one student, unless that was done before."""
    file = folder / f"{slug(name)}-{steps}-{seed}.json"
    if file.exists():
        return
    set_seed(seed)
    order, student = ORDERS[name], setting.student(data.teacher)
    if order.prunes_first:
        prune(student, setting.pruning, data.train.select(range(256)), processing_class=data.processing_class)
    for stage in order.stages:
        student = trained(student, stage, setting, data, round(steps * stage.share), seed, folder)
    target = folder / "file"
    shutil.rmtree(target, ignore_errors=True)
    read = [
        name
        for name in ("input_ids", "attention_mask", "token_type_ids", "pixel_values")
        if name in data.train.column_names
    ]
    export_onnx(
        student, target, quantization=QuantizationSpec() if order.is_int8 else "float32", latency_rounds=0,
        processing_class=data.processing_class, calibration=data.train.select(range(256)).select_columns(read),
        eval_dataset=data.test, compute_metrics=classification_metrics, **(setting.export if order.is_int8 else {}),
    )  # fmt: skip
    record = json.loads((target / EXPORT_FACTS).read_text())
    accuracy = 100 * record["metrics"]["onnx"]["accuracy"]
    found = {"order": name, "seed": seed, "accuracy": accuracy, "bytes": record["bytes"]}
    print(f"{folder.name}: {found}", flush=True)
    file.write_text(json.dumps(found, indent=2) + "\n")


def trained(
    student: PreTrainedModel, stage: Stage, setting: Setting, data: Data, steps: int, seed: int, folder: Path
) -> PreTrainedModel:
    """The student after a training, which always has labels and teacher."""
    callbacks: list[TrainerCallback] = [PruningCallback(setting.pruning)] if stage.prunes else []
    callbacks += [QATCallback(QuantizationSpec())] if stage.quantizes else []
    trainer = DistillationTrainer(
        student, arguments(folder, seed, steps, setting.rate, **setting.training), train_dataset=data.train,
        processing_class=data.processing_class, objectives=[TaskLoss(weight=0.5), LogitKD(temperature=2.0)], callbacks=callbacks,
    )  # fmt: skip
    trainer.train()
    return trainer.model


def show(name: str, steps: int, folder: Path) -> None:
    """Accuracy of the files on the test split, and the difference to that of the same seed with all at once."""
    found = [json.loads(file.read_text()) for file in sorted(folder.glob(f"*-{steps}-*.json"))]
    accuracy = {order: {r["seed"]: r["accuracy"] for r in found if r["order"] == order} for order in ORDERS}
    together = accuracy["all at once"]
    table = Table("Order", title=f"{name}: accuracy of the file (%), {steps} steps in all")
    for column in ("accuracy", "against all at once", "bytes"):
        table.add_column(column, justify="right", no_wrap=True)
    for order, runs in accuracy.items():
        gains = [value - together[seed] for seed, value in runs.items()]
        sizes = {r["bytes"] for r in found if r["order"] == order}
        table.add_row(
            order, spread(list(runs.values())), f"{spread(gains, '+')}{extremes(gains)}", " to ".join(f"{s:,}" for s in sorted({min(sizes), max(sizes)}))
        )  # fmt: skip
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
