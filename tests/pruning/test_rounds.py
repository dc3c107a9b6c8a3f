# SPDX-License-Identifier: Apache-2.0
"""Pruning in rounds as far as a metric allows, and the sparsity that a target needs."""

import copy
from itertools import pairwise

import pytest
import torch
from transformers import DataCollatorWithPadding, Trainer, TrainerCallback

from hfkdq import PruningCallback, PruningSpec, fit_sparsity, prune
from hfkdq.facts import read_facts
from hfkdq.pruning.finishing import count_parameters

from .. import tiny
from ..families import FAMILIES

ROUNDS = PruningSpec(sparsity=0.8, structure="neuron", schedule="linear", rounds=4, end=1.0)  # 64 neurons: 51 38 26 13


class _Evaluated(TrainerCallback):
    """Steps at which there was an evaluation after that at the beginning, with the weights of then."""

    def __init__(self):
        self.steps, self.weights, self.has_begun = [], [], False

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        if not self.has_begun:  # whether there is such a metric is found out before anything is trained
            self.has_begun = True
            return
        self.steps.append(state.global_step)
        self.weights.append(copy.deepcopy(model.state_dict()))


def _trainer(args, scores, spec=ROUNDS, model=None, **bounds):
    seen, values = _Evaluated(), iter([scores[0], *scores])
    bounds = bounds or {"metric": "score", "at_least": 0.8}
    trainer = Trainer(
        model or tiny.bert(), args, DataCollatorWithPadding(tiny.tokenizer()), train_dataset=tiny.text_dataset(32),
        eval_dataset=tiny.text_dataset(8), compute_metrics=lambda _: {"score": next(values)},
        callbacks=[seen, PruningCallback(spec, **bounds)],
    )  # fmt: skip
    return trainer, seen


def test_every_round_is_trained_and_evaluated_before_the_next(training_arguments):
    trainer, seen = _trainer(training_arguments(max_steps=8), [0.9, 0.9, 0.9, 0.9])
    trainer.train()
    assert seen.steps == [2, 4, 6, 8]
    zeros = [
        [int((w[f"bert.encoder.layer.{i}.intermediate.dense.bias"] == 0).sum()) for i in range(2)]
        for w in seen.weights
    ]
    assert zeros == [[13] * 2, [26] * 2, [38] * 2, [51] * 2]
    assert trainer.model.config.intermediate_size == 13


@pytest.mark.parametrize(("scores", "kept", "steps"), [
    ([0.9, 0.9, 0.7], 38, 6),
    ([0.9, 0.8, 0.81, float("nan")], 26, 8),
    ([0.1], 64, 2),
])  # fmt: skip
def test_the_first_round_that_breaks_the_bound_is_undone_and_ends_the_training(
    scores, kept, steps, training_arguments
):
    trainer, seen = _trainer(training_arguments(max_steps=8), scores)
    trainer.train()
    assert trainer.state.global_step == steps
    assert trainer.model.config.intermediate_size == kept
    fact = read_facts(trainer.model)["pruning"]
    assert fact["achieved_sparsity"] == (64 - kept) / 64
    assert fact["parameters_after"] == trainer.model.num_parameters()
    if len(scores) > 1:  # what is left is the model of the round before, as it was evaluated
        good, bias = seen.weights[-2], "bert.encoder.layer.0.intermediate.dense.bias"
        assert torch.equal(trainer.model.state_dict()[bias], good[bias][good[bias] != 0])
        assert torch.equal(trainer.model.classifier.weight, good["classifier.weight"])
    else:
        assert all(tensor.any(dim=-1).all() for n, tensor in trainer.model.state_dict().items() if "dense.weight" in n)


@pytest.mark.parametrize("structure", ["layer", "weight", "hidden"])
def test_rounds_of_other_structures_are_undone_too(structure, training_arguments):
    spec = PruningSpec(sparsity=0.5, structure=structure, schedule="linear", rounds=2, end=1.0, plain_checkpoint=False)
    trainer, seen = _trainer(training_arguments(max_steps=4), [0.9, 0.1], spec, model=tiny.bert(layers=4))
    trainer.train()
    assert read_facts(trainer.model)["pruning"]["achieved_sparsity"] == pytest.approx(0.25, abs=0.01)
    assert torch.equal(trainer.model.classifier.bias, seen.weights[0]["classifier.bias"])
    assert not torch.equal(trainer.model.classifier.bias, seen.weights[1]["classifier.bias"])
    sizes = {"layer": (3, 32), "weight": (4, 32), "hidden": (4, 24)}[structure]
    assert (trainer.model.config.num_hidden_layers, trainer.model.classifier.weight.shape[1]) == sizes


def test_a_bound_on_the_loss_is_from_above(training_arguments):
    trainer, seen = _trainer(training_arguments(max_steps=8), [0.0] * 4, at_most=1e-6)
    trainer.train()
    assert seen.steps == [2]
    assert trainer.model.config.intermediate_size == 64


def test_a_resumed_search_equals_an_uninterrupted_one(training_arguments, tmp_path):
    args = training_arguments(max_steps=8, save_strategy="steps", save_steps=5)
    whole, _ = _trainer(args, [0.9, 0.9, 0.1])
    whole.train()
    resumed, _ = _trainer(args, [0.1], model=tiny.bert(seed=1))
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-5"))
    one, other = whole.model.state_dict(), resumed.model.state_dict()
    assert resumed.model.config.intermediate_size == 38
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_metric_that_is_not_there_is_named(training_arguments):
    trainer, _ = _trainer(training_arguments(max_steps=8), [0.9] * 4, metric="accuracy", at_least=0.5)
    with pytest.raises(ValueError, match=r"gave no eval_accuracy, only .*eval_score"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_the_best_model_and_a_bound_exclude_each_other(training_arguments):
    args = training_arguments(
        max_steps=8,
        load_best_model_at_end=True,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=2,
        save_steps=2,
    )
    with pytest.raises(ValueError, match="load_best_model_at_end"):
        _trainer(args, [0.9] * 4)


# --- targets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "llama", "t5", "whisper"])
@pytest.mark.parametrize("structure", ["neuron", "layer", "head"])
def test_the_least_sparsity_with_at_most_that_many_parameters_is_found(family, structure):
    model = FAMILIES[family].make()
    spec = PruningSpec(sparsity=0.6, structure=structure, plain_checkpoint=False, criterion="taylor")
    largest = prune(copy.deepcopy(model), PruningSpec(sparsity=0.4, structure=structure, plain_checkpoint=False))
    target = count_parameters(largest)
    before = copy.deepcopy(model.state_dict())
    found = fit_sparsity(model, spec, parameters=target)
    assert (found.structure, found.criterion) == (structure, "taylor")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    counts = [
        count_parameters(
            prune(copy.deepcopy(model), PruningSpec(sparsity=s, structure=structure, plain_checkpoint=False))
        )
        for s in (found.sparsity, found.sparsity - 0.01)
    ]
    assert counts[0] <= target
    assert counts[0] == target or counts[1] > target


def test_operations_are_those_of_a_forward_pass():
    model, batch = tiny.bert(layers=4), tiny.batch(tiny.bert())
    spec = PruningSpec(sparsity=0.75, structure="layer")
    found = [fit_sparsity(model, spec, flops=share, inputs=batch).sparsity for share in (0.9, 0.6, 0.3)]
    assert all(less < more for less, more in pairwise(found))
    assert prune(model, PruningSpec(sparsity=found[1], structure="layer")).config.num_hidden_layers == 2


def test_a_cost_of_ones_own_is_kept_below_one():
    spec = PruningSpec(sparsity=0.9, structure="neuron")
    found = fit_sparsity(tiny.bert(), spec, cost=lambda model: model.config.intermediate_size / 40)
    assert prune(tiny.bert(), found).config.intermediate_size == 40


def test_the_time_is_that_of_the_pruned_model_beside_the_whole_one(monkeypatch):
    whole, compared = tiny.bert(layers=8), []

    def clocked(pruned, model, batch):
        compared.append(model)
        return (1.0 + pruned.config.num_hidden_layers) / (1.0 + model.config.num_hidden_layers)

    monkeypatch.setattr("hfkdq.pruning.fitting._relative_time", clocked)
    found = fit_sparsity(whole, PruningSpec(sparsity=0.8, structure="layer"), latency=0.7, inputs=tiny.batch(whole))
    assert all(model is whole for model in compared)
    assert prune(whole, PruningSpec(sparsity=found.sparsity, structure="layer")).config.num_hidden_layers == 5


@pytest.mark.parametrize(("target", "message"), [
    ({}, "one target"),
    ({"parameters": 0.5, "latency": 0.5}, "one target"),
    ({"parameters": -1}, "must be a share"),
    ({"latency": 1.5}, r"share in \(0, 1\)"),
    ({"flops": 0.5}, "give inputs"),
    ({"parameters": 0.1}, "Even at sparsity 0.900"),
])  # fmt: skip
def test_a_target_that_cannot_be_is_refused(target, message):
    with pytest.raises(ValueError, match=message):
        fit_sparsity(tiny.bert(), PruningSpec(sparsity=0.9, structure="neuron"), **target)


def test_shapes_that_stay_have_no_target():
    with pytest.raises(ValueError, match="leaves the shapes"):
        fit_sparsity(tiny.bert(), PruningSpec(sparsity=0.5), parameters=0.5)
