#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Distil a language model: on given answers, on answers that the student writes, or from another vocabulary; to a file of 8-bit weights.

    accelerate launch examples/language_model.py --objective on_policy --output_dir out/on-policy --bf16 \
        --teacher_model_name_or_path Qwen/Qwen2.5-1.5B-Instruct --student_model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
        --dataset databricks/databricks-dolly-15k

    python examples/language_model.py --objective other_vocabulary --tiny --learning_rate 1e-3 --output_dir out/uld
    accelerate launch examples/language_model.py --preset gpu

A column `text` in the place of `instruction` and `response` is learned whole. Where there is a split `test`, accuracy and perplexity are
measured on it: of the teacher, the student and the file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from datasets import load_dataset
from example_utils import parse, steps_and_terms, to_file, train_and_save
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
)

from hfkdq import ULD, DistillationTrainer, LogitKD, OnPolicyKD, TaskLoss, make_student
from hfkdq.collators import TeacherCollator
from hfkdq.schedules import Linear

# A teacher that corrects what the student writes: GKD (Agarwal et al., 2024).
GPU = {
    "objective": "on_policy", "teacher_model_name_or_path": "Qwen/Qwen2.5-1.5B-Instruct",
    "student_model_name_or_path": "Qwen/Qwen2.5-0.5B-Instruct", "dataset": "databricks/databricks-dolly-15k",
    "max_new_tokens": 128, "num_train_epochs": 3, "learning_rate": 1e-5, "lr_scheduler_type": "cosine", "warmup_steps": 50,
    "per_device_train_batch_size": 8, "gradient_accumulation_steps": 4, "output_dir": "out/on-policy",
}  # fmt: skip


@dataclass
class Arguments:
    objective: Literal["logits", "on_policy", "other_vocabulary"] = field(
        default="logits", metadata={"help": "What is learned; other_vocabulary is for a teacher of another tokenizer."}
    )
    teacher_model_name_or_path: str | None = field(default=None, metadata={"help": "Hub id or folder of the teacher."})
    student_model_name_or_path: str | None = field(
        default=None, metadata={"help": "The same of the student; by default half of the teacher's layers."}
    )
    dataset: str | None = field(
        default=None,
        metadata={"help": "Hub id, or a folder of parquet files, with instruction and response, or text."},
    )
    max_seq_length: int = field(default=512, metadata={"help": "Tokens beyond this are cut off."})
    max_new_tokens: int = field(default=64, metadata={"help": "Length of the answers that the student writes."})
    tiny: bool = field(default=False, metadata={"help": "Made-up instructions and models, to try it in seconds."})


def encode(row: Any, tokenizer: Any, max_length: int = 64) -> dict[str, list[int]]:
    """Instruction and response as tokens, of which the response alone has labels; or a text, all of which has."""
    if "text" in row:
        ids = tokenizer(row["text"].strip(), truncation=True, max_length=max_length).input_ids
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids}
    prompt = tokenizer(row["instruction"] + "\n").input_ids
    answer = [*tokenizer(row["response"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    ids, labels = prompt + answer, [-100] * len(prompt) + answer
    return {
        "input_ids": ids[:max_length],
        "attention_mask": [1] * len(ids[:max_length]),
        "labels": labels[:max_length],
    }


def main(argv: list[str] | None = None) -> None:
    args, training_args = parse(Arguments, argv, GPU)
    foreign = args.objective == "other_vocabulary"
    if args.tiny:
        from made_up import language_model

        raw, tokenizer, teacher_tokenizer, student, teacher = language_model(encode, letters=foreign)
    else:
        raw = load_dataset(args.dataset)
        teacher_tokenizer = AutoTokenizer.from_pretrained(args.teacher_model_name_or_path)
        tokenizer = AutoTokenizer.from_pretrained(args.student_model_name_or_path or args.teacher_model_name_or_path)
        for one in (tokenizer, teacher_tokenizer):
            one.pad_token = one.pad_token or one.eos_token
        # Weights in float32 on both lines of Transformers: half as many bits lose small steps.
        teacher = AutoModelForCausalLM.from_pretrained(args.teacher_model_name_or_path, dtype=torch.float32)
        if args.student_model_name_or_path:
            student = AutoModelForCausalLM.from_pretrained(args.student_model_name_or_path, dtype=torch.float32)
        else:
            student = make_student(teacher, num_layers=teacher.config.num_hidden_layers // 2)

    def columns(row: Any) -> dict[str, list[int]]:
        own = encode(row, tokenizer, args.max_seq_length)
        if not foreign:
            return own
        theirs = encode(row, teacher_tokenizer, args.max_seq_length)
        return own | {f"teacher_{name}": ids for name, ids in theirs.items()}

    data = raw.map(columns, remove_columns=raw["train"].column_names)
    # A prompt that fills the length leaves no answer to learn.
    data = data.filter(lambda row: any(label != -100 for label in row["labels"][1:]))
    collator = DataCollatorForSeq2Seq(tokenizer)
    objectives = {
        "logits": [TaskLoss(weight=0.5), LogitKD(divergence="reverse_kl", temperature=1.0)],
        # At first the answers of the data set; the better the student becomes, the more of its own.
        "on_policy": [TaskLoss(weight=0.1), OnPolicyKD(fraction=Linear(0, 1), max_new_tokens=args.max_new_tokens)],
        "other_vocabulary": [TaskLoss(), ULD(weight=1.5)],
    }
    trainer = DistillationTrainer(
        student, training_args, train_dataset=data["train"], processing_class=tokenizer, teacher_model=teacher,
        data_collator=TeacherCollator(collator, DataCollatorForSeq2Seq(teacher_tokenizer)) if foreign else collator,
        objectives=objectives[args.objective],
    )  # fmt: skip
    if train_and_save(trainer, evaluated=False) is None:
        return
    if "instruction" in raw["train"].column_names:
        prompt = tokenizer(raw["train"][0]["instruction"] + "\n", return_tensors="pt").to(student.device)
        answer = student.eval().generate(**prompt, do_sample=False, max_new_tokens=16)[
            0, prompt["input_ids"].shape[1] :
        ]
        said = tokenizer.decode(answer, skip_special_tokens=True)
        print(f"{raw['train'][0]['instruction']!r} is answered by {said!r}.")
    if "test" in data:
        to_file(trainer, teacher, data["test"], timed=not args.tiny, quantization="int8_weights")
    else:
        print(f"{steps_and_terms(trainer)}. Saved in {training_args.output_dir}.")


if __name__ == "__main__":
    main()
