# SPDX-License-Identifier: Apache-2.0
"""The beginning and the end that the examples share: arguments, data, teacher, training, and the line that is printed."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.state import AcceleratorState
from datasets import DatasetDict, load_dataset
from rich.console import Console
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hfkdq import CompressionReport, export_onnx

T = TypeVar("T")

# What the presets share: the settings of one GPU of 80 GB, and the data of those examples that are about no data of their own.
ONE_GPU = {"bf16": True, "dataloader_num_workers": 8, "logging_steps": 50}
# 120,000 titles and beginnings of news in four classes; batch, learning rate and epochs of the fine-tuning of BERT (Devlin et al., 2019).
NEWS: dict[str, Any] = {
    "dataset": "fancyzhx/ag_news", "max_seq_length": 128, "num_train_epochs": 3, "learning_rate": 5e-5, "warmup_steps": 500,
    "per_device_train_batch_size": 32, "per_device_eval_batch_size": 128,
}  # fmt: skip
NEWS_TEACHER = "textattack/bert-base-uncased-ag-news"
CLASSIFIER = {**NEWS, "teacher_model_name_or_path": NEWS_TEACHER, "num_student_layers": 6}
REVIEWS = {
    "dataset": "cornell-movie-review-data/rotten_tomatoes",
    "teacher_model_name_or_path": "textattack/bert-base-uncased-rotten-tomatoes",
}


@dataclass
class ClassifierArguments:
    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or folder of a classifier."}
    )
    dataset: str | None = field(
        default=None, metadata={"help": "Hub id, or a folder of train.parquet and test.parquet, with text and label."}
    )
    num_student_layers: int = field(default=1, metadata={"help": "Layers of the student, copied from the teacher."})
    max_seq_length: int = field(default=64, metadata={"help": "Tokens beyond this are cut off."})
    tiny: bool = field(default=False, metadata={"help": "Made-up sentences and model, to try the script in seconds."})


def read_arguments(
    kinds: tuple[type, ...], argv: list[str] | None, preset: dict[str, Any], **defaults: Any
) -> tuple[HfArgumentParser, tuple[Any, ...]]:
    """What is typed, over what the preset says where it is asked for, over the defaults; one object of each of these kinds."""
    parser = HfArgumentParser(kinds)
    parser.add_argument(
        "--preset", choices=["gpu"],
        help="gpu: a model and data of the Hub, and settings for one GPU of 80 GB. Not run yet. What is typed beside it wins.",
    )  # fmt: skip
    parser.set_defaults(**defaults)
    typed, _ = parser.parse_known_args(argv)
    if typed.preset and typed.tiny:
        parser.error("--preset names a model and data of the Hub, --tiny makes both up. Give one of the two.")
    if typed.preset:
        parser.set_defaults(**(ONE_GPU | preset))
    *found, _ = parser.parse_args_into_dataclasses(argv)
    if typed.preset and found[-1].process_index == 0:
        print(
            f"The preset {typed.preset} was not run yet. Where a comment in the example names a source, numbers are its."
        )
    return parser, tuple(found)


def parse(
    kind: type[T], argv: list[str] | None, preset: dict[str, Any], needs: str = "teacher_model_name_or_path",
    arguments: type[TrainingArguments] = TrainingArguments, **defaults: Any,
) -> tuple[T, Any]:  # fmt: skip
    """The arguments of an example and of the training, with the seed set; `needs` is what must be named beside the data."""
    defaults = {"logging_steps": 5, "save_strategy": "no", "report_to": "none", **defaults}
    parser, (args, training_args) = read_arguments((kind, arguments), argv, preset, **defaults)
    if not args.tiny and not (args.dataset and getattr(args, needs)):
        parser.error(f"Give --dataset and --{needs}, or --tiny, or --preset gpu.")
    if (Path(training_args.output_dir) / "onnx").exists():
        parser.error(
            f"{training_args.output_dir}/onnx holds an earlier file. Name another --output_dir, or remove it."
        )
    set_seed(training_args.seed)
    return args, training_args


def load_splits(dataset: str) -> DatasetDict:
    """The splits of a data set of the Hub, whose configuration may follow after a colon, or of a folder.

    Where there is no `test`, validation is that, and where there is none either, a tenth of the training.
    """
    raw = load_dataset(*([dataset] if Path(dataset).exists() else dataset.split(":")))
    if "test" in raw:
        return raw
    if "validation" in raw:
        return DatasetDict({**raw, "test": raw["validation"]})
    return raw["train"].train_test_split(0.1, seed=0)


def first_rows(raw: DatasetDict, count: int | None) -> DatasetDict:
    """The first rows of each split, or all."""
    if count is None:
        return raw
    return DatasetDict({name: rows.select(range(min(count, len(rows)))) for name, rows in raw.items()})


def load_classifier(
    args: Any, name: str | None, **made_up: Any
) -> tuple[DatasetDict, PreTrainedTokenizerBase, PreTrainedModel]:
    """Texts with labels, tokenizer and classifier: those that are named, or made-up ones."""
    if args.tiny:
        from made_up import text_classification

        raw, tokenizer, (model,) = text_classification(**made_up)
        return raw, tokenizer, model
    raw = load_splits(args.dataset)
    classes = raw["train"].features["label"].num_classes
    model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=classes)
    return raw, AutoTokenizer.from_pretrained(name), model


def tokenize(raw: DatasetDict, tokenizer: PreTrainedTokenizerBase, max_length: int) -> DatasetDict:
    """Token ids in place of the texts."""
    return raw.map(
        lambda rows: tokenizer(rows["text"], truncation=True, max_length=max_length),
        batched=True, remove_columns=["text"],
    )  # fmt: skip


def annotated(processor: Any) -> Callable[[Any], dict[str, Any]]:
    """Makes what a detector takes of rows with `image` and `objects`, when they are read."""

    def encode(rows: Any) -> dict[str, Any]:
        annotations = [
            {
                "image_id": 0,
                "annotations": [
                    {"bbox": box, "category_id": category, "area": box[2] * box[3], "iscrowd": 0}
                    for box, category in zip(objects["bbox"], objects["category"], strict=True)
                ],
            }
            for objects in rows["objects"]
        ]
        pictures = [image.convert("RGB") for image in rows["image"]]
        batch = processor(images=pictures, annotations=annotations, return_tensors="pt")
        return {"pixel_values": batch["pixel_values"], "labels": batch["labels"]}

    return encode


def collate_pictures(rows: list[Any]) -> dict[str, Any]:
    """A batch of annotated pictures, which have different numbers of objects."""
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": [row["labels"] for row in rows],
    }


def train_and_save(trainer: Trainer, evaluated: bool = True) -> dict[str, float] | None:
    """Trains, evaluates and saves; the metrics, in the main process alone, which no other is joined to any more."""
    trainer.train()
    metrics = trainer.evaluate() if evaluated else {}
    trainer.save_model()
    trainer.save_state()
    is_main = trainer.is_world_process_zero()
    if trainer.args.world_size > 1:  # times and metrics want a process that others leave alone
        trainer.accelerator.wait_for_everyone()
        torch.distributed.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
    return metrics if is_main else None


def to_file(
    trainer: Trainer, teacher: PreTrainedModel, data: Any, timed: bool = True, metrics: Any = None,
    student: PreTrainedModel | None = None, **export: Any,
) -> None:  # fmt: skip
    """Exports what was trained, measures teacher, student and file, and saves report and card; without `metrics` by the usual
    ones of the task, which a model of one's own does not have. `student` is the trained model where the trainer has shards of it."""
    folder, student = Path(trainer.args.output_dir), trainer.model if student is None else student
    how = dict(eval_dataset=data, processing_class=trainer.processing_class, data_collator=trainer.data_collator)
    how["compute_metrics"] = metrics
    file = export_onnx(student, folder / "onnx", latency_rounds=0, **how, **export)
    report = CompressionReport.measure(
        teacher=teacher, student=student, onnx=file, latency_rounds=3 if timed else 0, **how
    )
    report.save_all(folder)
    Console().print(report.table())
    metric = next(iter(report.engines[0].metrics))
    print(f"{metric}: {', '.join(f'{row.name} {row.metrics[metric]:.4f}' for row in report.engines)}.")
    print(f"{steps_and_terms(trainer)}. Saved in {trainer.args.output_dir}.")


def steps_and_terms(trainer: Trainer) -> str:
    """How many steps were taken, and the terms of the loss as they were last logged."""
    last = next(row for row in reversed(trainer.state.log_history) if "loss" in row)
    terms = ", ".join(f"{name} {last[name]:.3f}" for name in last if name.endswith(("_loss", "_kd", "uld")))
    return f"{trainer.state.global_step} steps: {terms}"
