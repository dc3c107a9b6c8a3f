#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""The recipe of DistilBERT: a student learns a masked language model on plain text, then a task from a classifier, to an int8 file.

    accelerate launch examples/masked_lm.py --num_student_layers 6 --text_steps 20000 --num_train_epochs 3 --output_dir out/distilbert \
        --masked_lm_name_or_path google-bert/bert-base-uncased --texts Salesforce/wikitext:wikitext-2-v1 \
        --teacher_model_name_or_path path/to/a/finetuned/bert --dataset cornell-movie-review-data/rotten_tomatoes

    python examples/masked_lm.py --tiny --learning_rate 5e-3 --output_dir out/distilbert
    accelerate launch examples/masked_lm.py --preset gpu

On text it learns the masked words, what the teacher expects in their place, and the direction of the states of its last layer (Sanh et
al., 2019). The classifier, of the same tokenizer as the language model, teaches the task; `--text_steps 0` goes there from the copied layers alone.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import load_dataset
from example_utils import CLASSIFIER, ClassifierArguments, load_classifier, parse, to_file, tokenize, train_and_save
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    TrainingArguments,
)

from hfkdq import DistillationTrainer, HiddenStateKD, LogitKD, QATCallback, QuantizationSpec, TaskLoss, make_student
from hfkdq.metrics import classification_metrics

# One learning rate is for the text and the task; DistilBERT's for text is 5e-4, with batches of thousands (Sanh et al., 2019).
GPU = {
    **CLASSIFIER, "masked_lm_name_or_path": "google-bert/bert-base-uncased", "texts": "Salesforce/wikitext:wikitext-103-raw-v1",
    "text_steps": 40_000, "learning_rate": 1e-4, "warmup_steps": 1000, "per_device_train_batch_size": 64,
    "output_dir": "out/distilbert",
}  # fmt: skip


@dataclass
class Arguments(ClassifierArguments):
    masked_lm_name_or_path: str | None = field(default=None, metadata={"help": "Hub id or folder of a masked LM."})
    texts: str | None = field(
        default=None, metadata={"help": "Hub id, with a configuration after a colon, or a folder; a column text."}
    )
    text_steps: int = field(default=20, metadata={"help": "Steps on plain text, before those of the task."})


def learned_language(args: Arguments, tokenizer: Any, raw: Any, training_args: TrainingArguments) -> Path:
    """Where the student is that learned the masked language model."""
    if args.tiny:
        from made_up import fit, masked_language_model

        teacher, texts = masked_language_model(tokenizer), raw["train"]
    else:
        teacher = AutoModelForMaskedLM.from_pretrained(args.masked_lm_name_or_path)
        texts = load_dataset(*args.texts.split(":"), split="train")
    encoded = texts.filter(lambda text: bool(text.strip()), input_columns="text").map(
        lambda rows: tokenizer(rows["text"], truncation=True, max_length=args.max_seq_length),
        batched=True, remove_columns=texts.column_names,
    )  # fmt: skip
    mask = DataCollatorForLanguageModeling(tokenizer)
    if args.tiny:
        fit(teacher, encoded, mask)
    folder, student = (
        Path(training_args.output_dir, "language"),
        make_student(teacher, num_layers=args.num_student_layers),
    )
    last = {args.num_student_layers - 1: teacher.config.num_hidden_layers - 1}
    if args.text_steps:
        first = copy.copy(training_args)
        first.output_dir, first.max_steps = str(folder), args.text_steps
        trainer = DistillationTrainer(
            student, first, train_dataset=encoded, processing_class=tokenizer, data_collator=mask, teacher_model=teacher,
            objectives=[TaskLoss(), LogitKD(temperature=2.0), HiddenStateKD(layers=last, distance="cosine")],
        )  # fmt: skip
        trainer.train()
        trainer.save_model()
        trainer.accelerator.wait_for_everyone()
    elif training_args.process_index == 0:
        student.save_pretrained(folder)
    return folder


def main(argv: list[str] | None = None) -> None:
    args, training_args = parse(Arguments, argv, GPU)
    raw, tokenizer, teacher = load_classifier(args, args.teacher_model_name_or_path)
    folder = learned_language(args, tokenizer, raw, training_args)
    student = AutoModelForSequenceClassification.from_pretrained(
        folder, id2label=teacher.config.id2label, label2id=teacher.config.label2id
    )
    data = tokenize(raw, tokenizer, args.max_seq_length).rename_column("label", "labels")
    trainer = DistillationTrainer(
        student, training_args, train_dataset=data["train"], eval_dataset=data["test"], processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer), compute_metrics=classification_metrics, teacher_model=teacher,
        objectives=[TaskLoss(weight=0.5), LogitKD(temperature=2.0)], callbacks=[QATCallback(QuantizationSpec())],
    )  # fmt: skip
    if train_and_save(trainer) is not None:
        to_file(trainer, teacher, data["test"], timed=not args.tiny)


if __name__ == "__main__":
    main()
