# SPDX-License-Identifier: Apache-2.0
"""What is no finite number is refused when it is given, or ends the training at its step, by name; a token is in no file."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import TrainingArguments

from hfkdq import (
    AdversarialKD,
    ByAgreement,
    DistillationTrainer,
    LogitKD,
    NoisyKD,
    PruningCallback,
    PruningSpec,
    TaskLoss,
    cache_teacher_outputs,
)
from hfkdq.objectives import EnsembleKD
from hfkdq.schedules import Cosine, Linear, Piecewise, Step
from tests import tiny

NAN, INF = float("nan"), float("inf")


def trainer_of(arguments, objectives, teacher=True, **kwargs):
    return DistillationTrainer(
        tiny.bert(), arguments, teacher_model=tiny.bert(1) if teacher else None, objectives=objectives,
        train_dataset=tiny.text_dataset(), processing_class=tiny.tokenizer(), **kwargs,
    )  # fmt: skip


GIVEN = {
    "a weight": lambda: LogitKD(weight=NAN),
    "an infinite weight": lambda: LogitKD(weight=-INF),
    "a schedule of weights": lambda: TaskLoss(weight=lambda progress: NAN if progress > 0.5 else 1.0),
    "an infinite schedule": lambda: TaskLoss(weight=lambda progress: INF if progress == 1.0 else 1.0),
    "a schedule that gives None": lambda: TaskLoss(weight=lambda progress: None),
    "a ramp": lambda: TaskLoss(weight=Linear(1.0, NAN)),
    "a wave": lambda: TaskLoss(weight=Cosine(INF, 0.0)),
    "a step": lambda: TaskLoss(weight=Step(1.0, NAN)),
    "points": lambda: TaskLoss(weight=Piecewise([(0.0, 1.0), (1.0, NAN)])),
    "a temperature": lambda: LogitKD(temperature=NAN),
    "an infinite temperature": lambda: LogitKD(temperature=INF),
    "a schedule of temperatures": lambda: LogitKD(temperature=lambda progress: NAN if progress > 0.9 else 1.0),
    "an objective within": lambda: NoisyKD(objective=LogitKD(temperature=INF)),
    "a standard deviation": lambda: NoisyKD(std=INF),
    "an epsilon": lambda: AdversarialKD(epsilon=INF),
    "an adaptive weight": lambda: LogitKD(weight=ByAgreement(high=INF)),
    "a momentum": lambda: LogitKD(weight=ByAgreement(momentum=NAN)),
    "a weight that is a text": lambda: LogitKD(weight="1"),
    "an ensemble": lambda: EnsembleKD(weight=NAN),
}


@pytest.mark.parametrize("name", GIVEN)
def test_it_is_refused_when_it_is_given(name, training_arguments):
    with pytest.raises((ValueError, TypeError), match=r"finite|number|must|be"):
        trainer_of(training_arguments(max_steps=1), [GIVEN[name]()])


def values_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_an_objective_ends_the_training_before_the_weights_change(value, training_arguments):
    steps = []

    def own(student_out, teacher_out, batch):
        steps.append(values_of(trainer.model))
        return student_out.logits.mean() * (value if len(steps) == 3 else 1.0)

    trainer = trainer_of(training_arguments(max_steps=5, logging_steps=100), [TaskLoss(), own])
    with pytest.raises(RuntimeError, match=r"At step 3 own is (nan|inf|-inf), loss is"):
        trainer.train()
    assert len(steps) == 3
    assert all(torch.equal(value, steps[-1][name]) for name, value in trainer.model.state_dict().items())
    assert all(value.isfinite().all() for value in steps[-1].values())


def test_a_weight_between_the_points_that_were_tried_ends_it_too(training_arguments):
    trainer = trainer_of(
        training_arguments(max_steps=7), [TaskLoss(weight=lambda p: NAN if 0.425 < p < 0.4299 else 1.0)]
    )
    with pytest.raises(RuntimeError, match=r"The weight of task_loss is nan at progress 0\.429 \(step 4\)"):
        trainer.train()


def test_a_gradient_that_is_no_number_ends_it_at_the_next_log(training_arguments):
    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * NAN

    trainer = trainer_of(training_arguments(max_steps=3), [TaskLoss(), lambda s, t, b: Bad.apply(s.logits).mean()])
    with pytest.raises(RuntimeError, match="The gradient was nan before step 1"):
        trainer.train()


def test_the_last_step_is_looked_at_too(training_arguments):
    trainer = trainer_of(
        training_arguments(max_steps=2, max_grad_norm=0.0, logging_steps=100, learning_rate=1e30), [TaskLoss()]
    )
    with pytest.raises(RuntimeError, match=r"not finite|so there is nothing to learn"):
        trainer.train()


@pytest.mark.parametrize("bound", [NAN, INF, "0.5", True])
def test_bounds_are_numbers(bound):
    spec = PruningSpec(sparsity=0.5, structure="neuron", rounds=2)
    with pytest.raises(ValueError, match="at_least must be a finite number"):
        PruningCallback(spec, at_least=bound)


def test_a_metric_of_no_evaluation_is_told_before_training(training_arguments):
    spec = PruningSpec(sparsity=0.5, structure="neuron", rounds=2)
    for callback, more, told in (
        (
            PruningCallback(spec, metric="acuracy", at_least=0.5),
            {"eval_dataset": tiny.text_dataset()},
            "gave no eval_acuracy",
        ),
        (PruningCallback(spec, at_most=9.0), {}, "eval_dataset"),
    ):
        trainer = trainer_of(training_arguments(max_steps=4), [TaskLoss()], callbacks=[callback], **more)
        before = values_of(trainer.model)
        with pytest.raises(ValueError, match=told):
            trainer.train()
        assert trainer.state.global_step == 0
        assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    callback = PruningCallback(spec, at_most=99.0)
    arguments = training_arguments(max_steps=4)
    trainer = trainer_of(arguments, [TaskLoss()], callbacks=[callback], eval_dataset=tiny.text_dataset())
    trainer.train()
    assert arguments.eval_on_start is False
    assert trainer.model.config.hfkdq["pruning"]["achieved_sparsity"] == 0.5


@pytest.mark.parametrize("temperature", [NAN, INF, 0.0])
def test_a_cache_takes_no_such_temperature(temperature, tmp_path):
    with pytest.raises(ValueError, match="temperature must be larger than 0 and finite"):
        cache_teacher_outputs(tiny.bert(), tiny.text_dataset(4), temperature=temperature, folder=tmp_path / "none")
    assert not (tmp_path / "none").exists()


TOKEN = "hf_" + "PretendToken" * 3


@pytest.mark.parametrize("objectives", [[TaskLoss()], None])
def test_a_token_is_in_no_file_and_is_used(objectives, training_arguments, tmp_path):
    arguments = training_arguments(max_steps=2, save_steps=1, save_strategy="steps", hub_token=TOKEN)
    trainer = trainer_of(arguments, objectives, teacher=False)
    trainer.train()
    arguments.hub_token = TOKEN  # once more, as set_push_to_hub does
    trainer.save_model(str(tmp_path / "saved"))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "training_args.bin" for path in files)
    assert [path for path in files if TOKEN.encode() in path.read_bytes()] == []
    assert trainer.args.hub_token == TOKEN == copy.deepcopy(trainer.args).hub_token
    loaded = torch.load(tmp_path / "saved" / "training_args.bin", weights_only=False)
    assert isinstance(loaded, TrainingArguments)
    assert loaded.hub_token is None
    assert pickle.loads(pickle.dumps(trainer.args.hub_token)) is None


def test_an_interrupted_training_says_what_is_kept(training_arguments, caplog, tmp_path):
    def stop(student_out, teacher_out, batch):
        if trainer.state.global_step == 3:
            raise KeyboardInterrupt
        return student_out.logits.mean() * 0

    trainer = trainer_of(training_arguments(max_steps=5, save_steps=2, save_strategy="steps"), [TaskLoss(), stop])
    from transformers.utils import logging

    logging.enable_propagation()
    before = logging.get_verbosity()
    logging.set_verbosity_warning()
    try:
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    finally:
        logging.set_verbosity(before)
        logging.disable_propagation()
    assert "Interrupted at step 3 of 5." in caplog.text
    assert "checkpoint-2 is kept: train(resume_from_checkpoint=True) goes on from it." in caplog.text
