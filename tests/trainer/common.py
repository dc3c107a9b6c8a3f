# SPDX-License-Identifier: Apache-2.0
"""Trainers of tiny models, and what the tests of the trainer compare of two of them."""

from __future__ import annotations

import torch
from transformers import Trainer, TrainerCallback

from hfkdq.objectives import AttentionKD, HiddenStateKD, LogitKD, TaskLoss
from hfkdq.trainer import DistillationTrainer
from tests import tiny

ALL_TERMS = {
    "task": [TaskLoss()],
    "logits": [LogitKD()],
    "hidden": [HiddenStateKD()],
    "attention": [AttentionKD()],
    "sum": [TaskLoss(weight=0.5), LogitKD(temperature=3.0), HiddenStateKD(), AttentionKD(weight=0.1)],
}


def teacher_of(kind="bert", **kwargs):
    return getattr(tiny, kind)(1, layers=4, **({"hidden": 48} if kind == "bert" else {}), **kwargs)


def make_trainer(arguments, objectives=None, student=None, teacher="default", cls=DistillationTrainer, **kwargs):
    teacher = teacher_of() if teacher == "default" else teacher
    settings = dict(
        train_dataset=tiny.text_dataset(),
        eval_dataset=tiny.text_dataset(10, seed=9),
        processing_class=tiny.tokenizer(),
    )
    if cls is not Trainer:
        kwargs.update(teacher_model=teacher, objectives=objectives)
    return cls(student or tiny.bert(0), arguments, **{**settings, **kwargs})


def losses(trainer, *keys):
    return [[row.get(key) for key in keys] for row in trainer.state.log_history if "loss" in row]


def weights(model):
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def assert_equal_weights(one, other, **tolerance):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    for key in one:
        torch.testing.assert_close(
            one[key], other[key], **(tolerance or dict(rtol=0, atol=0)), msg=lambda m, k=key: f"{k}: {m}"
        )


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step
