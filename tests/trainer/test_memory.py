# SPDX-License-Identifier: Apache-2.0
"""What of the teacher stays in memory, and for how long."""

import gc
import weakref

import pytest
import torch
from transformers import TrainerCallback

from hfkdq.objectives import AttentionKD, HiddenStateKD, LogitKD, TaskLoss
from tests import tiny

from .common import make_trainer

MAPPED = [HiddenStateKD(layers={1: 2, 2: 4}), AttentionKD(layers={2: 3}), LogitKD(), TaskLoss()]


def watched(trainer, teacher, student):
    """Runs one training; returns how many of the teacher's tensors live in the student's forward, and after it."""
    alive, counts = {}, []

    def remember(module, args, output):
        for name in ("hidden_states", "attentions"):
            alive[name] = [weakref.ref(tensor) for tensor in output[name] if tensor is not None]
        alive["logits"] = [weakref.ref(output.logits)]

    def count(*_):
        counts.append({name: sum(ref() is not None for ref in refs) for name, refs in alive.items()})

    class AfterStep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            count()

    hooks = [teacher.register_forward_hook(remember), student.register_forward_pre_hook(count)]
    trainer.add_callback(AfterStep())
    gc.disable()  # what a cycle keeps alive counts as kept
    try:
        trainer.train()
    finally:
        gc.enable()
        for hook in hooks:
            hook.remove()
    return counts


def test_only_mapped_layers_are_kept_and_nothing_after_the_step(training_arguments):
    teacher, student = tiny.bert(1, layers=4), tiny.bert(0)
    trainer = make_trainer(training_arguments(max_steps=2), MAPPED, student, teacher)
    counts = watched(trainer, teacher, student)
    assert counts[0::2] == [{"hidden_states": 2, "attentions": 1, "logits": 1}] * 2
    assert counts[1::2] == [{"hidden_states": 0, "attentions": 0, "logits": 0}] * 2


@pytest.mark.one_line
def test_a_thousand_steps_leave_no_more_tensors_than_a_hundred(training_arguments):
    living = {}

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step in (100, 1000):
                gc.collect()
                tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
                living[state.global_step] = len(tensors), sum(tensor.numel() for tensor in tensors)

    arguments = training_arguments(max_steps=1000, per_device_train_batch_size=4, logging_steps=400)
    trainer = make_trainer(
        arguments, [TaskLoss(), LogitKD(), HiddenStateKD()], tiny.bert(0, layers=1), tiny.bert(1, layers=1, hidden=48),
        callbacks=[Count()], train_dataset=tiny.text_dataset(400),
    )  # fmt: skip
    trainer.train()
    (before, _), (after, size) = living[100], living[1000]
    assert after <= before
    assert size > 0


def test_a_callback_may_narrow_the_model_between_steps(training_arguments):
    """The graph of the last step, which is kept beside the next, would expect gradients of the old shape."""

    class Narrow(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            kept.append(trainer._kept is not None)
            if state.global_step == 2:
                layer = model.bert.encoder.layer[0]
                for parameter, axis in (
                    (layer.intermediate.dense.weight, 0), (layer.intermediate.dense.bias, 0), (layer.output.dense.weight, 1)
                ):  # fmt: skip
                    parameter.data = parameter.data.narrow(axis, 0, 8).clone()
                    optimizer.state.pop(parameter)

    kept: list[bool] = []
    trainer = make_trainer(training_arguments(max_steps=4), MAPPED, callbacks=[Narrow()])
    trainer.train()
    assert trainer.model.bert.encoder.layer[0].intermediate.dense.bias.shape == (8,)
    assert trainer.state.global_step == 4
    assert kept == [True] * 4
    assert trainer._kept is None
