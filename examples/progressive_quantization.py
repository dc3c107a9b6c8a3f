#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Progressive distillation: from hard labels to soft ones, with quantization faded in over the second half.

    accelerate launch examples/progressive_quantization.py --num_student_layers 3 --output_dir out/progressive \
        --teacher_model_name_or_path textattack/bert-base-uncased-rotten-tomatoes \
        --dataset cornell-movie-review-data/rotten_tomatoes

    python examples/progressive_quantization.py --tiny --learning_rate 1e-3 --output_dir out/progressive
    accelerate launch examples/progressive_quantization.py --preset gpu
"""

from __future__ import annotations

from example_utils import CLASSIFIER, ClassifierArguments, load_classifier, parse, tokenize, train_and_save

from hfkdq import (
    DistillationTrainer,
    LogitKD,
    QATCallback,
    QuantizationLoss,
    QuantizationSpec,
    TaskLoss,
    load_quantized,
    make_student,
)
from hfkdq.metrics import classification_metrics
from hfkdq.schedules import Linear

GPU = {**CLASSIFIER, "output_dir": "out/progressive"}
WEIGHTS = {"task_loss": Linear(1, 0), "logit_kd": Linear(0, 1), "quantization_loss": Linear(0, 1, begin=0.5)}


def main(argv: list[str] | None = None) -> None:
    args, training_args = parse(ClassifierArguments, argv, GPU)
    raw, tokenizer, teacher = load_classifier(args, args.teacher_model_name_or_path)
    data = tokenize(raw, tokenizer, args.max_seq_length)

    trainer = DistillationTrainer(
        make_student(teacher, num_layers=args.num_student_layers), training_args, train_dataset=data["train"],
        eval_dataset=data["test"], processing_class=tokenizer, compute_metrics=classification_metrics,
        teacher_model=teacher,
        objectives=[
            TaskLoss(weight=WEIGHTS["task_loss"]),
            LogitKD(temperature=2.0, weight=WEIGHTS["logit_kd"]),
            QuantizationLoss(objective=LogitKD(temperature=1.0), weight=WEIGHTS["quantization_loss"]),
        ],
        callbacks=[QATCallback(QuantizationSpec())],
    )  # fmt: skip
    metrics = train_and_save(trainer)
    if metrics is None:
        return
    print("  step" + "".join(f"{name:>19} x weight" for name in WEIGHTS))
    for row in (row for row in trainer.state.log_history if "loss" in row):
        progress = row["step"] / trainer.state.max_steps
        print(f"{row['step']:6}" + "".join(f"{row[name]:19.2g} x {weight(progress):6.2f}" for name, weight in WEIGHTS.items()))  # fmt: skip
    student = load_quantized(training_args.output_dir)
    print(f"{trainer.state.global_step} steps; accuracy in 8 bits {metrics['eval_accuracy']:.3f}.")
    print(f"Saved in {training_args.output_dir}, a quantized {type(student).__name__}.")


if __name__ == "__main__":
    main()
