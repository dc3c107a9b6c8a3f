#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Distil, prune and quantize a text classifier, export it to int8 ONNX, and write its model card.

With a fine-tuned teacher from the Hub:

    accelerate launch examples/distill_text_classifier.py \
        --teacher_model_name_or_path textattack/bert-base-uncased-rotten-tomatoes \
        --dataset_name cornell-movie-review-data/rotten_tomatoes \
        --num_student_layers 3 --output_dir out/rotten --push_to_hub

With local files, and a pretrained encoder that is fine-tuned as the teacher first:

    python examples/distill_text_classifier.py \
        --teacher_model_name_or_path path/to/encoder --teacher_epochs 2 \
        --train_file train.parquet --validation_file validation.parquet --test_file test.parquet \
        --num_student_layers 3 --output_dir out/rotten
    accelerate launch examples/distill_text_classifier.py --preset gpu
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, load_dataset
from example_utils import CLASSIFIER, read_arguments
from rich.console import Console
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
    PruningCallback,
    PruningSpec,
    QATCallback,
    QuantizationSpec,
    TaskLoss,
    export_onnx,
    load_quantized,
    make_student,
    push_to_hub,
)
from hfkdq.metrics import classification_metrics
from hfkdq.report import DatasetInfo

GPU = {name: value for name, value in CLASSIFIER.items() if name != "dataset"} | {
    "dataset_name": CLASSIFIER["dataset"], "output_dir": "out/news",
}  # fmt: skip


@dataclass
class DataArguments:
    """Where the texts and labels come from: a data set of the Hub, or files."""

    dataset_name: str | None = field(default=None, metadata={"help": "Id of a data set on the Hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    train_file: str | None = field(default=None, metadata={"help": "CSV, JSON lines or parquet file."})
    validation_file: str | None = field(default=None, metadata={"help": "The same, for evaluation during training."})
    test_file: str | None = field(default=None, metadata={"help": "The same, for the reported metrics."})
    text_column: str = field(default="text", metadata={"help": "Column of the texts."})
    label_column: str = field(default="label", metadata={"help": "Column of the labels."})
    max_seq_length: int = field(default=64, metadata={"help": "Tokens beyond this are cut off."})
    model_license: str | None = field(default=None, metadata={"help": "License of the student, for its card."})
    base_model: str | None = field(
        default=None, metadata={"help": "Hub id that the teacher comes from, for the card."}
    )
    dataset_id: str | None = field(default=None, metadata={"help": "Hub id of what the files hold, for the card."})
    language: str | None = field(default=None, metadata={"help": "Language of the texts, such as en, for the card."})


@dataclass
class CompressionArguments:
    """What is done to the teacher to make the student."""

    teacher_model_name_or_path: str | None = field(default=None, metadata={"help": "Hub id or folder of the teacher."})
    teacher_epochs: float = field(default=0.0, metadata={"help": "Epochs to fine-tune the teacher for first."})
    num_student_layers: int = field(default=3, metadata={"help": "Layers of the student, copied from the teacher."})
    temperature: float = field(default=2.0, metadata={"help": "Temperature of the distilled logits."})
    task_weight: float = field(default=0.5, metadata={"help": "Weight of the loss on the labels."})
    logit_weight: float = field(default=1.0, metadata={"help": "Weight of the distilled logits."})
    hidden_state_weight: float = field(default=1.0, metadata={"help": "Weight of the distilled hidden states."})
    attention_weight: float = field(default=0.1, metadata={"help": "Weight of the distilled attentions."})
    neuron_sparsity: float = field(default=0.0, metadata={"help": "Share of the feed-forward neurons to remove."})
    float_only: bool = field(default=False, metadata={"help": "Leave quantization-aware training out."})
    publish_only: bool = field(
        default=False, metadata={"help": "Export and measure what an earlier call left in --output_dir."}
    )
    tiny: bool = field(default=False, metadata={"help": "A made-up teacher and texts, to try the script in seconds."})


def main(argv: list[str] | None = None) -> None:
    kinds = (DataArguments, CompressionArguments, TrainingArguments)
    _, (data_args, args, training_args) = read_arguments(kinds, argv, GPU)
    set_seed(training_args.seed)
    # The push at the end is one commit of everything; the Trainer's own pushes would publish half of it.
    push, training_args.push_to_hub = training_args.push_to_hub, False
    onnx_folders = {"ONNX float": Path(training_args.output_dir, "onnx-float")}
    if not args.float_only:
        onnx_folders["ONNX int8"] = Path(training_args.output_dir, "onnx-int8")
    for folder in onnx_folders.values():
        if folder.exists():
            sys.exit(f"{folder} exists already. Name another --output_dir, or move it away.")

    raw, labels = load_texts(data_args, args)
    if not args.publish_only:
        train(raw, labels, data_args, args, training_args)
        if training_args.process_index != 0:
            return
        if training_args.world_size > 1:  # Timings want a process that the others leave alone.
            publish_alone()
    publish(raw, onnx_folders, data_args, args, training_args, push)


def train(
    raw: DatasetDict,
    labels: list[str],
    data_args: DataArguments,
    args: CompressionArguments,
    training_args: TrainingArguments,
) -> None:
    """Leaves the student in `output_dir` and the teacher in `output_dir/teacher`."""
    teacher, tokenizer = load_teacher(args, raw, labels)
    data = tokenize(raw, tokenizer, data_args)
    if args.teacher_epochs:
        finetune(teacher, tokenizer, data, training_args, args.teacher_epochs)
    compress(teacher, tokenizer, data, training_args, args)
    if training_args.process_index == 0:
        teacher.save_pretrained(Path(training_args.output_dir, "teacher"))


def publish_alone() -> None:
    """Runs the rest of this script in one process, outside of the distributed run."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "ACCELERATE_", "OMP_")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(launcher)}
    done = subprocess.run([sys.executable, *sys.argv, "--publish_only"], env=environment)
    sys.exit(done.returncode)


def load_texts(data_args: DataArguments, args: CompressionArguments) -> tuple[DatasetDict, list[str]]:
    """The splits, and the names of the classes."""
    if args.tiny:
        return tiny_texts()
    if data_args.dataset_name:
        raw = load_dataset(data_args.dataset_name, data_args.dataset_config_name)
    else:
        names = {"train": data_args.train_file, "validation": data_args.validation_file, "test": data_args.test_file}
        files = {split: file for split, file in names.items() if file}
        if "train" not in files:
            sys.exit("Give --dataset_name, or --train_file with --validation_file or --test_file, or --tiny.")
        extension = Path(files["train"]).suffix.lstrip(".")
        raw = load_dataset({"jsonl": "json"}.get(extension, extension), data_files=files)
    if data_args.label_column != "label":
        raw = raw.rename_column(data_args.label_column, "label")
    if not isinstance(raw["train"].features["label"], ClassLabel):
        raw = raw.class_encode_column("label")
    return raw, raw["train"].features["label"].names


def load_teacher(
    args: CompressionArguments, raw: DatasetDict, labels: list[str]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if args.tiny:
        return tiny_teacher(raw, labels)
    if not args.teacher_model_name_or_path:
        sys.exit("Give --teacher_model_name_or_path: a Hub id or a folder.")
    tokenizer = AutoTokenizer.from_pretrained(args.teacher_model_name_or_path)
    teacher = AutoModelForSequenceClassification.from_pretrained(
        args.teacher_model_name_or_path,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={name: i for i, name in enumerate(labels)},
    )
    return teacher, tokenizer


def tokenize(raw: DatasetDict, tokenizer: PreTrainedTokenizerBase, data_args: DataArguments) -> DatasetDict:
    def encode(rows: dict) -> dict:
        return tokenizer(rows[data_args.text_column], truncation=True, max_length=data_args.max_seq_length)

    drop = [name for name in raw["train"].column_names if name != "label"]
    return raw.map(encode, batched=True, remove_columns=drop, desc="Tokenizing").rename_column("label", "labels")


def evaluation_split(data: DatasetDict) -> str:
    return next(split for split in ("test", "validation", "train") if split in data)


def finetune(
    teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: DatasetDict, training_args: TrainingArguments, epochs: float
) -> None:  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            scratch, num_train_epochs=epochs, learning_rate=5e-5, warmup_steps=50, save_strategy="no", report_to=[],
            per_device_train_batch_size=training_args.per_device_train_batch_size, seed=training_args.seed,
            logging_steps=training_args.logging_steps, use_cpu=training_args.use_cpu,
        )  # fmt: skip
        Trainer(teacher, arguments, train_dataset=data["train"], processing_class=tokenizer).train()


def compress(
    teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: DatasetDict, training_args: TrainingArguments, args: CompressionArguments
) -> None:  # fmt: skip
    student = make_student(teacher, num_layers=args.num_student_layers)
    objectives = [
        TaskLoss(weight=args.task_weight),
        LogitKD(temperature=args.temperature, weight=args.logit_weight),
        HiddenStateKD(weight=args.hidden_state_weight),
        AttentionKD(weight=args.attention_weight),
    ]
    callbacks = []
    if args.neuron_sparsity:
        callbacks.append(PruningCallback(PruningSpec(sparsity=args.neuron_sparsity, structure="neuron")))
    if not args.float_only:
        callbacks.append(QATCallback(QuantizationSpec()))
    trainer = DistillationTrainer(
        student,
        training_args,
        train_dataset=data["train"],
        eval_dataset=data[evaluation_split(data)],
        processing_class=tokenizer,
        compute_metrics=classification_metrics,
        teacher_model=teacher,
        objectives=objectives,
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()


def publish(
    raw: DatasetDict,
    onnx_folders: dict[str, Path],
    data_args: DataArguments,
    args: CompressionArguments,
    training_args: TrainingArguments,
    push: bool,
) -> None:
    """Exports and measures what `train` left, writes report, plot and card, and pushes them if asked to."""
    output_dir = Path(training_args.output_dir)
    tokenizer = AutoTokenizer.from_pretrained(output_dir)
    teacher = AutoModelForSequenceClassification.from_pretrained(output_dir / "teacher")
    student = (AutoModelForSequenceClassification.from_pretrained if args.float_only else load_quantized)(output_dir)
    data = tokenize(raw, tokenizer, data_args)
    split = evaluation_split(data)
    dataset_id = data_args.dataset_name or data_args.dataset_id
    for name, folder in onnx_folders.items():
        quantization = QuantizationSpec() if name == "ONNX int8" else "float32"
        export_onnx(
            student, folder, quantization=quantization, processing_class=tokenizer,
            calibration=data[split].remove_columns("labels"), latency_rounds=0,  # the report times all engines together
        )  # fmt: skip
    report = CompressionReport.measure(
        teacher=teacher,
        student=student,
        onnx=onnx_folders,
        eval_dataset=data[split],
        processing_class=tokenizer,
        compute_metrics=classification_metrics,
        dataset=DatasetInfo(
            name=(dataset_id or "local files").split("/")[-1],
            id=dataset_id,
            config=data_args.dataset_config_name,
            split=split,
        ),
        base_model=data_args.base_model,
        license=data_args.model_license,
        language=data_args.language,
    )
    report.save_all(output_dir, training_args.hub_model_id)
    Console().print(report.table())
    print(f"Wrote {output_dir}: checkpoint, {', '.join(f.name for f in onnx_folders.values())}, report and card.")
    if push:
        repo_id = training_args.hub_model_id or output_dir.name
        info = push_to_hub(list(onnx_folders.values())[-1], repo_id, report=report, token=training_args.hub_token)
        print(f"Pushed to {info.repo_url}.")


def tiny_texts() -> tuple[DatasetDict, list[str]]:
    """Sentences whose adjective decides the label."""
    words = {"negative": ["dull", "awful", "boring", "poor"], "positive": ["bright", "great", "moving", "rich"]}
    rows = [
        {"text": f"a {word} film number {i} with a {noun}", "label": label}
        for i in range(4)
        for noun in ("plot", "cast", "score", "twist")
        for label, group in enumerate(words.values())
        for word in group
    ]
    parts = Dataset.from_list(rows).cast_column("label", ClassLabel(names=list(words))).train_test_split(32, seed=0)
    return DatasetDict(train=parts["train"], validation=parts["test"], test=parts["test"]), list(words)


def tiny_teacher(raw: DatasetDict, labels: list[str]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A BERT of random weights with a vocabulary of the texts' own words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = sorted({word for text in raw["train"]["text"] for word in text.split()})
    backend = Tokenizer(models.WordLevel({t: i for i, t in enumerate([*special, *words])}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=64, model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=6, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=64, id2label=dict(enumerate(labels)), label2id={n: i for i, n in enumerate(labels)},
    )  # fmt: skip
    return BertForSequenceClassification(config), tokenizer


if __name__ == "__main__":
    main()
