# SPDX-License-Identifier: Apache-2.0
"""Short trainings of every kind of loss on rows of uneven length; run by `accelerate launch` it does them all."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from safetensors.torch import save_file
from transformers import DataCollatorForTokenClassification, TrainingArguments

from hfkdq.objectives import (
    AdversarialKD,
    ByAgreement,
    EnsembleKD,
    HiddenStateKD,
    LogitKD,
    TaskLoss,
)
from hfkdq.schedules import BottomUp
from hfkdq.teachers import CoTrainedTeacher, EMATeacher
from hfkdq.trainer import DistillationTrainer
from tests import tiny
from tests.trainer.common import ALL_TERMS, losses, teacher_of

KINDS = ("classes", "tokens", "next tokens")
RUNS = [(kind, terms) for kind in KINDS for terms in ALL_TERMS]


def peer(kind: str, seed: int):
    make = {"classes": tiny.bert, "tokens": tiny.bert_tokens, "next tokens": tiny.llama}[kind]
    return make(seed, layers=3, hidden=48)


# By name: what the trainer is given, made anew for a kind of task.
OTHERS = {
    "two teachers": lambda kind: dict(
        teacher_model={"large": peer(kind, 1), "other": peer(kind, 2)},
        objectives=[
            TaskLoss(),
            LogitKD(teacher="large", weight=0.3),
            LogitKD(teacher="other", divergence="reverse_kl"),
        ],
    ),
    "ensemble": lambda kind: dict(
        teacher_model={"large": peer(kind, 1), "other": peer(kind, 2)}, objectives=[EnsembleKD()]
    ),
    "moving average": lambda kind: dict(
        teacher_model=EMATeacher(decay=0.5), objectives=[TaskLoss(), LogitKD(), HiddenStateKD()]
    ),
    "peer": lambda kind: dict(
        teacher_model=CoTrainedTeacher(peer(kind, 1), [TaskLoss(), LogitKD(), HiddenStateKD()]),
        objectives=[TaskLoss(), LogitKD(), HiddenStateKD()],
    ),
    "adversary": lambda kind: dict(objectives=[AdversarialKD(steps=2), TaskLoss(weight=0.5)]),
    "agreement": lambda kind: dict(
        teacher_model=peer(kind, 1), objectives=[TaskLoss(), LogitKD(weight=ByAgreement(low=0.5, high=2.0))]
    ),
    "per sample": lambda kind: dict(
        teacher_model=peer(kind, 1), objectives=[LogitKD(per="sample", divergence="jsd"), LogitKD(divergence="dkd")]
    ),
    "stages": lambda kind: dict(
        teacher_model=peer(kind, 1),
        objectives=[HiddenStateKD(distance="cosine", embeddings=True, active=BottomUp(cumulative=False)), LogitKD()],
    ),
}
PROCESSES = [(kind, terms) for kind in ("classes", "next tokens") for terms in OTHERS]


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
    if terms in OTHERS:
        settings.update(OTHERS[terms](kind))
        if terms == "adversary":  # the width of the student's input embeddings
            settings["teacher_model"] = dict(zip(KINDS, (tiny.bert, tiny.bert_tokens, tiny.llama), strict=True))[kind](
                1
            )
    else:
        settings.update(teacher_model=teacher, objectives=ALL_TERMS[terms])
    trainer = DistillationTrainer(student, arguments, **settings)
    trainer.train()
    return trainer


def result(trainer: DistillationTrainer):
    """Loss, gradient norm and terms of every step, and the final weights with the projections."""
    state = {key: value.detach().clone() for key, value in trainer.model.state_dict().items()}
    if trainer._distillation.projections is not None:
        state.update(
            {f"projection.{k}": v.clone() for k, v in trainer._distillation.projections.maps.state_dict().items()}
        )
    for name, teacher in trainer._distillation.teachers.items():
        state.update({f"{name}.{key}": value.detach().clone() for key, value in teacher.state().items()})
    names = [name for name in trainer.state.log_history[0] if "loss" in name or "norm" in name or name.endswith("_kd")]
    return losses(trainer, *names), state


def main(folder: str) -> None:
    for number, (kind, terms) in enumerate([*RUNS, *PROCESSES]):
        arguments = arguments_for(folder, 16, 1, num_train_epochs=1)
        logs, state = result(train(kind, terms, arguments))
        file = Path(folder, f"{number}-rank{arguments.process_index}")
        file.parent.mkdir(exist_ok=True)
        save_file({key: value.contiguous() for key, value in state.items()}, f"{file}.safetensors")
        Path(f"{file}.json").write_text(json.dumps(logs))


if __name__ == "__main__":
    main(sys.argv[1])
