# SPDX-License-Identifier: Apache-2.0
"""Hyperparameter search: students, objectives and callbacks are made anew for every trial."""

import numpy as np
import pytest
from transformers import TrainerCallback

from hfkdq import DistillationTrainer, PruningCallback, PruningSpec, QATCallback, QuantizationSpec
from hfkdq.objectives import HiddenStateKD, LogitKD, TaskLoss
from hfkdq.schedules import Linear
from tests import tiny

from .common import losses, teacher_of, weights

pytest.importorskip("optuna")


def searching(arguments, objectives, callbacks=None, **kwargs):
    return DistillationTrainer(
        args=arguments, model_init=lambda: tiny.bert(0), train_dataset=tiny.text_dataset(),
        eval_dataset=tiny.text_dataset(10, seed=9), processing_class=tiny.tokenizer(), teacher_model=teacher_of(),
        objectives=objectives, callbacks=callbacks, **kwargs,
    )  # fmt: skip


def search(trainer, trials=3):
    import optuna

    return trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True)},
        backend="optuna", n_trials=trials, direction="minimize", compute_objective=lambda metrics: metrics["eval_loss"],
        sampler=optuna.samplers.RandomSampler(seed=0),
    )  # fmt: skip


def test_temperatures_weights_and_sparsities_are_searched(training_arguments):
    seen = []

    def objectives(trial):
        temperature = 2.0 if trial is None else trial.suggest_float("temperature", 1.0, 8.0)
        return [TaskLoss(weight=Linear(1, 0)), LogitKD(temperature=temperature), HiddenStateKD()]

    def callbacks(trial):
        sparsity = 0.5 if trial is None else trial.suggest_categorical("sparsity", [0.25, 0.75])
        return [PruningCallback(PruningSpec(sparsity=sparsity, structure="neuron"))]

    class Watching(DistillationTrainer):
        def evaluate(self, *args, **kwargs):
            made = [c for c in self.callback_handler.callbacks if isinstance(c, PruningCallback)]
            width = self.model.config.intermediate_size
            seen.append((self.objectives[1].temperature, made[0].spec.sparsity, len(made), width))
            return super().evaluate(*args, **kwargs)

    arguments = training_arguments(max_steps=4, eval_strategy="steps", eval_steps=2)
    trainer = Watching(
        args=arguments, model_init=lambda: tiny.bert(0), train_dataset=tiny.text_dataset(),
        eval_dataset=tiny.text_dataset(10, seed=9), processing_class=tiny.tokenizer(), teacher_model=teacher_of(),
        objectives=objectives, callbacks=callbacks,
    )  # fmt: skip
    best = search(trainer)
    temperatures = [temperature for temperature, *_ in seen]
    assert len(set(temperatures)) == 3
    assert best.hyperparameters["temperature"] in temperatures
    assert {sparsity for _, sparsity, *_ in seen} == {0.25, 0.75}
    # One pruning callback at a time, and every trial begins with a whole student.
    assert all(count == 1 and width == 64 for _, _, count, width in seen)
    assert np.isfinite(losses(trainer, "loss", "logit_kd", "hidden_state_kd")).all()


def test_a_trial_equals_a_training_of_its_own(training_arguments):
    """The second trial is not touched by the first: projections, ranges and masks begin anew."""
    made = [lambda trial: [PruningCallback(PruningSpec(sparsity=0.5)), QATCallback(QuantizationSpec())]]
    terms = [TaskLoss(), LogitKD(), HiddenStateKD()]
    searched = searching(
        training_arguments("searched", max_steps=3, eval_strategy="steps", eval_steps=3), terms, *made
    )
    ends = {}
    original = searched.evaluate
    searched.evaluate = lambda *a, **k: (
        ends.update({searched.args.learning_rate: weights(searched.model)}) or original(*a, **k)
    )
    search(searched, trials=2)
    for number, (rate, state) in enumerate(ends.items()):
        arguments = training_arguments(f"alone{number}", max_steps=3, learning_rate=rate)
        alone = searching(arguments, terms, *made)
        end = {}
        # As in the search: before pruning is completed at the end of the training.
        alone.add_callback(_Keep(end))
        alone.train()
        assert state.keys() == end.keys()
        assert all((state[key] == end[key]).all() for key in state)


class _Keep(TrainerCallback):
    def __init__(self, into):
        self.into = into

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.into.update(weights(model))


def test_learned_ranges_are_trained_in_every_trial(training_arguments):
    trainer = searching(
        training_arguments(max_steps=2),
        [LogitKD()],
        lambda trial: [QATCallback(QuantizationSpec(range_estimator="learned"))],
    )
    trainer.train()
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    own = {id(p) for p in tiny.bert(0).parameters()}
    assert len(list(trainer.model.parameters())) > len(own)  # the scales are parameters
    assert all(id(p) in trained for p in trainer.model.parameters() if p.requires_grad)


def test_a_class_stands_for_a_callback_of_its_own_in_every_trial(training_arguments):
    seen = []

    class Count(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            seen.append(self)

    trainer = searching(training_arguments(max_steps=1), [LogitKD()], lambda trial: [Count])
    trainer.train()
    trainer.train()
    assert len(seen) == 2
    assert seen[0] is not seen[1]


@pytest.mark.parametrize("objectives", [lambda: [LogitKD()], lambda a, b, c: 0, LogitKD()])
def test_what_is_no_list_and_no_function_of_a_trial_is_refused(training_arguments, objectives):
    with pytest.raises(TypeError, match="must be a list"):
        searching(training_arguments(), objectives)
