#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Make the file of a text classifier small: no tokens that its texts never use, zeros, and few different weights.

    accelerate launch examples/small_files.py --num_student_layers 6 --output_dir out/small \
        --teacher_model_name_or_path textattack/bert-base-uncased-rotten-tomatoes \
        --dataset cornell-movie-review-data/rotten_tomatoes

    python examples/small_files.py --tiny --num_student_layers 1 --learning_rate 1e-3 --output_dir out/small
    accelerate launch examples/small_files.py --preset gpu
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from example_utils import CLASSIFIER, ClassifierArguments, load_classifier, parse, tokenize

from hfkdq import (
    DistillationTrainer,
    LogitKD,
    PruningCallback,
    PruningSpec,
    TaskLoss,
    cluster_weights,
    compressed_size,
    make_student,
    prune_vocabulary,
)
from hfkdq.metrics import classification_metrics

GPU = {**CLASSIFIER, "output_dir": "out/small"}


@dataclass
class Arguments(ClassifierArguments):
    min_count: int = field(default=1, metadata={"help": "Tokens that the texts use less often go."})
    sparsity: float = field(default=0.5, metadata={"help": "Share of the weights of the layers that become zero."})
    clusters: int = field(default=32, metadata={"help": "Different values that the weights of a layer may take."})
    method: str = field(default="xz", metadata={"help": "How files are compressed: xz, gzip, bz2 or zip."})


def main(argv: list[str] | None = None) -> None:
    args, training_args = parse(Arguments, argv, GPU)
    raw, tokenizer, teacher = load_classifier(args, args.teacher_model_name_or_path, unused_words=200)
    out = Path(training_args.output_dir)
    teacher.save_pretrained(out / "teacher")
    # Teacher and student read the same ids, so the vocabulary goes from the teacher, before the student is made of it.
    prune_vocabulary(teacher, tokenizer, raw["train"], column="text", min_count=args.min_count)
    data = tokenize(raw, tokenizer, args.max_seq_length)

    student = make_student(teacher, num_layers=args.num_student_layers)
    trainer = DistillationTrainer(
        student, training_args, teacher_model=teacher, objectives=[TaskLoss(weight=0.5), LogitKD(temperature=2.0)],
        callbacks=[PruningCallback(PruningSpec(sparsity=args.sparsity, structure="weight"))],
        train_dataset=data["train"], eval_dataset=data["test"], processing_class=tokenizer,
        compute_metrics=classification_metrics,
    )  # fmt: skip
    trainer.train()
    trained = trainer.evaluate()["eval_accuracy"]
    cluster_weights(student, args.clusters)  # the last step: training would undo it
    clustered = trainer.evaluate()["eval_accuracy"]
    trainer.save_model()
    trainer.save_state()
    if not trainer.is_world_process_zero():
        return
    fact = teacher.config.hfkdq["vocabulary"]
    print(f"{fact['tokens_after']:,} of {fact['tokens_before']:,} tokens are left.")
    print(f"Accuracy {trained:.3f}, and {clustered:.3f} with {args.clusters} values for the weights of a layer.")
    for name, folder in (("teacher", out / "teacher"), ("student", out)):
        size = compressed_size(folder, args.method)
        print(f"{name:10}{size.bytes_before:>14,} bytes, {size.bytes:>14,} after {size.method}")
    print(f"{trainer.state.global_step} steps. Model and tokenizer are saved in {training_args.output_dir}.")


if __name__ == "__main__":
    main()
