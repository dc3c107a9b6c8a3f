#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Distils a classifier and keeps the ONNX file that is fastest among those that lose little: every kind is written and measured.

    accelerate launch examples/choose_a_file.py --num_student_layers 3 --max_drop 0.01 --output_dir out/choose \
        --teacher_model_name_or_path textattack/bert-base-uncased-rotten-tomatoes \
        --dataset cornell-movie-review-data/rotten_tomatoes

    python examples/choose_a_file.py --tiny --learning_rate 1e-3 --output_dir out/choose
    accelerate launch examples/choose_a_file.py --preset gpu
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from example_utils import CLASSIFIER, ClassifierArguments, load_classifier, parse, tokenize

from hfkdq import DistillationTrainer, LogitKD, TaskLoss, export_onnx, make_student
from hfkdq.metrics import classification_metrics

GPU = {**CLASSIFIER, "output_dir": "out/choose"}


@dataclass
class Arguments(ClassifierArguments):
    max_drop: float = field(default=0.01, metadata={"help": "Accuracy that a file may lose against PyTorch."})


def main(argv: list[str] | None = None) -> None:
    args, training_args = parse(Arguments, argv, GPU)
    raw, tokenizer, teacher = load_classifier(args, args.teacher_model_name_or_path)
    data = tokenize(raw, tokenizer, args.max_seq_length)
    student = make_student(teacher, num_layers=args.num_student_layers)
    trainer = DistillationTrainer(
        student, teacher_model=teacher, objectives=[TaskLoss(weight=0.5), LogitKD(temperature=2.0)],
        args=training_args, train_dataset=data["train"], eval_dataset=data["test"], processing_class=tokenizer,
        compute_metrics=classification_metrics,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    if not trainer.is_world_process_zero():
        return
    # Ranges come from training rows, the choice from rows that were not trained on.
    folder = export_onnx(
        student, Path(training_args.output_dir, "onnx"), quantization="auto", processing_class=tokenizer,
        calibration=data["train"].select(range(min(256, len(data["train"])))), eval_dataset=data["test"],
        compute_metrics=classification_metrics, metric="accuracy", max_drop=args.max_drop,
    )  # fmt: skip
    report = json.loads((folder / "export_facts.json").read_text())
    print(f"{'kind':<14}{'MB':>8}{'accuracy lost':>16}{'ms a call':>12}")
    for row in report["choice"]["candidates"]:
        size = None if row["bytes"] is None else row["bytes"] / 1e6
        cells = ["-" if number is None else f"{number:.3f}" for number in (size, row["drop"], row["median_ms"])]
        print(f"{row['name']:<14}{cells[0]:>8}{cells[1]:>16}{cells[2]:>12}  {'' if row['accepted'] else row['error']}")
    print(report["choice"]["reason"])
    print(f"{trainer.state.global_step} steps. Exported to {folder}.")


if __name__ == "__main__":
    main()
