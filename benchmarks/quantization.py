#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""What does each width cost? Text and images, quantized after and while training, with a teacher and without, over seeds.

    make bench-quantization TEXT=path/to/rotten_tomatoes IMAGES=path/to/fashion_mnist

Distil first, then quantize: every quantized model starts from the float student of its own seed. Without distillation that
student learned from the labels, and so does the quantized one. With it, the student learned from labels and a teacher,
and the quantized one learns from these and from the float student besides. All quantized models but the one of PTQ are so
trained for longer than the float one they are compared with. Settings were chosen with `--held_out`, on rows
taken out of the training split and with another seed. Every run is kept in a file of its own, so that the command goes
on where it was; it ends with a table and a plot of each task.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import concatenate_datasets, load_dataset
from matplotlib.figure import Figure
from objectives import by_length
from rich.console import Console
from rich.table import Table
from text_classification import fine_tuned_teacher
from text_classification import load as load_text
from torch.utils.data import Dataset as TorchDataset
from transformers import (
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hfkdq import (
    DistillationTrainer,
    FeatureMapKD,
    HiddenStateKD,
    LogitKD,
    QATCallback,
    QuantizationSpec,
    TaskLoss,
    make_student,
    quantize,
)
from hfkdq.metrics import classification_metrics
from hfkdq.objectives import Objective


@dataclass(frozen=True)
class Arm:
    """A spec; whether it is trained, for which multiple of the float student's steps, at which of its learning rate.

    `goal` is the difference in points that the distilled one should not fall below.
    """

    spec: QuantizationSpec | None = None
    trained: bool = True
    steps: float = 1.0
    rate: float = 1.0
    goal: float | None = None


ARMS = {
    "float": Arm(),
    "PTQ int8": Arm(QuantizationSpec(), trained=False),
    "QAT int8": Arm(QuantizationSpec(), steps=0.25, rate=0.25, goal=-0.3),
    "QAT W4A8": Arm(QuantizationSpec(weight_bits=4), steps=0.4, rate=0.5, goal=-1.0),
    "QAT W4, float activations": Arm(QuantizationSpec(weight_bits=4, activation_bits=None), steps=0.4, rate=0.5),
    "QAT W2A8 (ternary)": Arm(QuantizationSpec(weight_bits=2), rate=2.0, goal=-3.0),
}
# What every distilled quantized model learns from, besides the inner states of its float student.
TEACHERS = [TaskLoss(weight=0.5), LogitKD(teacher="teacher"), LogitKD(teacher="float")]


@dataclass(frozen=True)
class Task:
    """Data and models of one kind of input, how long a float student is trained and what a teacher tells it."""

    name: str
    rows: dict[str, Any]
    teacher: PreTrainedModel
    student: Callable[[], PreTrainedModel]
    objectives: Callable[[bool], list[Objective]]  # of the float student, and with True of the quantized one
    calibration: Any
    steps: int
    settings: dict[str, Any]
    processing_class: Any = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--text", type=Path, help="folder of rotten_tomatoes: train, validation and test parquet files"
    )
    parser.add_argument("--images", type=Path, help="folder of fashion_mnist: train and test parquet files")
    parser.add_argument("--output_dir", type=Path, default=Path("out/bench-quantization"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, help="float comes first")
    parser.add_argument("--text_steps", type=int, default=240, help="steps of the float student, 32 rows each")
    parser.add_argument("--image_steps", type=int, default=2000, help="steps of the float student, 64 rows each")
    parser.add_argument("--layers", type=int, default=3, help="layers of the student that reads text")
    parser.add_argument("--train_images", type=int, default=12000)
    parser.add_argument(
        "--held_out", action="store_true", help="measure on held-out training rows, to choose settings"
    )
    options = parser.parse_args()
    if options.text is None and options.images is None:
        parser.error("Give --text, --images or both.")
    split = "held_out" if options.held_out else "test"
    for folder, load in ((options.text, text_task), (options.images, image_task)):
        if folder is None:
            continue
        task = load(folder, options)
        for seed in options.seeds:
            for arm in options.arms:
                for distilled in (False, True):
                    run(task, arm, distilled, seed, split, options.output_dir / task.name)
        show(task, split, options.output_dir / task.name)


def text_task(folder: Path, options: argparse.Namespace) -> Task:
    """Rotten Tomatoes, validation and test rows together; all-MiniLM-L6-v2, fine-tuned, gives the student layers."""
    tokenizer, data = load_text(folder)
    settings = argparse.Namespace(output_dir=options.output_dir / "text", teacher_epochs=2)
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    teacher = fine_tuned_teacher(settings, tokenizer, data)
    parts = data["train"].train_test_split(1000, seed=0)
    rows = dict(train=parts["train"], held_out=by_length(parts["test"]))
    rows["test"] = by_length(concatenate_datasets([data["validation"], data["test"]]))

    def student() -> PreTrainedModel:
        return make_student(teacher, num_layers=options.layers)

    def objectives(quantized: bool) -> list[Objective]:
        if not quantized:
            return [TaskLoss(weight=0.5), LogitKD(), HiddenStateKD()]
        own = {layer: layer for layer in range(1, options.layers + 1)}
        return [*TEACHERS, HiddenStateKD(layers=own, teacher="float")]

    settings = dict(learning_rate=1e-4, per_device_train_batch_size=32, weight_decay=0.01, group_by_length=True)
    return Task(
        "text", rows, teacher, student, objectives, rows["train"].select(range(256)), options.text_steps, settings,
        tokenizer,
    )  # fmt: skip


def image_task(folder: Path, options: argparse.Namespace) -> Task:
    """Fashion-MNIST; small residual networks from scratch, the teacher wider and deeper."""
    files = {split: str(folder / f"{split}*.parquet") for split in ("train", "test")}
    raw = load_dataset("parquet", data_files=files)
    train = raw["train"].shuffle(seed=0)
    rows = dict(
        train=Mirrored(images(train.select(range(options.train_images)))),
        held_out=images(train.select(range(options.train_images, options.train_images + 3000))),
        test=images(raw["test"]),
    )
    settings = dict(learning_rate=3e-3, per_device_train_batch_size=64, weight_decay=0.05)
    folder = options.output_dir / "images" / "teacher"
    if not (folder / "model.safetensors").exists():
        set_seed(0)
        teacher = residual_network([32, 64, 128], depth=2)
        Trainer(teacher, arguments(folder.parent, 0, 2000, **settings), train_dataset=rows["train"]).train()
        teacher.save_pretrained(folder)
    teacher = ResNetForImageClassification.from_pretrained(folder)

    def objectives(quantized: bool) -> list[Objective]:
        if not quantized:
            return [TaskLoss(weight=0.5), LogitKD(), FeatureMapKD(weight=5.0)]
        return [*TEACHERS, FeatureMapKD(weight=5.0, teacher="float")]

    pixels = [example["pixel_values"] for example in rows["train"].examples[:256]]
    calibration = [{"pixel_values": batch} for batch in torch.stack(pixels).split(32)]
    return Task(
        "images", rows, teacher, lambda: residual_network([16, 32, 64], depth=1), objectives, calibration,
        options.image_steps, settings,
    )  # fmt: skip


class Mirrored(TorchDataset):
    """Images of which every other one is mirrored, drawn anew each time."""

    def __init__(self, examples: list[dict[str, Any]]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.examples[index]
        pixels = example["pixel_values"]
        return {**example, "pixel_values": pixels.flip(-1) if torch.rand(()) < 0.5 else pixels}


def images(rows: Any) -> list[dict[str, Any]]:
    """Examples with normalized pixels (channel, height, width)."""
    examples = []
    for row in rows:
        pixels = torch.frombuffer(bytearray(row["image"].tobytes()), dtype=torch.uint8).view(1, *row["image"].size)
        examples.append({"pixel_values": (pixels / 255 - 0.286) / 0.353, "labels": row["label"]})
    return examples


def residual_network(widths: list[int], depth: int) -> ResNetForImageClassification:
    return ResNetForImageClassification(
        ResNetConfig(
            num_channels=1, embedding_size=widths[0], hidden_sizes=widths, depths=[depth] * 3, layer_type="basic",
            num_labels=10,
        )
    )  # fmt: skip


def arguments(folder: Path, seed: int, steps: int, **settings: Any) -> TrainingArguments:
    return TrainingArguments(
        str(folder / "scratch"), seed=seed, max_steps=steps, warmup_ratio=0.1, per_device_eval_batch_size=128,
        save_strategy="no", report_to=[], logging_steps=max(1, steps // 3), disable_tqdm=True,
        dataloader_pin_memory=False, **settings,
    )  # fmt: skip


def run(task: Task, name: str, distilled: bool, seed: int, split: str, folder: Path) -> None:
    """Makes, measures and records one model, unless that was done before."""
    how = "distilled" if distilled else "labels"
    file = folder / f"{slug(name)}-{how}-{seed}-{split}.json"
    if file.exists():
        return
    set_seed(seed)
    arm, start = ARMS[name], folder / f"float-{how}-{seed}"
    load, teachers = type(task.teacher).from_pretrained, {"teacher": task.teacher}
    if arm.spec is None:
        model = task.student()
    else:
        model, teachers["float"] = load(start), load(start)
    if task.name == "text":
        model.get_input_embeddings().requires_grad_(False)
    settings = {**task.settings, "learning_rate": task.settings["learning_rate"] * arm.rate}
    if not arm.trained:
        quantize(model, arm.spec, task.calibration, processing_class=task.processing_class, batch_size=32)
    taught = dict(teacher_model=teachers, objectives=task.objectives(arm.spec is not None))
    trainer = DistillationTrainer(
        model, arguments(folder, seed, round(task.steps * arm.steps), **settings), train_dataset=task.rows["train"],
        processing_class=task.processing_class, compute_metrics=classification_metrics,
        callbacks=[QATCallback(arm.spec)] if arm.spec is not None and arm.trained else [],
        **(taught if distilled and arm.trained else {}),
    )  # fmt: skip
    started = time.perf_counter()
    if arm.trained:
        trainer.train()
    seconds = time.perf_counter() - started
    if arm.spec is None:
        model.save_pretrained(start)
    accuracy = 100 * trainer.evaluate(task.rows[split])["eval_accuracy"]
    steps = trainer.state.global_step
    print(
        f"{task.name}, {name}, {how}, seed {seed}: {accuracy:.2f} % after {steps} steps, {seconds:.0f} s", flush=True
    )
    found = dict(arm=name, distilled=distilled, seed=seed, steps=steps, seconds=seconds, accuracy=accuracy)
    file.write_text(json.dumps(found, indent=2) + "\n")


def slug(name: str) -> str:
    return "_".join("".join(letter for letter in name if letter.isalnum() or letter == " ").split())


def show(task: Task, split: str, folder: Path) -> None:
    """Accuracy by arm, and the difference to the float student of the same seed, which it started from."""
    found = [json.loads(file.read_text()) for file in sorted(folder.glob(f"*-{split}.json"))]
    accuracy = {(r["arm"], r["distilled"], r["seed"]): r["accuracy"] for r in found}
    rows = len(task.rows[split])
    table = Table("Model", title=f"{task.name}: accuracy (%) on {rows} {split.replace('_', '-')} rows")
    for how in ("labels alone", "distilled"):
        table.add_column(how, justify="right", no_wrap=True)
        table.add_column("against its float one", justify="right", no_wrap=True)
    table.add_column("goal", justify="right")
    for arm in ARMS:
        cells = []
        for distilled in (False, True):
            runs = {seed: a for (name, d, seed), a in accuracy.items() if (name, d) == (arm, distilled)}
            base = {seed: accuracy["float", distilled, seed] for seed in runs}
            gains = [a - base[seed] for seed, a in runs.items()]
            cells += [spread(list(runs.values())), "" if arm == "float" else f"{spread(gains, '+')}{extremes(gains)}"]
        goal = ARMS[arm].goal
        table.add_row(arm, *cells, "" if goal is None else f"{goal:+.1f}")
    console = Console(width=max(100, Console().width))
    console.print(table)
    trainer = Trainer(
        task.teacher, arguments(folder, 0, 1), processing_class=task.processing_class,
        compute_metrics=classification_metrics,
    )  # fmt: skip
    console.print(f"Teacher: {100 * trainer.evaluate(task.rows[split])['eval_accuracy']:.2f} %.")
    plot(task, accuracy, folder.parent / f"{task.name}-{split}.png")


def spread(values: list[float], sign: str = "") -> str:
    """Mean and standard deviation."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.2f}{deviation}" if values else "-"


def extremes(values: list[float]) -> str:
    return f"\n{min(values):+.2f} to {max(values):+.2f}" if len(values) > 1 else ""


def plot(task: Task, accuracy: dict[tuple[str, bool, int], float], file: Path) -> None:
    """A point for every seed, a line for the mean; quantized models with a teacher and without."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot(title=task.name, ylabel="accuracy (%)")
    for shift, distilled, label in ((-0.13, False, "labels alone"), (0.13, True, "distilled")):
        arms = [arm for arm in ARMS if any((arm, distilled) == key[:2] for key in accuracy)]
        runs = {arm: [a for key, a in accuracy.items() if key[:2] == (arm, distilled)] for arm in arms}
        places = [list(ARMS).index(arm) + shift for arm in arms]
        lines = axes.plot(places, [statistics.mean(runs[arm]) for arm in arms], "_", markersize=16, label=label)
        for place, arm in zip(places, arms, strict=True):
            axes.plot([place] * len(runs[arm]), runs[arm], "o", markersize=4, color=lines[0].get_color())
    axes.set_xticks(range(len(ARMS)), [arm.replace(", ", ",\n").replace(" (", "\n(") for arm in ARMS])
    axes.grid(axis="y", alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    main()
