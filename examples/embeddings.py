#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Compress a model of sentence embeddings to an int8 file without any labels, and measure how alike the two spaces are.

    accelerate launch examples/embeddings.py --num_student_layers 3 --output_dir out/embeddings \
        --teacher_model_name_or_path sentence-transformers/all-MiniLM-L6-v2 --dataset path/to/folder

    python examples/embeddings.py --tiny --learning_rate 1e-3 --output_dir out/embeddings
    accelerate launch examples/embeddings.py --preset gpu

Any texts will do, in a column `text`. The student learns the states of the teacher's last layer and the similarities of the texts of a
batch; the report has the correlation of all similarities, and how often the nearest neighbour is the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from example_utils import NEWS, load_splits, parse, to_file, tokenize, train_and_save
from transformers import AutoModel, AutoTokenizer, DataCollatorWithPadding

from hfkdq import (
    DistillationTrainer,
    HiddenStateKD,
    QATCallback,
    QuantizationSpec,
    SimilarityPreservingKD,
    make_student,
)

# Learning rate, warmup and batch of model_distillation.py of Sentence Transformers.
GPU = {
    **NEWS, "teacher_model_name_or_path": "sentence-transformers/all-MiniLM-L6-v2", "num_student_layers": 3,
    "learning_rate": 1e-4, "warmup_steps": 1000, "per_device_train_batch_size": 64, "output_dir": "out/embeddings",
}  # fmt: skip


@dataclass
class Arguments:
    teacher_model_name_or_path: str | None = field(default=None, metadata={"help": "Hub id or folder of an encoder."})
    dataset: str | None = field(
        default=None, metadata={"help": "Hub id, or a folder of train.parquet and test.parquet, with a column text."}
    )
    num_student_layers: int = field(default=1, metadata={"help": "Layers of the student, copied from the teacher."})
    max_seq_length: int = field(default=64, metadata={"help": "Tokens beyond this are cut off."})
    tiny: bool = field(default=False, metadata={"help": "Made-up sentences and model, to try the script in seconds."})


def main(argv: list[str] | None = None) -> None:
    args, training_args = parse(Arguments, argv, GPU)
    if args.tiny:
        from made_up import text_classification

        raw, tokenizer, (classifier,) = text_classification()
        teacher = classifier.bert
    else:
        raw = load_splits(args.dataset)
        tokenizer = AutoTokenizer.from_pretrained(args.teacher_model_name_or_path)
        teacher = AutoModel.from_pretrained(args.teacher_model_name_or_path)
    raw = raw.select_columns("text")
    data = tokenize(raw, tokenizer, args.max_seq_length)
    last = {args.num_student_layers - 1: teacher.config.num_hidden_layers - 1}
    trainer = DistillationTrainer(
        make_student(teacher, num_layers=args.num_student_layers), training_args, train_dataset=data["train"],
        processing_class=tokenizer, data_collator=DataCollatorWithPadding(tokenizer), teacher_model=teacher,
        objectives=[HiddenStateKD(layers=last), SimilarityPreservingKD()], callbacks=[QATCallback(QuantizationSpec())],
    )  # fmt: skip
    if train_and_save(trainer, evaluated=False) is not None:
        to_file(trainer, teacher, data["test"], timed=not args.tiny)


if __name__ == "__main__":
    main()
