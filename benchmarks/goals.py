#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""What a search for goals finds, beside one long training by the recipe as it is by default.

    make bench-goals TEXT=path/to/rotten_tomatoes

Teacher, search and fixed recipe are `hfkdq compress`. The search chooses on the split validation; what it found and what the fixed recipe
made are measured on the split test, which neither has seen. The fixed recipe takes as many steps as all trials of the search took
together. Every run keeps its folder, so that the command goes on where it was.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from datasets import ClassLabel, Dataset, Image, load_dataset
from PIL.Image import fromarray
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from tasks import TEACHER, compress, names_of, steps
from text_classification import pretrained
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    set_seed,
)

from hfkdq import CompressionReport
from hfkdq.cli.compress_search import frontier, outcomes_of, settings_of
from hfkdq.recipes.goals import Goals, parse_size
from hfkdq.report.table import megabytes

FOUND, FIXED = "found", "fixed"


@dataclass(frozen=True, kw_only=True)
class Task:
    """A teacher that `base` makes and `teaching` trains, and what is asked of a smaller model."""

    base: Callable[[Any], tuple[PreTrainedModel, Any]]
    teaching: dict[str, Any]
    training: dict[str, Any]
    goals: tuple[str, ...]
    trials: int
    rows: tuple[str, ...] = ()


def texts(features: Any) -> tuple[PreTrainedModel, Any]:
    tokenizer = AutoTokenizer.from_pretrained(pretrained())
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=4, num_attention_heads=2, intermediate_size=256,
        max_position_embeddings=64, **names_of(features["label"]),
    )  # fmt: skip
    return BertForSequenceClassification(config), tokenizer


def images(features: Any) -> tuple[PreTrainedModel, Any]:
    config = ViTConfig(
        image_size=8, patch_size=2, hidden_size=96, num_hidden_layers=4, num_attention_heads=4, intermediate_size=384,
        initializer_range=0.1, **names_of(features["label"]),
    )  # fmt: skip
    size = {"height": 8, "width": 8}
    return ViTForImageClassification(config), ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def write_digits(folder: Path) -> None:
    """scikit-learn's 1,797 images as three splits of parquet: 1,000, 397 and 400 of them."""
    folder.mkdir(parents=True, exist_ok=True)
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    for split, chosen in zip(("train", "validation", "test"), np.split(order, [1000, 1397]), strict=True):
        pictures = [fromarray((digits.images[i] * 255 / 16).astype(np.uint8)).convert("RGB") for i in chosen]
        rows = Dataset.from_dict({"image": pictures, "label": digits.target[chosen]})
        names = ClassLabel(names=[str(digit) for digit in range(10)])
        rows.cast_column("image", Image()).cast_column("label", names).to_parquet(folder / f"{split}.parquet")


TASKS = {
    "digits": Task(
        base=images, teaching=steps(500, 1e-3), training=steps(40, 2e-3, 64), goals=("--keep=0.97", "--max-size=320kB"), trials=8,
    ),
    "rotten_tomatoes": Task(
        base=texts, teaching=steps(400, 1e-3), training=steps(80, 1e-3, 64), goals=("--keep=0.97", "--max-size=1MB"), trials=8,
        rows=("data.max_length=64",),
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="folder of rotten_tomatoes, with three splits")
    parser.add_argument("--output_dir", type=Path, default=Path("out/bench-goals"))
    parser.add_argument(
        "--picture", type=Path, help="an SVG to draw: the terminal at the end of the last task's search"
    )
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    options = parser.parse_args()
    for name in options.tasks:
        folder, data = options.output_dir / name, options.text
        if name == "digits" and not (data := folder / "data").exists():
            write_digits(data)
        run(TASKS[name], data, folder)
        show(name, TASKS[name], folder)
    if options.picture is not None:
        draw(TASKS[name], folder, options.picture)


def run(task: Task, data: Path, folder: Path) -> None:
    """The teacher, the search, the fixed recipe, and the measurement of all three."""
    if not (folder / "base").exists():
        set_seed(0)
        for part in task.base(load_dataset(str(data), split="train[:1]").features):
            part.save_pretrained(folder / "base")
    named = {"train": f"{data}:train", "eval": f"{data}:validation"}
    own = {key.removeprefix("data."): int(value) for key, _, value in (row.partition("=") for row in task.rows)}
    recipe = {
        "model": str(folder / "base"),
        "data": named | own,
        "training": {**task.teaching, "seed": 0},
        "export": {},
    }
    compress({**recipe, "report": {"latency_rounds": 0}}, folder / TEACHER)
    settings = [f"training.{name}={value}" for name, value in task.training.items() if not name.endswith("_strategy")]
    common = [
        str(folder / TEACHER / "student"),
        "--data",
        named["train"],
        f"data.eval={named['eval']}",
        *task.rows,
        *settings,
    ]
    call(folder / FOUND, "compress", *common, *task.goals, f"--trials={task.trials}", "--output-dir")
    taken = sum(steps_of(trial, task) for trial in study_of(folder).trials)
    untimed = ("training.eval_strategy=no", "training.save_strategy=no", "report.latency_rounds=0")
    call(folder / FIXED, "compress", *common, f"training.max_steps={taken}", *untimed, "--output-dir")
    rows = [f"--{row.removeprefix('data.').replace('_', '-')}" for row in task.rows]
    files = [f"{name}={folder / name / 'onnx'}" for name in (TEACHER, FOUND, FIXED)]
    call(
        folder / "report", "report", *files, "--eval-data", f"{data}:test", *rows, "--latency-rounds=0", "--output-dir"
    )


def call(folder: Path, *command: str) -> None:
    """A command of hfkdq that writes a report into a folder, unless it was done before."""
    if not (folder / "report.json").exists():
        subprocess.run([sys.executable, "-m", "hfkdq", *command, str(folder)], check=True)


def study_of(folder: Path) -> optuna.Study:
    return optuna.load_study(
        study_name="hfkdq compress", storage=f"sqlite:///{folder / FOUND / 'search' / 'study.db'}"
    )


def steps_of(trial: optuna.trial.FrozenTrial, task: Task) -> int:
    """The steps that a trial took: it was looked at after every quarter, and may have ended there."""
    return len(trial.intermediate_values) * task.training["max_steps"] // 4


def show(name: str, task: Task, folder: Path) -> None:
    """All trials, and the file of the best one beside that of the fixed recipe."""
    study, console = study_of(folder), Console(width=160)
    found = outcomes_of(study)
    trials = Table(
        "trial", "settings", "steps", "kept (%)", "MB", title=f"{name}: {' '.join(task.goals)}, on validation"
    )
    for trial in filter(lambda trial: trial.state.is_finished(), study.trials):
        outcome = found.get(trial.number)
        beaten = outcome is None or any(outcome.is_beaten_by(other) for other in found.values())
        told = ("", "") if outcome is None else (f"{100 * outcome.kept:.2f}", megabytes(int(outcome.size)))
        trials.add_row(
            f"{trial.number}{'' if beaten else ' *'}", settings_of(trial), str(steps_of(trial, task)), *told
        )
    console.print(trials, "* none is better in quality and size both")
    console.print(CompressionReport.load(folder / "report" / "report.json").table())


def draw(task: Task, folder: Path, picture: Path) -> None:
    """What `hfkdq compress` has on the terminal when the search is over."""
    study, console = study_of(folder), Console(record=True, width=110, file=StringIO(), force_terminal=True)
    keep, size = (goal.partition("=")[2] for goal in task.goals)
    console.print(
        f"[bold]$ hfkdq compress model --data data {' '.join(task.goals)} --trials {task.trials}", highlight=False
    )
    console.print(frontier(outcomes_of(study), study, Goals(keep=float(keep), max_size=parse_size(size))))
    console.print(CompressionReport.load(folder / FOUND / "report.json").table())
    fonts = r"@font-face \{.*?\}"  # of another server
    picture.write_text(
        re.sub(fonts, "", console.export_svg(title="hfkdq compress"), flags=re.DOTALL), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
