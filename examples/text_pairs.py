#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Compress a model of pairs of texts to an int8 file: which class a pair has, or how alike its texts are (regression).

    accelerate launch examples/text_pairs.py --first question --second sentence --num_student_layers 3 --output_dir out/qnli \
        --teacher_model_name_or_path path/to/a/finetuned/bert --dataset nyu-mll/glue:qnli

    python examples/text_pairs.py --tiny --regression --learning_rate 5e-3 --output_dir out/stsb
    accelerate launch examples/text_pairs.py --preset gpu

With `--regression` the column `label` has numbers: the student learns the teacher's by their squared distance, and the
metric is the correlation of ranks (`--dataset nyu-mll/glue:stsb --first sentence1 --second sentence2`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from example_utils import first_rows, load_splits, parse, to_file, train_and_save
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from hfkdq import DistillationTrainer, LogitKD, QATCallback, QuantizationSpec, TaskLoss, make_student
from hfkdq.metrics import metrics_for

# Length, epochs, batch and learning rate of TinyBERT on GLUE (Jiao et al., 2020).
GPU = {
    "teacher_model_name_or_path": "textattack/bert-base-uncased-QNLI", "dataset": "nyu-mll/glue:qnli", "first": "question",
    "second": "sentence", "num_student_layers": 6, "num_train_epochs": 3, "learning_rate": 3e-5, "warmup_steps": 500,
    "per_device_train_batch_size": 32, "per_device_eval_batch_size": 128, "output_dir": "out/qnli",
}  # fmt: skip


@dataclass
class Arguments:
    teacher_model_name_or_path: str | None = field(default=None, metadata={"help": "Hub id or folder of the teacher."})
    dataset: str | None = field(
        default=None,
        metadata={"help": "Hub id, with a configuration after a colon, or a folder of parquet files."},
    )
    first: str = field(default="sentence1", metadata={"help": "Column of the first text."})
    second: str = field(default="sentence2", metadata={"help": "Column of the second text."})
    evaluated: str = field(default="validation", metadata={"help": "The split to measure on."})
    regression: bool = field(default=False, metadata={"help": "Labels are numbers, not classes."})
    num_student_layers: int = field(default=1, metadata={"help": "Layers of the student, copied from the teacher."})
    max_seq_length: int = field(default=128, metadata={"help": "Tokens of both texts beyond this are cut off."})
    max_samples: int | None = field(default=None, metadata={"help": "Pairs of each split. All by default."})
    tiny: bool = field(default=False, metadata={"help": "Made-up pairs and model, to try the script in seconds."})


def main(argv: list[str] | None = None) -> None:
    args, training_args = parse(Arguments, argv, GPU)
    if args.tiny:
        from made_up import text_pairs

        raw, tokenizer, teacher = text_pairs(args.regression)
    else:
        raw = load_splits(args.dataset)
        tokenizer = AutoTokenizer.from_pretrained(args.teacher_model_name_or_path)
        classes = 1 if args.regression else raw["train"].features["label"].num_classes
        teacher = AutoModelForSequenceClassification.from_pretrained(
            args.teacher_model_name_or_path, num_labels=classes
        )
    raw = first_rows(raw, args.max_samples)

    def encode(rows: Any) -> Any:
        return tokenizer(rows[args.first], rows[args.second], truncation=True, max_length=args.max_seq_length)

    drop = [name for name in raw["train"].column_names if name != "label"]
    data = raw.map(encode, batched=True, remove_columns=drop).rename_column("label", "labels")
    pad = DataCollatorWithPadding(tokenizer)
    if args.tiny:
        from made_up import fit

        fit(teacher, data["train"], pad, steps=120)
    student = make_student(teacher, num_layers=args.num_student_layers)
    logits = LogitKD(divergence="mse") if args.regression else LogitKD(temperature=2.0)
    trainer = DistillationTrainer(
        student, training_args, train_dataset=data["train"], eval_dataset=data[args.evaluated],
        processing_class=tokenizer, data_collator=pad, compute_metrics=metrics_for(student, tokenizer, data[args.evaluated]),
        teacher_model=teacher, objectives=[TaskLoss(weight=0.5), logits], callbacks=[QATCallback(QuantizationSpec())],
    )  # fmt: skip
    if train_and_save(trainer) is not None:
        to_file(trainer, teacher, data[args.evaluated], timed=not args.tiny)


if __name__ == "__main__":
    main()
