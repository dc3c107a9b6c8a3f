#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Make the file of a text classifier small: no tokens that its texts never use, zeros, and few different weights.

    accelerate launch examples/small_files.py --num_student_layers 6 --output_dir out/small \
        --teacher_model_name_or_path textattack/bert-base-uncased-rotten-tomatoes \
        --dataset cornell-movie-review-data/rotten_tomatoes

    python examples/small_files.py --tiny --num_student_layers 1 --learning_rate 1e-3 --output_dir out/small
"""

from __future__ import annotations

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


@dataclass
class Arguments:
    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or folder of a classifier."}
    )
    dataset: str | None = field(
        default=None, metadata={"help": "Hub id, or a folder of train.parquet and test.parquet, with text and label."}
    )
    num_student_layers: int = field(default=1, metadata={"help": "Layers of the student, copied from the teacher."})
    min_count: int = field(default=1, metadata={"help": "Tokens that the texts use less often go."})
    sparsity: float = field(default=0.5, metadata={"help": "Share of the weights of the layers that become zero."})
    clusters: int = field(default=32, metadata={"help": "Different values that the weights of a layer may take."})
    method: str = field(default="xz", metadata={"help": "How files are compressed: xz, gzip, bz2 or zip."})
    max_seq_length: int = field(default=64, metadata={"help": "Tokens beyond this are cut off."})
    tiny: bool = field(default=False, metadata={"help": "Made-up sentences and model, to try the script in seconds."})


def main(argv: list[str] | None = None) -> None:
    parser = HfArgumentParser((Arguments, TrainingArguments))
    parser.set_defaults(logging_steps=5, save_strategy="no", report_to="none")
    args, training_args = parser.parse_args_into_dataclasses(argv)
    set_seed(training_args.seed)
    if args.tiny:
        from made_up import text_classification

        raw, tokenizer, (teacher,) = text_classification(unused_words=200)
    else:
        if args.dataset is None or args.teacher_model_name_or_path is None:
            parser.error("Give --dataset and --teacher_model_name_or_path, or --tiny.")
        raw = load_dataset(args.dataset)
        tokenizer = AutoTokenizer.from_pretrained(args.teacher_model_name_or_path)
        teacher = AutoModelForSequenceClassification.from_pretrained(
            args.teacher_model_name_or_path, num_labels=raw["train"].features["label"].num_classes
        )
    out = Path(training_args.output_dir)
    teacher.save_pretrained(out / "teacher")
    # Teacher and student read the same ids, so the vocabulary goes from the teacher, before the student is made of it.
    prune_vocabulary(teacher, tokenizer, raw["train"], column="text", min_count=args.min_count)
    data = raw.map(
        lambda rows: tokenizer(rows["text"], truncation=True, max_length=args.max_seq_length),
        batched=True, remove_columns=["text"],
    )  # fmt: skip

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
