# SPDX-License-Identifier: Apache-2.0
import copy
import os
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
)
from transformers.trainer_callback import TrainerState

from hfkdq.facts import read_facts
from hfkdq.modeling import find_layer_stack, find_neurons, width_fields
from hfkdq.pruning import PruningCallback, prune
from hfkdq.schedules import Cubic
from hfkdq.specs import PruningSpec

from .. import tiny

FAMILIES = [tiny.bert, tiny.distilbert, tiny.vit, tiny.llama]
WEIGHT = PruningSpec(sparsity=0.6)
NEURON = PruningSpec(sparsity=0.3, structure="neuron")  # 64 neurons, 45 are kept


@dataclass
class _Block:
    inputs: list
    outputs: list


def find_feed_forwards(model):
    """Names and linear layers into the neurons of every layer, and out of them."""
    sides = [
        [[(s.name, s.module) for s in group.of_role(role) if s.tensor == "weight"] for role in ("output", "input")]
        for group in find_neurons(model)
    ]
    return [_Block(*side) for side in sides]


def width_field(config):
    """The field with the number of neurons."""
    return next(iter(width_fields(config)))


class _Recorder(TrainerCallback):
    """Runs a function of the model after every step; given after the pruning callback, it sees what that did."""

    def __init__(self, measure):
        self.measure, self.seen = measure, []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append(self.measure(model))


class _Push(TrainerCallback):
    """An optimizer that makes every weight that was zero a large one; for before the pruning callback."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.zero = {name: linear.weight == 0 for name, linear in _linears(model).items()}

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            for name, linear in _linears(model).items():
                linear.weight.masked_fill_(self.zero[name], 5.0)


class _StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def _trainer(args, spec, *after, before=(), model=None, **kwargs):
    data = tiny.text_dataset(32)
    return Trainer(
        model=tiny.bert() if model is None else model,
        args=args,
        train_dataset=data,
        eval_dataset=data,
        data_collator=DataCollatorWithPadding(tiny.tokenizer()),
        callbacks=[*before, PruningCallback(spec), *after],
        **kwargs,
    )


def _linears(model):
    """Linear layers of the stack, as `PruningSpec(structure="weight")` prunes them by default."""
    return {
        name: module
        for name, module in find_layer_stack(model).layers.named_modules()
        if isinstance(module, nn.Linear)
    }


def _zero_weights(model):
    return [int((linear.weight == 0).sum()) for linear in _linears(model).values()]


def _zero_neurons(model):
    counts = []
    for block in find_feed_forwards(model):
        rows = [(linear.weight == 0).all(dim=1) for _, linear in block.inputs]
        rows += [linear.bias == 0 for _, linear in block.inputs if linear.bias is not None]
        columns = [(linear.weight == 0).all(dim=0) for _, linear in block.outputs]
        counts.append(int(torch.stack(rows + columns).all(dim=0).sum()))
    return counts


def _expected_zeros(model, sparsity):
    sizes = [linear.weight.numel() for linear in _linears(model).values()]
    return [size - round(size * (1 - sparsity)) for size in sizes]


def _logits(model):
    with torch.no_grad():
        return model.cpu().eval()(**tiny.batch(model)).logits


def _same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


# --- at once ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", FAMILIES)
def test_the_smallest_weights_of_every_layer_become_zero(make):
    model = make()
    dense = copy.deepcopy(model)
    assert prune(model, WEIGHT) is model
    assert _zero_weights(model) == _expected_zeros(model, 0.6)
    for name, linear in _linears(model).items():
        before = _linears(dense)[name].weight
        kept = linear.weight != 0
        assert torch.equal(linear.weight[kept], before[kept])
        assert before[kept].abs().min() >= before[~kept].abs().max()
    untouched = {name: tensor for name, tensor in dense.state_dict().items() if "layer" not in name}
    assert untouched
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in untouched.items())


@pytest.mark.parametrize("make", FAMILIES)
def test_removed_neurons_leave_the_logits_of_the_masked_model(make, tmp_path):
    model = make()
    for block in find_feed_forwards(model):
        for _, linear in block.inputs:
            if linear.bias is not None:
                nn.init.normal_(linear.bias)
    dense, masked = copy.deepcopy(model), copy.deepcopy(model)
    field = width_field(model.config)
    width = getattr(model.config, field)
    kept = round(width * 0.7)
    for block in find_feed_forwards(masked):
        score = sum(linear.weight.square().sum(dim=1) for _, linear in block.inputs)
        score = score + sum(linear.bias.square() for _, linear in block.inputs if linear.bias is not None)
        score = score + sum(linear.weight.square().sum(dim=0) for _, linear in block.outputs)
        gone = score.argsort()[: width - kept]
        with torch.no_grad():
            for _, linear in block.inputs:
                linear.weight[gone] = 0.0
                if linear.bias is not None:
                    linear.bias[gone] = 0.0
            for _, linear in block.outputs:
                linear.weight[:, gone] = 0.0

    before = model.num_parameters()
    prune(model, NEURON)
    assert getattr(model.config, field) == kept
    assert not torch.allclose(_logits(model), _logits(dense), atol=1e-3)
    torch.testing.assert_close(_logits(model), _logits(masked), atol=1e-5, rtol=0)
    for block in find_feed_forwards(model):
        assert all(linear.weight.shape[0] == linear.out_features == kept for _, linear in block.inputs)
        assert all(linear.weight.shape[1] == linear.in_features == kept for _, linear in block.outputs)
    assert read_facts(model)["pruning"] == {
        "spec": NEURON.to_dict(),
        "achieved_sparsity": (width - kept) / width,
        "parameters_before": before,
        "parameters_after": model.num_parameters(),
    }
    assert model.num_parameters() < before

    model.save_pretrained(tmp_path)
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(_logits(loaded), _logits(model))


def test_what_was_done_to_weights_is_measured():
    model = tiny.bert()
    prune(model, WEIGHT)
    fact = read_facts(model)["pruning"]
    sizes = [linear.weight.numel() for linear in _linears(model).values()]
    assert fact["achieved_sparsity"] == sum(_zero_weights(model)) / sum(sizes)
    assert fact["achieved_sparsity"] == pytest.approx(0.6, abs=1e-3)
    assert fact["parameters_before"] == fact["parameters_after"] == model.num_parameters()
    assert PruningSpec.from_dict(fact["spec"]) == WEIGHT


@pytest.mark.parametrize("structure", ["weight", "block", "neuron"])
def test_nothing_goes_at_sparsity_zero(structure):
    model = tiny.bert()
    prune(model, PruningSpec(sparsity=0.0, structure=structure))
    assert read_facts(model)["pruning"]["achieved_sparsity"] == 0.0
    assert _same(model, tiny.bert())


@pytest.mark.parametrize("structure", ["weight", "neuron", "layer", "block"])
def test_a_sparsity_that_would_leave_nothing_is_refused(structure):
    model = tiny.bert()
    with pytest.raises(ValueError, match=r"sparsity=0\.9999 would leave 0 of the \d+ units .*Choose a smaller"):
        prune(model, PruningSpec(sparsity=0.9999, structure=structure))
    assert _same(model, tiny.bert())
    assert not read_facts(model)


def test_equal_magnitudes_are_cut_at_the_exact_count():
    model = tiny.bert()
    for linear in _linears(model).values():
        nn.init.constant_(linear.weight, 0.5)
    prune(model, WEIGHT)
    assert _zero_weights(model) == _expected_zeros(model, 0.6)


def test_patterns_choose_linear_layers_anywhere():
    model = tiny.bert()
    prune(model, PruningSpec(sparsity=0.5, target_modules=["query", "classifier"], exclude_modules=r".*layer\.1\..*"))
    pruned = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and (m.weight == 0).any()]
    assert pruned == ["bert.encoder.layer.0.attention.self.query", "classifier"]


def test_removed_neurons_keep_dtype_and_gradient_flag():
    model = tiny.bert().to(torch.bfloat16)
    inputs, outputs = ([linear for _, linear in side] for side in vars(find_feed_forwards(model)[0]).values())
    inputs[0].weight.requires_grad_(False)
    prune(model, NEURON)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert [inputs[0].weight.requires_grad, inputs[0].bias.requires_grad] == [False, True]
    assert outputs[0].weight.requires_grad


class _Wrapped(nn.Linear):
    """A layer with more to it than its class says, as quantization-aware training makes them."""


class _Scale(nn.Module):
    """A parameter that only training needs: not in the state dict."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        pass


def test_layers_of_other_linear_classes_stay_what_they_are():
    model, plain = tiny.bert(), tiny.bert()
    for linear in _linears(model).values():
        linear.__class__ = _Wrapped
        linear.activation_quantizer = _Scale()
    prune(model, NEURON)
    prune(plain, NEURON)
    assert {type(linear) for linear in _linears(model).values()} == {_Wrapped}
    assert len([name for name, _ in model.named_parameters() if name.endswith("quantizer.scale")]) == 12
    assert torch.equal(_logits(model), _logits(plain))
    assert read_facts(model) == read_facts(plain)


# --- while training --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 2])
def test_sparsity_follows_the_schedule_step_by_step(training_arguments, accumulation):
    spec = PruningSpec(sparsity=0.6, begin=0.2, end=0.8)
    weights = _Recorder(_zero_weights)
    args = training_arguments(
        max_steps=10, per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation
    )
    trainer = _trainer(args, spec, weights)
    trainer.train()
    cubic = Cubic(0.0, 0.6, begin=0.2, until=0.8)
    assert weights.seen == [_expected_zeros(trainer.model, cubic((step + 1) / 10)) for step in range(10)]
    assert weights.seen[1] == [0] * len(weights.seen[1])
    assert weights.seen[7] == weights.seen[9] == _expected_zeros(trainer.model, 0.6)


def test_neurons_are_masked_while_training_and_removed_after_it(training_arguments, tmp_path):
    neurons = _Recorder(_zero_neurons)
    args = training_arguments(max_steps=10, save_strategy="steps", save_steps=10)
    trainer = _trainer(args, NEURON, neurons)
    trainer.train()
    cubic = Cubic(0.0, 0.3, until=0.7)
    assert neurons.seen == [[64 - round(64 * (1 - cubic((step + 1) / 10)))] * 2 for step in range(10)]
    assert trainer.model.config.intermediate_size == 45
    assert read_facts(trainer.model)["pruning"]["achieved_sparsity"] == 19 / 64

    # The last checkpoint is the masked model, in the shapes it was trained in.
    masked = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "checkpoint-10")
    assert masked.config.intermediate_size == 64
    torch.testing.assert_close(_logits(trainer.model), _logits(masked), atol=1e-5, rtol=0)

    trainer.save_model(str(tmp_path / "final"))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "final")
    assert torch.equal(_logits(loaded), _logits(trainer.model))
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize("make", [tiny.vit, tiny.llama, tiny.distilbert])
def test_every_family_trains_to_the_full_sparsity(make, training_arguments):
    model = make()
    width = getattr(model.config, width_field(model.config))
    if make is tiny.vit:
        data, collator = tiny.image_dataset(16), None
    else:
        data, collator = tiny.text_dataset(16), DataCollatorWithPadding(tiny.tokenizer())
    if make is tiny.llama:
        batch = tiny.batch(model, size=8)
        batch["labels"] = batch["input_ids"]
        data = [{name: tensor[i] for name, tensor in batch.items()} for i in range(8)]
        collator = None
    trainer = Trainer(
        model, training_arguments(max_steps=3), collator, train_dataset=data, callbacks=[PruningCallback(NEURON)]
    )
    trainer.train()
    assert getattr(model.config, width_field(model.config)) == round(width * 0.7)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("spec", [WEIGHT, PruningSpec(sparsity=0.6, begin=0.9, end=1.0)])
def test_short_runs_reach_the_full_sparsity_with_their_last_step(steps, spec, training_arguments):
    weights = _Recorder(_zero_weights)
    trainer = _trainer(training_arguments(max_steps=steps), spec, weights)
    trainer.train()
    assert weights.seen[-1] == _zero_weights(trainer.model) == _expected_zeros(trainer.model, 0.6)


def test_what_is_pruned_stays_pruned_whatever_the_optimizer_does(training_arguments):
    masks = _Recorder(lambda model: [linear.weight == 0 for linear in _linears(model).values()])
    trainer = _trainer(training_arguments(max_steps=8), WEIGHT, masks, before=[_Push()])
    trainer.train()
    for before, after in zip(masks.seen, masks.seen[1:], strict=False):
        assert all((new | ~old).all() for old, new in zip(before, after, strict=True))
    assert _zero_weights(trainer.model) == _expected_zeros(trainer.model, 0.6)


@pytest.mark.parametrize("restore_callbacks", [False, True])
@pytest.mark.parametrize("spec", [WEIGHT, NEURON, PruningSpec(sparsity=0.6, begin=0.6, end=0.9)])
def test_a_resumed_run_equals_an_uninterrupted_one(spec, restore_callbacks, training_arguments, tmp_path):
    args = training_arguments(
        max_steps=8, save_strategy="steps", save_steps=4, restore_callback_states_from_checkpoint=restore_callbacks
    )
    whole = _trainer(args, spec, before=[_Push()])
    whole.train()
    resumed = _trainer(args, spec, before=[_Push()], model=tiny.bert(seed=1))
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    assert _same(whole.model, resumed.model)
    assert read_facts(whole.model) == read_facts(resumed.model)


@pytest.fixture
def resumed(training_arguments, tmp_path, monkeypatch):
    """Trains one step with callbacks, resumes with others, and gives that trainer and what it warned of."""

    def resume(then, now):
        warnings = []
        monkeypatch.setattr("hfkdq.pruning.callback.logger.warning", warnings.append)
        args = training_arguments(max_steps=2, save_strategy="steps", save_steps=1)
        data, collator = tiny.text_dataset(32), DataCollatorWithPadding(tiny.tokenizer())
        Trainer(tiny.bert(), args, collator, data, callbacks=then).train()
        trainer = Trainer(tiny.bert(), args, collator, data, callbacks=now)
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
        return trainer, warnings

    return resume


def _recorded_spec(trainer):
    path = os.path.join(trainer.args.output_dir, "checkpoint-2", "trainer_state.json")
    return TrainerState.load_from_json(path).stateful_callbacks["PruningCallback"]["args"]["spec"]


SPARSER = PruningSpec(sparsity=0.8, exclude_modules=["query"])


def test_a_checkpoint_of_another_spec_is_refused(resumed):
    with pytest.raises(ValueError, match=r"was trained with PruningSpec.*0\.6.*not with.*0\.8.*strict_resume=False"):
        resumed([PruningCallback(WEIGHT)], [PruningCallback(SPARSER)])


def test_a_checkpoint_of_another_spec_is_gone_on_from_if_told_to(resumed):
    trainer, warnings = resumed([PruningCallback(WEIGHT)], [PruningCallback(SPARSER, strict_resume=False)])
    assert len(warnings) == 1
    assert "goes on with the new one" in warnings[0]
    assert read_facts(trainer.model)["pruning"]["spec"] == _recorded_spec(trainer) == SPARSER.to_dict()
    pruned = [
        count
        for name, count in zip(_linears(trainer.model), _zero_weights(trainer.model), strict=True)
        if "query" not in name
    ]
    sizes = [linear.weight.numel() for name, linear in _linears(trainer.model).items() if "query" not in name]
    assert pruned == [size - round(size * 0.2) for size in sizes]


def test_a_checkpoint_without_pruning_is_gone_on_from(resumed):
    trainer, warnings = resumed([], [PruningCallback(WEIGHT)])
    assert len(warnings) == 1
    assert "saved without PruningCallback" in warnings[0]
    assert _recorded_spec(trainer) == WEIGHT.to_dict()


def test_several_callbacks_resume_together(resumed):
    both = [WEIGHT, PruningSpec(sparsity=0.1, target_modules=["classifier"])]
    trainer, warnings = resumed([PruningCallback(spec) for spec in both], [PruningCallback(spec) for spec in both])
    assert not warnings
    assert int((trainer.model.classifier.weight == 0).sum()) == 10


@pytest.mark.parametrize("spec", [WEIGHT, NEURON])
def test_the_best_model_has_the_full_sparsity(spec, training_arguments, tmp_path):
    worse = iter(range(100))
    args = training_arguments(
        max_steps=8, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="score", greater_is_better=False,
    )  # fmt: skip
    trainer = _trainer(args, spec, compute_metrics=lambda _: {"score": float(next(worse))})
    trainer.train()
    # The score gets worse all the time; of the fully pruned models (steps 6, 7 and 8) the first is the best.
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-6")
    best = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "checkpoint-6")
    torch.testing.assert_close(_logits(trainer.model), _logits(best), atol=1e-5, rtol=0)
    if spec is WEIGHT:
        assert _zero_weights(trainer.model) == _expected_zeros(trainer.model, 0.6)
    else:
        assert trainer.model.config.intermediate_size == 45


def test_training_stopped_early_ends_at_the_full_sparsity(training_arguments, monkeypatch):
    warnings = []
    monkeypatch.setattr("hfkdq.pruning.callback.logger.warning", warnings.append)
    trainer = _trainer(training_arguments(max_steps=10), NEURON, _StopAt(3))
    trainer.train()
    assert trainer.model.config.intermediate_size == 45
    assert len(warnings) == 1
    assert "step 3 of 10" in warnings[0]


def test_early_stopping_and_pruning_share_the_best_metric(training_arguments):
    args = training_arguments(
        max_steps=10, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="score", greater_is_better=True,
    )  # fmt: skip
    scores = iter([9, 9, 9, 9, 9, 9, 1, 2, 3, 4])
    stopping = EarlyStoppingCallback(early_stopping_patience=7)
    trainer = _trainer(args, NEURON, stopping, compute_metrics=lambda _: {"score": float(next(scores))})
    trainer.train()
    assert trainer.state.global_step == 10
    assert trainer.state.best_metric == 4.0


def test_a_trainer_that_removed_neurons_does_not_train_again(training_arguments):
    trainer = _trainer(training_arguments(max_steps=2), NEURON)
    trainer.train()
    with pytest.raises(RuntimeError, match="make a new Trainer"):
        trainer.train()


def test_a_trainer_that_pruned_weights_trains_again(training_arguments):
    trainer = _trainer(training_arguments(max_steps=2), WEIGHT)
    trainer.train()
    trainer.train()
    assert _zero_weights(trainer.model) == _expected_zeros(trainer.model, 0.6)


def test_frozen_layers_are_pruned_like_others(training_arguments):
    model = tiny.bert()
    model.bert.encoder.layer[0].requires_grad_(False)
    trainer = _trainer(training_arguments(max_steps=2), WEIGHT, model=model)
    trainer.train()
    assert _zero_weights(trainer.model) == _expected_zeros(trainer.model, 0.6)


def test_model_init_gives_a_model_per_training(training_arguments):
    data = tiny.text_dataset(16)
    trainer = Trainer(
        model_init=lambda: tiny.bert(),
        args=training_arguments(max_steps=2),
        train_dataset=data,
        data_collator=DataCollatorWithPadding(tiny.tokenizer()),
        callbacks=[PruningCallback(NEURON)],
    )
    for _ in range(2):
        trainer.train()
        assert trainer.model.config.intermediate_size == 45


# --- bad input -------------------------------------------------------------------------------------------------------


def test_a_spec_that_does_not_fit_is_refused_as_the_trainer_is_made(training_arguments):
    spec = PruningSpec(sparsity=0.5, target_modules=["qurey"])
    with pytest.raises(ValueError, match=r"target_modules=\('qurey',\).*for example: bert\.encoder\.layer\.0"):
        _trainer(training_arguments(max_steps=1), spec)


def test_a_spec_that_does_not_fit_is_refused_before_training_with_a_callback_added_late(training_arguments):
    trainer = Trainer(tiny.bert(), training_arguments(max_steps=1), train_dataset=tiny.text_dataset(8))
    trainer.add_callback(PruningCallback(PruningSpec(sparsity=0.5, exclude_modules=r".*")))
    before = copy.deepcopy(trainer.model)
    with pytest.raises(ValueError, match="matches no layer of BertForSequenceClassification"):
        trainer.train()
    assert _same(trainer.model, before)


def test_a_callback_takes_a_spec():
    with pytest.raises(TypeError, match="takes a PruningSpec, got float"):
        PruningCallback(0.5)


def test_only_transformers_models_are_pruned():
    with pytest.raises(TypeError, match="got Linear"):
        prune(nn.Linear(2, 2), WEIGHT)


@pytest.mark.parametrize("spec", [WEIGHT, NEURON])
def test_packed_weights_are_refused_and_nothing_is_changed(spec):
    model = tiny.bert()
    last = model.bert.encoder.layer[1].output.dense
    last.weight = nn.Parameter(last.weight.detach().to(torch.int8), requires_grad=False)
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"layer\.1\.output\.dense \(Linear\) is torch\.int8"):
        prune(model, spec)
    assert _same(model, before)
    assert read_facts(model) == {}


def test_layers_that_are_left_out_need_shapes_of_their_own():
    spec = dict(sparsity=0.5, structure="neuron", exclude_modules=r".*layer\.1\..*")
    model = tiny.bert()
    with pytest.raises(ValueError, match=r"exclude_modules leave some layers as wide.*plain_checkpoint=False"):
        prune(model, PruningSpec(**spec))
    prune(model, PruningSpec(**spec, plain_checkpoint=False))
    assert [layer.intermediate.dense.out_features for layer in model.bert.encoder.layer] == [32, 64]
