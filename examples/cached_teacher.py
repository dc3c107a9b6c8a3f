#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Run the teacher once over the training data, then train a student from what it said, without the teacher in memory.

    accelerate launch examples/cached_teacher.py --num_student_layers 3 --output_dir out/cached \
        --teacher_model_name_or_path textattack/bert-base-uncased-rotten-tomatoes \
        --dataset cornell-movie-review-data/rotten_tomatoes

    python examples/cached_teacher.py --tiny --learning_rate 1e-3 --output_dir out/cached
    accelerate launch examples/cached_teacher.py --preset gpu
"""

from __future__ import annotations

import time
from pathlib import Path

from example_utils import (
    CLASSIFIER,
    REVIEWS,
    ClassifierArguments,
    load_classifier,
    parse,
    steps_and_terms,
    tokenize,
    train_and_save,
)

from hfkdq import DistillationTrainer, HiddenStateKD, LogitKD, TaskLoss, cache_teacher_outputs, make_student
from hfkdq.metrics import classification_metrics

GPU = {**CLASSIFIER, **REVIEWS, "output_dir": "out/cached"}


def main(argv: list[str] | None = None) -> None:
    args, training_args = parse(ClassifierArguments, argv, GPU)
    raw, tokenizer, teacher = load_classifier(args, args.teacher_model_name_or_path)
    data = tokenize(raw, tokenizer, args.max_seq_length)

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
    metrics = train_and_save(trainer)
    if metrics is None:
        return
    columns = sorted(set(train.column_names) - set(data["train"].column_names))
    print(f"Caching {', '.join(columns)} took {seconds[0]:.2f} s; reading them again, {seconds[1]:.2f} s.")
    print(f"{steps_and_terms(trainer)}; accuracy {metrics['eval_accuracy']:.3f}.")
    print(f"Saved in {training_args.output_dir}, the teacher's outputs in {outputs}.")


if __name__ == "__main__":
    main()
