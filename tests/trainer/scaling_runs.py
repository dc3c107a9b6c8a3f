# SPDX-License-Identifier: Apache-2.0
"""Short trainings of every kind of loss on rows of uneven length; run by `accelerate launch` it does them all."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from safetensors.torch import save_file
from transformers import DataCollatorForTokenClassification, TrainingArguments

from hfkdq.trainer import DistillationTrainer
from tests import tiny
from tests.trainer.common import ALL_TERMS, losses, teacher_of

KINDS = ("classes", "tokens", "next tokens")
RUNS = [(kind, terms) for kind in KINDS for terms in ALL_TERMS]


def arguments_for(folder: str, size: int, steps: int, **kwargs) -> TrainingArguments:
    return TrainingArguments(
        folder, use_cpu=True, report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True, seed=0,
        optim="sgd", learning_rate=0.05, per_device_train_batch_size=size, gradient_accumulation_steps=steps, **kwargs,
    )  # fmt: skip


def train(kind: str, terms: str, arguments: TrainingArguments, rows: int = 64) -> DistillationTrainer:
    settings = dict(train_dataset=tiny.text_dataset(rows), processing_class=tiny.tokenizer())
    if kind == "classes":
        student, teacher = tiny.bert(0), teacher_of()
    else:
        settings.update(
            train_dataset=tiny.token_dataset(rows), data_collator=DataCollatorForTokenClassification(tiny.tokenizer())
        )
        if kind == "tokens":
            student, teacher = tiny.bert_tokens(0), tiny.bert_tokens(1, layers=4, hidden=48)
        else:
            student, teacher = tiny.llama(0), tiny.llama(1, layers=4, hidden=48)
    trainer = DistillationTrainer(
        student, arguments, teacher_model=teacher, objectives=ALL_TERMS[terms], **settings
    )  # fmt: skip
    trainer.train()
    return trainer


def result(trainer: DistillationTrainer):
    """Loss, gradient norm and terms of every step, and the final weights with the projections."""
    state = {key: value.detach().clone() for key, value in trainer.model.state_dict().items()}
    if trainer._projections is not None:
        state.update({f"projection.{k}": v.clone() for k, v in trainer._projections.maps.state_dict().items()})
    names = [name for name in trainer.state.log_history[0] if "loss" in name or "norm" in name or name.endswith("_kd")]
    return losses(trainer, *names), state


def main(folder: str) -> None:
    for number, (kind, terms) in enumerate(RUNS):
        arguments = arguments_for(folder, 16, 1, num_train_epochs=1)
        logs, state = result(train(kind, terms, arguments))
        file = Path(folder, f"{number}-rank{arguments.process_index}")
        file.parent.mkdir(exist_ok=True)
        save_file({key: value.contiguous() for key, value in state.items()}, f"{file}.safetensors")
        Path(f"{file}.json").write_text(json.dumps(logs))


if __name__ == "__main__":
    main(sys.argv[1])
