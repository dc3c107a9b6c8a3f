#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Distil a text classifier on more text than there is: copies with words left out or replaced, which the teacher labels.

    accelerate launch examples/text_augmentation.py --copies 8 --how masked_lm --num_student_layers 3 --output_dir out/more \
        --masked_lm_name_or_path google-bert/bert-base-uncased --teacher_model_name_or_path path/to/a/finetuned/bert \
        --dataset cornell-movie-review-data/rotten_tomatoes

    python examples/text_augmentation.py --tiny --how words --learning_rate 1e-3 --output_dir out/more
    accelerate launch examples/text_augmentation.py --preset gpu

`--how words` leaves words out; `--how masked_lm` puts in their place what a masked language model with the same tokenizer expects
there, as TinyBERT does (Jiao et al., 2020). A copy may mean something else, so it has no label of its own: -100.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from datasets import concatenate_datasets
from example_utils import REVIEWS, ClassifierArguments, load_classifier, parse, to_file, tokenize, train_and_save
from transformers import AutoModelForMaskedLM, DataCollatorWithPadding

from hfkdq import DistillationTrainer, LogitKD, QATCallback, QuantizationSpec, TaskLoss, make_student
from hfkdq.metrics import metrics_for

# 20 copies with two fifths of the words replaced, batch and learning rate: TinyBERT (Jiao et al., 2020).
GPU = {
    **REVIEWS, "how": "masked_lm", "masked_lm_name_or_path": "google-bert/bert-base-uncased", "copies": 20, "share": 0.4,
    "num_student_layers": 6, "num_train_epochs": 3, "learning_rate": 3e-5, "warmup_steps": 500, "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 128, "output_dir": "out/more",
}  # fmt: skip


@dataclass
class Arguments(ClassifierArguments):
    how: Literal["words", "masked_lm"] = field(default="words", metadata={"help": "What becomes of chosen words."})
    masked_lm_name_or_path: str | None = field(default=None, metadata={"help": "What expects words, for masked_lm."})
    copies: int = field(default=4, metadata={"help": "How many copies of every text."})
    share: float = field(default=0.15, metadata={"help": "Share of the tokens that are left out or replaced."})


def main(argv: list[str] | None = None) -> None:
    args, training_args = parse(Arguments, argv, GPU)
    raw, tokenizer, teacher = load_classifier(args, args.teacher_model_name_or_path)
    data = tokenize(raw, tokenizer, args.max_seq_length).rename_column("label", "labels")
    pad = DataCollatorWithPadding(tokenizer)
    model = None
    if args.how == "masked_lm":
        if args.tiny:
            from made_up import masked_language_model

            model = masked_language_model(tokenizer)
        else:
            model = AutoModelForMaskedLM.from_pretrained(args.masked_lm_name_or_path).eval().to(training_args.device)
    special = torch.tensor(tokenizer.all_special_ids)

    @torch.no_grad()
    def changed(rows: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        generator = torch.Generator().manual_seed(training_args.seed + numbers[0])
        ids = pad({"input_ids": rows["input_ids"]})["input_ids"]
        chosen = (torch.rand(ids.shape, generator=generator) < args.share) & ~torch.isin(ids, special)
        if model is not None:
            seen = ids.masked_fill(chosen, tokenizer.mask_token_id).to(model.device)
            logits = model(seen, attention_mask=seen.ne(tokenizer.pad_token_id)).logits[chosen].float().cpu()
            best = logits.topk(min(15, logits.shape[-1]))
            drawn = torch.multinomial(best.values.softmax(-1), 1, generator=generator)
            ids[chosen] = best.indices.gather(-1, drawn)[:, 0]
        gone = ids.eq(tokenizer.pad_token_id) | (chosen if model is None else False)
        left = [row[~out].tolist() for row, out in zip(ids, gone, strict=True)]
        return {
            "input_ids": left, "attention_mask": [[1] * len(row) for row in left], "labels": [-100] * len(left)
        }  # fmt: skip

    original = data["train"].select_columns(["input_ids", "attention_mask", "labels"])
    batches = dict(batched=True, batch_size=32, with_indices=True, features=original.features, desc="Copies")
    many = concatenate_datasets([original] * args.copies)
    with training_args.main_process_first():
        copies = many.cast_column("labels", original.features["labels"]).map(changed, **batches)
    print(f"{len(original)} texts and {len(copies)} copies of them.")
    student = make_student(teacher, num_layers=args.num_student_layers)
    trainer = DistillationTrainer(
        student, training_args, train_dataset=concatenate_datasets([original, copies]), eval_dataset=data["test"],
        processing_class=tokenizer, data_collator=pad, compute_metrics=metrics_for(student, tokenizer),
        teacher_model=teacher, callbacks=[QATCallback(QuantizationSpec())],
        objectives=[TaskLoss(weight=0.5), LogitKD(temperature=2.0)],
    )  # fmt: skip
    if train_and_save(trainer) is not None:
        to_file(trainer, teacher, data["test"], timed=not args.tiny)


if __name__ == "__main__":
    main()
