#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Compress a model that finds answers in texts to an int8 file, and measure exact match and F1 of the answers of the file.

    accelerate launch examples/question_answering.py --num_student_layers 3 --output_dir out/qa \
        --teacher_model_name_or_path distilbert/distilbert-base-uncased-distilled-squad --dataset path/to/folder

    python examples/question_answering.py --tiny --learning_rate 1e-3 --output_dir out/qa
    accelerate launch examples/question_answering.py --preset gpu

The data are `question`, `context` and `answers`, as in SQuAD. Long contexts become windows that overlap (`--doc_stride`), and the best
answer of all windows of a question counts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from example_utils import first_rows, load_splits, parse, to_file, train_and_save
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, DataCollatorWithPadding

from hfkdq import DistillationTrainer, LogitKD, QATCallback, QuantizationSpec, TaskLoss, make_student
from hfkdq.metrics import answer_features, metrics_for

# Learning rate, epochs, window and stride are those with which DistilBERT was distilled on SQuAD (Sanh et al., 2019).
GPU = {
    "teacher_model_name_or_path": "google-bert/bert-large-uncased-whole-word-masking-finetuned-squad",
    "dataset": "rajpurkar/squad", "num_student_layers": 12, "num_train_epochs": 3, "learning_rate": 3e-5, "warmup_steps": 500,
    "per_device_train_batch_size": 32, "per_device_eval_batch_size": 128, "output_dir": "out/qa",
}  # fmt: skip


@dataclass
class Arguments:
    teacher_model_name_or_path: str | None = field(default=None, metadata={"help": "Hub id or folder of a QA model."})
    dataset: str | None = field(
        default=None,
        metadata={"help": "Hub id, or a folder of train.parquet and validation.parquet, as SQuAD has them."},
    )
    num_student_layers: int = field(default=1, metadata={"help": "Layers of the student, copied from the teacher."})
    max_seq_length: int = field(default=384, metadata={"help": "Tokens of a window."})
    doc_stride: int = field(default=128, metadata={"help": "Tokens that neighbouring windows share."})
    max_samples: int | None = field(default=None, metadata={"help": "Questions of each split. All by default."})
    tiny: bool = field(default=False, metadata={"help": "Made-up questions and model, to try the script in seconds."})


def main(argv: list[str] | None = None) -> None:
    args, training_args = parse(Arguments, argv, GPU)
    if args.tiny:
        from made_up import fit, questions

        args.max_seq_length, args.doc_stride = 24, 8
        raw, tokenizer, teacher = questions()
    else:
        raw = load_splits(args.dataset)
        tokenizer = AutoTokenizer.from_pretrained(args.teacher_model_name_or_path)
        teacher = AutoModelForQuestionAnswering.from_pretrained(args.teacher_model_name_or_path)
    raw = first_rows(raw, args.max_samples)
    train, test = (
        answer_features(raw[name], tokenizer, args.max_seq_length, args.doc_stride) for name in ("train", "validation")
    )
    collator = DataCollatorWithPadding(tokenizer)
    if args.tiny:
        inputs = ["input_ids", "attention_mask", "start_positions", "end_positions"]
        fit(teacher, train.select_columns(inputs), collator, steps=120)
    student = make_student(teacher, num_layers=args.num_student_layers)
    trainer = DistillationTrainer(
        student, training_args, train_dataset=train, eval_dataset=test, processing_class=tokenizer, data_collator=collator,
        compute_metrics=metrics_for(student, tokenizer, test), teacher_model=teacher,
        objectives=[TaskLoss(weight=0.5), LogitKD(temperature=2.0)], callbacks=[QATCallback(QuantizationSpec())],
    )  # fmt: skip
    if train_and_save(trainer) is not None:
        to_file(trainer, teacher, test, timed=not args.tiny)


if __name__ == "__main__":
    main()
