#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Distil a classifier into one of another family that splits texts in its own way, as BERT into GPT-2, to an int8 file.

    accelerate launch examples/other_family.py --student_model_name_or_path openai-community/gpt2 --output_dir out/gpt2 \
        --teacher_model_name_or_path path/to/a/finetuned/bert --dataset cornell-movie-review-data/rotten_tomatoes

    python examples/other_family.py --tiny --learning_rate 5e-3 --output_dir out/gpt2
    accelerate launch examples/other_family.py --preset gpu

Rows have the tokens of both models, those of the teacher in columns that begin with `teacher_`; classes are the same, so logits are what
they share. Teacher, student and file are each measured on their own columns.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from example_utils import CLASSIFIER, ClassifierArguments, load_classifier, parse, to_file, train_and_save
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from hfkdq import DistillationTrainer, LogitKD, QATCallback, QuantizationSpec, TaskLoss
from hfkdq.collators import TeacherCollator
from hfkdq.metrics import classification_metrics

GPU = {**CLASSIFIER, "student_model_name_or_path": "openai-community/gpt2", "output_dir": "out/gpt2"}


@dataclass
class Arguments(ClassifierArguments):
    student_model_name_or_path: str | None = field(default=None, metadata={"help": "Hub id or folder of the student."})


def main(argv: list[str] | None = None) -> None:
    args, training_args = parse(Arguments, argv, GPU)
    raw, theirs, teacher = load_classifier(args, args.teacher_model_name_or_path)
    if args.tiny:
        from made_up import small_gpt

        own, student = small_gpt(teacher.config)
    else:
        own = AutoTokenizer.from_pretrained(args.student_model_name_or_path)
        student = AutoModelForSequenceClassification.from_pretrained(
            args.student_model_name_or_path, id2label=teacher.config.id2label, label2id=teacher.config.label2id
        )
        own.pad_token = own.pad_token or own.eos_token
    student.config.pad_token_id = own.pad_token_id  # where a text ends, the last token has read all of it

    def encode(rows: Any) -> dict[str, Any]:
        texts = [text.strip() for text in rows["text"]]
        ours, others = (one(texts, truncation=True, max_length=args.max_seq_length) for one in (own, theirs))
        return {**ours, **{f"teacher_{name}": values for name, values in others.items()}, "labels": rows["label"]}

    data = raw.map(encode, batched=True, remove_columns=raw["train"].column_names)
    trainer = DistillationTrainer(
        student, training_args, train_dataset=data["train"], eval_dataset=data["test"], processing_class=own,
        data_collator=TeacherCollator(DataCollatorWithPadding(own), DataCollatorWithPadding(theirs)),
        compute_metrics=classification_metrics, teacher_model=teacher,
        objectives=[TaskLoss(weight=0.5), LogitKD(temperature=2.0)], callbacks=[QATCallback(QuantizationSpec())],
    )  # fmt: skip
    if train_and_save(trainer) is not None:
        to_file(trainer, teacher, data["test"], timed=not args.tiny)


if __name__ == "__main__":
    main()
