#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Compress a model that finds names in texts to an int8 file, and measure the F1 of whole entities of the file.

    accelerate launch examples/token_classification.py --num_student_layers 3 --output_dir out/ner \
        --teacher_model_name_or_path path/to/a/finetuned/model --dataset path/to/folder

    python examples/token_classification.py --tiny --learning_rate 1e-3 --output_dir out/ner
    accelerate launch examples/token_classification.py --preset gpu

The data are lists of words in a column `tokens`, with a tag for each in `ner_tags`, as in WNUT 17 and CoNLL 2003.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from example_utils import load_splits, parse, to_file, train_and_save
from transformers import AutoModelForTokenClassification, AutoTokenizer, DataCollatorForTokenClassification

from hfkdq import (
    DistillationTrainer,
    HiddenStateKD,
    LogitKD,
    QATCallback,
    QuantizationSpec,
    TaskLoss,
    make_student,
)
from hfkdq.metrics import metrics_for

GPU = {
    "teacher_model_name_or_path": "elastic/distilbert-base-cased-finetuned-conll03-english", "dataset": "lhoestq/conll2003",
    "num_student_layers": 3, "num_train_epochs": 5, "learning_rate": 5e-5, "warmup_steps": 200,
    "per_device_train_batch_size": 32, "per_device_eval_batch_size": 128, "output_dir": "out/ner",
}  # fmt: skip


@dataclass
class Arguments:
    teacher_model_name_or_path: str | None = field(default=None, metadata={"help": "Hub id or folder of a tagger."})
    dataset: str | None = field(
        default=None,
        metadata={"help": "Hub id, or a folder of train.parquet and test.parquet, with tokens and ner_tags."},
    )
    num_student_layers: int = field(default=1, metadata={"help": "Layers of the student, copied from the teacher."})
    max_seq_length: int = field(default=128, metadata={"help": "Tokens beyond this are cut off."})
    tiny: bool = field(default=False, metadata={"help": "Made-up sentences and model, to try the script in seconds."})


def main(argv: list[str] | None = None) -> None:
    args, training_args = parse(Arguments, argv, GPU)
    if args.tiny:
        from made_up import fit, named_entities

        raw, tokenizer, teacher = named_entities()
    else:
        raw = load_splits(args.dataset)
        names = raw["train"].features["ner_tags"].feature.names
        ids = {name: number for number, name in enumerate(names)}
        tokenizer = AutoTokenizer.from_pretrained(args.teacher_model_name_or_path)
        teacher = AutoModelForTokenClassification.from_pretrained(
            args.teacher_model_name_or_path, id2label=dict(enumerate(names)), label2id=ids
        )

    def encode(rows: Any) -> Any:
        """The first token of a word has its tag, the others -100."""
        batch = tokenizer(rows["tokens"], is_split_into_words=True, truncation=True, max_length=args.max_seq_length)
        batch["labels"] = []
        for row, tags in enumerate(rows["ner_tags"]):
            words = batch.word_ids(row)
            first = [word is not None and word != before for word, before in zip(words, [None, *words], strict=False)]
            batch["labels"].append([tags[word] if new else -100 for word, new in zip(words, first, strict=True)])
        return batch

    data = raw.map(encode, batched=True, remove_columns=raw["train"].column_names)
    collator = DataCollatorForTokenClassification(tokenizer)
    if args.tiny:
        fit(teacher, data["train"], collator)
    student = make_student(teacher, num_layers=args.num_student_layers)
    metrics = metrics_for(student, tokenizer)
    last = {args.num_student_layers - 1: teacher.config.num_hidden_layers - 1}
    trainer = DistillationTrainer(
        student, training_args, train_dataset=data["train"], eval_dataset=data["test"], processing_class=tokenizer,
        data_collator=collator, compute_metrics=metrics, teacher_model=teacher, callbacks=[QATCallback(QuantizationSpec())],
        objectives=[TaskLoss(weight=0.5), LogitKD(temperature=2.0), HiddenStateKD(layers=last)],
    )  # fmt: skip
    if train_and_save(trainer) is not None:
        to_file(trainer, teacher, data["test"], timed=not args.tiny)


if __name__ == "__main__":
    main()
