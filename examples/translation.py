#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Compress a translator to int8 files of encoder and decoder, and measure BLEU of what the files write.

    accelerate launch examples/translation.py --num_student_layers 3 --output_dir out/translation \
        --teacher_model_name_or_path Helsinki-NLP/opus-mt-en-de --dataset path/to/folder

    python examples/translation.py --tiny --learning_rate 2e-3 --output_dir out/translation
    accelerate launch examples/translation.py --preset gpu

The data are two columns of texts, `--source` and `--target`; those inside of a column have its name before a dot, as
`translation.en`. The tokenizer of Marian needs sentencepiece.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from example_utils import first_rows, load_splits, parse, to_file, train_and_save
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, DataCollatorForSeq2Seq

from hfkdq import DistillationTrainer, LogitKD, QATCallback, QuantizationSpec, TaskLoss, make_student

# Teacher, data, layers of the decoder, learning rate and warmup of Shleifer and Rush, 2020.
GPU = {
    "teacher_model_name_or_path": "Helsinki-NLP/opus-mt-en-ro", "dataset": "wmt/wmt16:ro-en", "source": "translation.en",
    "target": "translation.ro", "num_student_layers": 3, "max_seq_length": 128, "num_train_epochs": 3, "learning_rate": 3e-4,
    "warmup_steps": 500, "per_device_train_batch_size": 64, "per_device_eval_batch_size": 64, "output_dir": "out/translation",
}  # fmt: skip


@dataclass
class Arguments:
    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or folder of a translator."}
    )
    dataset: str | None = field(
        default=None,
        metadata={"help": "Hub id, or a folder of train.parquet and test.parquet, with two columns of texts."},
    )
    source: str = field(default="en", metadata={"help": "The column to translate."})
    target: str = field(default="de", metadata={"help": "The column with the translations."})
    num_student_layers: int = field(
        default=1, metadata={"help": "Layers of encoder and decoder of the student, copied from the teacher."}
    )
    max_seq_length: int = field(default=64, metadata={"help": "Tokens beyond this are cut off."})
    max_samples: int | None = field(default=None, metadata={"help": "Texts of each split. All by default."})
    tiny: bool = field(default=False, metadata={"help": "Made-up sentences and model, to try the script in seconds."})


def main(argv: list[str] | None = None) -> None:
    args, training_args = parse(Arguments, argv, GPU)
    if args.tiny:
        from made_up import fit, translations

        raw, tokenizer, teacher = translations()
    else:
        raw = load_splits(args.dataset).flatten()
        tokenizer = AutoTokenizer.from_pretrained(args.teacher_model_name_or_path)
        teacher = AutoModelForSeq2SeqLM.from_pretrained(args.teacher_model_name_or_path)
    raw = first_rows(raw, args.max_samples)

    def encode(rows: Any) -> Any:
        settings = dict(truncation=True, max_length=args.max_seq_length)
        return tokenizer(rows[args.source], text_target=rows[args.target], **settings)

    data = raw.map(encode, batched=True, remove_columns=raw["train"].column_names)
    collator = DataCollatorForSeq2Seq(tokenizer, teacher)
    if args.tiny:
        fit(teacher, data["train"], collator, steps=120)
    layers = args.num_student_layers
    trainer = DistillationTrainer(
        make_student(teacher, num_layers=layers, num_decoder_layers=layers), training_args, train_dataset=data["train"],
        eval_dataset=data["test"], processing_class=tokenizer, data_collator=collator, teacher_model=teacher,
        objectives=[TaskLoss(weight=0.5), LogitKD(temperature=1.0)], callbacks=[QATCallback(QuantizationSpec())],
    )  # fmt: skip
    if train_and_save(trainer) is not None:
        to_file(trainer, teacher, data["test"], timed=not args.tiny)


if __name__ == "__main__":
    main()
