#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Run the teacher once over the training data, then train a student from what it said, without the teacher in memory.

    accelerate launch examples/cached_teacher.py --num_student_layers 3 --output_dir out/cached \
        --teacher_model_name_or_path textattack/bert-base-uncased-rotten-tomatoes \
        --dataset cornell-movie-review-data/rotten_tomatoes

    python examples/cached_teacher.py --tiny --learning_rate 1e-3 --output_dir out/cached
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from datasets import load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    HfArgumentParser,
    TrainingArguments,
    set_seed,
)

from hfkdq import DistillationTrainer, HiddenStateKD, LogitKD, TaskLoss, cache_teacher_outputs, make_student
from hfkdq.metrics import classification_metrics


@dataclass
class Arguments:
    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or folder of a classifier."}
    )
    dataset: str | None = field(
        default=None, metadata={"help": "Hub id, or a folder of train.parquet and test.parquet, with text and label."}
    )
    num_student_layers: int = field(default=1, metadata={"help": "Layers of the student, copied from the teacher."})
    max_seq_length: int = field(default=64, metadata={"help": "Tokens beyond this are cut off."})
    tiny: bool = field(default=False, metadata={"help": "Made-up sentences and model, to try the script in seconds."})


def main(argv: list[str] | None = None) -> None:
    parser = HfArgumentParser((Arguments, TrainingArguments))
    parser.set_defaults(logging_steps=5, save_strategy="no", report_to="none")
    args, training_args = parser.parse_args_into_dataclasses(argv)
    set_seed(training_args.seed)
    if args.tiny:
        from made_up import text_classification

        raw, tokenizer, (teacher,) = text_classification()
    else:
        if args.dataset is None or args.teacher_model_name_or_path is None:
            parser.error("Give --dataset and --teacher_model_name_or_path, or --tiny.")
        raw = load_dataset(args.dataset)
        tokenizer = AutoTokenizer.from_pretrained(args.teacher_model_name_or_path)
        teacher = AutoModelForSequenceClassification.from_pretrained(
            args.teacher_model_name_or_path, num_labels=raw["train"].features["label"].num_classes
        )
    data = raw.map(
        lambda rows: tokenizer(rows["text"], truncation=True, max_length=args.max_seq_length),
        batched=True, remove_columns=["text"],
    )  # fmt: skip

    student = make_student(teacher, num_layers=args.num_student_layers)
    top = teacher.config.num_hidden_layers
    outputs = Path(training_args.output_dir, "teacher-outputs")
    seconds = []
    for _ in range(2):  # the second time, as in every later run, they are read from the folder
        start = time.perf_counter()
        train = cache_teacher_outputs(
            teacher, data["train"], processing_class=tokenizer, folder=outputs, hidden_states=[top]
        )
        seconds.append(time.perf_counter() - start)
    del teacher

    trainer = DistillationTrainer(
        student, training_args, train_dataset=train, eval_dataset=data["test"], processing_class=tokenizer,
        compute_metrics=classification_metrics,
        objectives=[
            TaskLoss(weight=0.5),
            LogitKD(temperature=2.0),
            HiddenStateKD(layers={args.num_student_layers: top}),  # one of the layers that are cached
        ],
    )  # fmt: skip
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    trainer.save_state()
    if not trainer.is_world_process_zero():
        return
    last = next(row for row in reversed(trainer.state.log_history) if "loss" in row)
    terms = ", ".join(f"{name} {last[name]:.3f}" for name in last if name.endswith(("_loss", "_kd")))
    columns = sorted(set(train.column_names) - set(data["train"].column_names))
    print(f"Caching {', '.join(columns)} took {seconds[0]:.2f} s; reading them again, {seconds[1]:.2f} s.")
    print(f"{trainer.state.global_step} steps: {terms}; accuracy {metrics['eval_accuracy']:.3f}.")
    print(f"Saved in {training_args.output_dir}, the teacher's outputs in {outputs}.")


if __name__ == "__main__":
    main()
