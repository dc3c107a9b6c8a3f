#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Distil first, then quantize below 8 bits: after training, and while training with the float student as a second teacher.

    accelerate launch examples/low_bits.py --weight_bits 2 --num_student_layers 3 --output_dir out/low-bits \
        --teacher_model_name_or_path textattack/bert-base-uncased-rotten-tomatoes \
        --dataset cornell-movie-review-data/rotten_tomatoes

    python examples/low_bits.py --tiny --weight_bits 2 --learning_rate 1e-3 --output_dir out/low-bits
    accelerate launch examples/low_bits.py --preset gpu
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

from example_utils import CLASSIFIER, ClassifierArguments, load_classifier, parse, tokenize
from transformers import (
    Trainer,
)

from hfkdq import (
    DistillationTrainer,
    HiddenStateKD,
    LogitKD,
    QATCallback,
    QuantizationSpec,
    TaskLoss,
    load_quantized,
    make_student,
    quantize,
)
from hfkdq.metrics import classification_metrics

GPU = {**CLASSIFIER, "output_dir": "out/low-bits"}


@dataclass
class Arguments(ClassifierArguments):
    weight_bits: int = field(default=4, metadata={"help": "8, 6, 4, 3, 2 (ternary) or 1."})
    activation_bits: int = field(default=8, metadata={"help": "16, 8 or 4; 0 leaves activations in floating point."})
    group_size: int | None = field(default=None, metadata={"help": "32, 64 or 128 weights that share a scale."})


def main(argv: list[str] | None = None) -> None:
    args, training_args = parse(Arguments, argv, GPU)
    spec = QuantizationSpec(
        weight_bits=args.weight_bits, activation_bits=args.activation_bits or None, group_size=args.group_size
    )
    raw, tokenizer, teacher = load_classifier(args, args.teacher_model_name_or_path)
    data = tokenize(raw, tokenizer, args.max_seq_length)
    common = dict(
        args=training_args, train_dataset=data["train"], eval_dataset=data["test"], processing_class=tokenizer,
        compute_metrics=classification_metrics,
    )  # fmt: skip

    student = make_student(teacher, num_layers=args.num_student_layers)
    trainer = DistillationTrainer(
        student, teacher_model=teacher, objectives=[TaskLoss(weight=0.5), LogitKD(temperature=2.0), HiddenStateKD()],
        **common,
    )  # fmt: skip
    trainer.train()
    accuracy = {"float": trainer.evaluate()["eval_accuracy"]}

    rows = data["train"].select(range(min(256, len(data["train"]))))
    after = quantize(copy.deepcopy(student).cpu(), spec, rows, processing_class=tokenizer, bias_correction=True)
    accuracy["quantized after training"] = Trainer(after, **common).evaluate()["eval_accuracy"]

    # The float student knows what its quantized self should compute, layer by layer; its teacher knows the task.
    trainer = DistillationTrainer(
        copy.deepcopy(student), teacher_model={"teacher": teacher, "float": student.eval()},
        objectives=[
            TaskLoss(weight=0.5),
            LogitKD(temperature=2.0, teacher="teacher"),
            HiddenStateKD(layers="uniform", teacher="float"),
        ],
        callbacks=[QATCallback(spec, freeze_ranges=0.8)], **common,
    )  # fmt: skip
    trainer.train()
    accuracy["quantized while training"] = trainer.evaluate()["eval_accuracy"]
    trainer.save_model()
    trainer.save_state()
    if not trainer.is_world_process_zero():
        return
    for name, value in accuracy.items():
        print(f"{name:26}{value:.3f}")
    loaded = load_quantized(training_args.output_dir)
    print(f"{trainer.state.global_step} steps of each. Saved in {training_args.output_dir}: {type(loaded).__name__}, "
          f"weights of {spec.weight_bits} bits.")  # fmt: skip


if __name__ == "__main__":
    main()
