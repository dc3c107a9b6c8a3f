#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Prune, distil and train for integers in several processes that share one model (FSDP2), and measure the int8 file in one.

    accelerate launch --config_file examples/accelerate_configs/fsdp2.yaml examples/sharded.py --neuron_sparsity 0.5 \
        --teacher_model_name_or_path path/to/a/finetuned/bert --dataset cornell-movie-review-data/rotten_tomatoes --output_dir out/sharded

    python examples/sharded.py --tiny --learning_rate 5e-3 --output_dir out/sharded
    accelerate launch --config_file examples/accelerate_configs/fsdp2.yaml examples/sharded.py --preset gpu

Neurons cannot leave a model that is spread over processes, so they leave before: each process takes the same ones out of a whole student.
Training then shards student and teacher alike, with fake quantizers in the shards. Once the whole checkpoint is saved, the first process
leaves the group, and exports and measures alone.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

from example_utils import CLASSIFIER, ClassifierArguments, load_classifier, parse, to_file, tokenize, train_and_save
from transformers import DataCollatorWithPadding

from hfkdq import (
    DistillationTrainer,
    LogitKD,
    PruningSpec,
    QATCallback,
    QuantizationSpec,
    TaskLoss,
    load_quantized,
    make_student,
    prune,
)
from hfkdq.metrics import classification_metrics

GPU = {**CLASSIFIER, "output_dir": "out/sharded"}


@dataclass
class Arguments(ClassifierArguments):
    neuron_sparsity: float = field(default=0.5, metadata={"help": "Share of the neurons that are removed."})


def main(argv: list[str] | None = None) -> None:
    args, training_args = parse(Arguments, argv, GPU)
    raw, tokenizer, teacher = load_classifier(args, args.teacher_model_name_or_path)
    data = tokenize(raw, tokenizer, args.max_seq_length).rename_column("label", "labels")
    student = make_student(teacher, num_layers=args.num_student_layers)
    if args.neuron_sparsity:
        prune(student, PruningSpec(structure="neuron", sparsity=args.neuron_sparsity, criterion="magnitude"))
    trainer = DistillationTrainer(
        student, training_args, train_dataset=data["train"], eval_dataset=data["test"], processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer), compute_metrics=classification_metrics,
        teacher_model=copy.deepcopy(teacher),  # which is sharded too
        objectives=[TaskLoss(weight=0.5), LogitKD(temperature=2.0)], callbacks=[QATCallback(QuantizationSpec())],
    )  # fmt: skip
    if train_and_save(trainer) is not None:
        whole = load_quantized(training_args.output_dir)
        to_file(trainer, teacher, data["test"], timed=not args.tiny, student=whole)


if __name__ == "__main__":
    main()
