# SPDX-License-Identifier: Apache-2.0
"""Every structure and criterion while a Trainer trains: what is masked is what is removed, and resuming changes nothing."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, Trainer, TrainerCallback

from hfkdq import (
    AttentionKD,
    DistillationTrainer,
    EMATeacher,
    HiddenStateKD,
    LogitKD,
    PruningCallback,
    PruningSpec,
    QATCallback,
    QuantizationSpec,
    RelationKD,
    TaskLoss,
    load_pruned,
)
from hfkdq.facts import read_facts
from hfkdq.modeling import bypass_, find_heads
from hfkdq.pruning.targets import find_targets

from .. import tiny

SPECS = {
    "weight, taylor": PruningSpec(sparsity=0.6, criterion="taylor"),
    "weight, movement, global": PruningSpec(sparsity=0.6, criterion="movement", ranking="global"),
    "weight, activation, decay": PruningSpec(sparsity=0.6, criterion="activation", cut="decay"),
    "n:m, magnitude": PruningSpec(structure="n:m"),
    "block, fisher, exponential": PruningSpec(
        structure="block", pattern="2x8", sparsity=0.5, criterion="fisher", schedule="exponential"
    ),
    "neuron, movement": PruningSpec(sparsity=0.5, structure="neuron", criterion="movement"),
    "neuron, taylor, mean": PruningSpec(sparsity=0.5, structure="neuron", criterion="taylor", cut="mean"),
    "neuron, fisher, decay": PruningSpec(sparsity=0.5, structure="neuron", criterion="fisher", cut="decay"),
    "neuron, activation, global": PruningSpec(
        sparsity=0.5, structure="neuron", criterion="activation", ranking="global", plain_checkpoint=False
    ),
    "neuron, teacher": PruningSpec(sparsity=0.5, structure="neuron", criterion="teacher", rounds=3),
    "neuron, mask": PruningSpec(sparsity=0.5, structure="neuron", cut="mask", rounds=2),
    "head, taylor": PruningSpec(sparsity=0.5, structure="head", criterion="taylor", plain_checkpoint=False),
    "layer, activation": PruningSpec(sparsity=0.5, structure="layer", criterion="activation", rounds=1),
    "layer, taylor": PruningSpec(sparsity=0.5, structure="layer", criterion="taylor"),
    "hidden, magnitude": PruningSpec(sparsity=0.5, structure="hidden", plain_checkpoint=False),
}


class _AtTheEnd(TrainerCallback):
    """Keeps what the model says after the last step, before anything is removed."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == state.max_steps:
            self.logits = _logits(model)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _logits(model):
    training = model.training
    with torch.no_grad():
        logits = model.eval()(**tiny.batch(model)).logits
    model.train(training)
    return logits


def _callback(spec):
    calibration = [tiny.batch(tiny.bert(), seed=seed) for seed in range(2)] if spec.criterion == "teacher" else None
    return PruningCallback(spec, calibration=calibration)


def _trainer(args, spec, *more, model=None, **kwargs):
    return Trainer(
        tiny.bert(layers=4) if model is None else model, args, DataCollatorWithPadding(tiny.tokenizer()),
        train_dataset=tiny.text_dataset(32), eval_dataset=tiny.text_dataset(8), callbacks=[_callback(spec), *more],
        **kwargs,
    )  # fmt: skip


@pytest.mark.parametrize("name", SPECS)
def test_what_was_masked_while_training_is_what_is_removed_after_it(name, training_arguments, tmp_path):
    seen = _AtTheEnd()
    trainer = _trainer(training_arguments(max_steps=6, learning_rate=1e-3), SPECS[name], seen)
    before = trainer.model.num_parameters()
    trainer.train()
    model, fact = trainer.model, read_facts(trainer.model)["pruning"]
    torch.testing.assert_close(_logits(model), seen.logits, atol=1e-5, rtol=0)
    assert not torch.allclose(seen.logits, _logits(tiny.bert(layers=4)), atol=1e-3)
    assert fact["achieved_sparsity"] == pytest.approx(SPECS[name].sparsity, abs=0.02)
    assert (model.num_parameters() < before) == SPECS[name].removes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(parameter._backward_hooks for parameter in model.parameters())
    trainer.save_model(str(tmp_path / "saved"))
    load = AutoModelForSequenceClassification.from_pretrained if SPECS[name].plain_checkpoint else load_pruned
    assert torch.equal(_logits(load(str(tmp_path / "saved"))), _logits(model))


RESUMED = [
    name for name in SPECS if name not in ("neuron, mask", "neuron, fisher, decay", "layer, activation", "block, fisher, exponential")
]  # fmt: skip


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_equals_an_uninterrupted_one(name, training_arguments, tmp_path):
    args = training_arguments(max_steps=6, save_strategy="steps", save_steps=2, learning_rate=1e-3)
    whole = _trainer(args, SPECS[name])
    whole.train()
    resumed = _trainer(args, SPECS[name], model=tiny.bert(seed=1, layers=4))
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    one, other = whole.model.state_dict(), resumed.model.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())
    assert read_facts(whole.model) == read_facts(resumed.model)


@pytest.mark.parametrize("name", ["weight, taylor", "neuron, movement", "head, taylor", "hidden, magnitude"])
def test_what_is_pruned_has_no_gradient_and_does_not_count_when_gradients_are_clipped(name, training_arguments):
    seen = _AtTheEnd()
    trainer = _trainer(training_arguments(max_steps=6, max_grad_norm=1e-3, logging_steps=1), SPECS[name], seen)
    zeros = {}

    class Remember(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 5:  # the gradients of step 6 are of this model
                zeros.update({n: p.detach() == 0 for n, p in model.named_parameters()})

    trainer.add_callback(Remember())
    trainer.train()
    pruned = sum(int(mask.sum()) for mask in zeros.values())
    assert pruned > 500
    unused = {"bert.embeddings.word_embeddings.weight"}
    for key, gradient in seen.gradients.items():
        if key not in unused and zeros[key].any() and (zeros[key].all() or "layer" in key):
            assert not gradient[zeros[key]].any(), key
    norm = torch.stack([gradient.norm() for gradient in seen.gradients.values()]).norm()
    assert norm == pytest.approx(1e-3, rel=1e-3)  # all of the allowance went to what is left


@pytest.mark.parametrize("name", ["weight, taylor", "neuron, taylor, mean", "layer, taylor"])
def test_an_averaged_teacher_follows_the_pruned_student(name, training_arguments):
    seen = _AtTheEnd()
    trainer = DistillationTrainer(
        tiny.bert(layers=4), training_arguments(max_steps=6), DataCollatorWithPadding(tiny.tokenizer()),
        train_dataset=tiny.text_dataset(32), teacher_model=EMATeacher(decay=0.0), objectives=[TaskLoss(), LogitKD()],
        callbacks=[PruningCallback(SPECS[name]), seen],
    )  # fmt: skip
    student = {}

    class Remember(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            student.update(copy.deepcopy(model.state_dict()))

    trainer.add_callback(Remember())
    trainer.train()
    averaged = trainer.teacher_model.state_dict()
    assert averaged.keys() == student.keys()
    assert all(torch.equal(tensor, student[key]) for key, tensor in averaged.items())


@pytest.mark.parametrize("structure", ["head", "layer", "neuron"])
def test_pruning_distillation_and_quantization_in_one_run(structure, training_arguments):
    spec = PruningSpec(sparsity=0.5, structure=structure, criterion="taylor", plain_checkpoint=structure != "head")
    qat = QATCallback(QuantizationSpec(range_estimator="learned", weight_estimator="learned"))
    trainer = DistillationTrainer(
        tiny.bert(layers=4), training_arguments(max_steps=6), DataCollatorWithPadding(tiny.tokenizer()),
        train_dataset=tiny.text_dataset(32), eval_dataset=tiny.text_dataset(8), teacher_model=tiny.bert(seed=1, layers=4),
        objectives=[TaskLoss(), LogitKD(), HiddenStateKD(), AttentionKD(), RelationKD()],
        callbacks=[PruningCallback(spec), qat, seen := _AtTheEnd()],
    )  # fmt: skip
    trainer.train()
    assert torch.isfinite(torch.tensor(trainer.evaluate()["eval_loss"]))
    torch.testing.assert_close(_logits(trainer.model), seen.logits, atol=1e-5, rtol=0)
    if structure == "layer":
        assert trainer.model.config.num_hidden_layers == 2
        assert len(read_facts(trainer.model)["student"]["layers"]) == 2
    if structure == "head":
        assert [group.units for group in find_heads(trainer.model)] == [2] * 4


# --- bypassed layers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [HiddenStateKD, AttentionKD, RelationKD])
def test_layers_that_are_passed_by_are_not_compared_with_the_teacher(kind):
    objective = kind(layers={i: i for i in range(1, 5)})
    student, teacher, batch = tiny.bert(layers=4), tiny.bert(seed=1, layers=4), tiny.batch(tiny.bert())
    objective.attach(student, teacher)
    needs = {f"output_{need}": True for need in objective.needs}

    def value(kept):
        twin = kind(layers={i: i for i in kept})
        twin.attach(student, teacher)
        return _value(twin, student, teacher, batch, needs)

    bypass_(student.bert.encoder.layer[1], True)
    skipping, kept = _value(objective, student, teacher, batch, needs), value([1, 3, 4])
    everything = torch.stack([value([i]) for i in range(1, 5)]).mean()
    torch.testing.assert_close(skipping, kept)
    assert not torch.allclose(skipping, everything)
    bypass_(student.bert.encoder.layer[1], False)
    assert not torch.allclose(_value(objective, student, teacher, batch, needs), kept)


def _value(objective, student, teacher, batch, needs):
    if needs:
        return objective(student(**batch, **needs), teacher(**batch, **needs), batch)
    with objective.capture() as seen:
        ours = student(**batch)
        with torch.no_grad():
            theirs = teacher(**batch)
    return objective(ours, theirs, batch, seen=seen)


def test_a_layer_that_is_passed_by_hands_on_its_input_and_has_gradients_of_zero():
    model, batch = tiny.bert(layers=2).train(), tiny.batch(tiny.bert())
    bypass_(model.bert.encoder.layer[1], True)
    states = model(**batch, output_hidden_states=True).hidden_states
    assert torch.equal(states[1], states[2])
    model(**batch, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    assert all(not p.grad.any() for p in model.bert.encoder.layer[1].parameters())
    assert all(p.grad.any() for n, p in model.bert.encoder.layer[0].named_parameters() if "weight" in n)


def test_a_layer_that_is_passed_by_hands_on_its_input_to_what_collects_hidden_states_already():
    model, batch = tiny.bert(layers=2), tiny.batch(tiny.bert())
    model(**batch, output_hidden_states=True)  # Transformers 5 collects by hooks from the first time on
    bypass_(model.bert.encoder.layer[0], True)
    states = model(**batch, output_hidden_states=True).hidden_states
    assert torch.equal(states[0], states[1])


# --- bad input -------------------------------------------------------------------------------------------------------


def test_more_rounds_than_steps_are_refused(training_arguments):
    trainer = _trainer(training_arguments(max_steps=6), PruningSpec(sparsity=0.5, rounds=5, end=0.5))
    with pytest.raises(ValueError, match="5 rounds do not fit into the 3 optimizer steps"):
        trainer.train()


@pytest.mark.parametrize(("make", "message"), [
    (lambda: PruningCallback(PruningSpec(structure="vocab")), "needs a tokenizer and a corpus"),
    (lambda: PruningCallback(PruningSpec(sparsity=0.5, criterion="teacher")), "calibration=dataset"),
    (lambda: PruningCallback(PruningSpec(sparsity=0.5), at_least=0.5), "rounds"),
])  # fmt: skip
def test_a_callback_that_lacks_something_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(("structure", "make", "message"), [
    ("neuron", tiny.resnet, "no feed-forward width"),
    ("head", tiny.resnet, "no attention"),
    ("channel", tiny.bert, "no block of convolutions"),
    ("layer", tiny.resnet, "no stack of layers"),
    ("hidden", tiny.wav2vec2_ctc, "not supported for wav2vec2"),
    ("head", tiny.bert, "plain_checkpoint=False"),
])  # fmt: skip
def test_a_structure_that_the_architecture_lacks_is_refused_as_the_trainer_is_made(
    structure, make, message, training_arguments
):
    model = make()
    with pytest.raises(ValueError, match=message):
        Trainer(
            model,
            training_arguments(max_steps=1),
            callbacks=[PruningCallback(PruningSpec(sparsity=0.5, structure=structure))],
        )


def test_weights_of_bitsandbytes_are_refused():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = tiny.bert()
    dense = model.bert.encoder.layer[0].output.dense
    packed = bitsandbytes.nn.Linear4bit(64, 32)
    packed.weight = bitsandbytes.nn.Params4bit(dense.weight.data, requires_grad=False).to("cpu")
    model.bert.encoder.layer[0].output.dense = packed
    for structure in ("weight", "neuron"):
        with pytest.raises(ValueError, match=r"layer\.0\.output\.dense \(Linear4bit\) .*quantization_config"):
            find_targets(model, PruningSpec(sparsity=0.5, structure=structure))


def test_norms_count_all_channels_again_after_the_training(training_arguments):
    trainer = _trainer(training_arguments(max_steps=2), SPECS["hidden, magnitude"])
    trainer.train()
    norms = [module for module in trainer.model.modules() if isinstance(module, nn.LayerNorm)]
    assert {type(norm) for norm in norms} == {nn.LayerNorm}
    assert {norm.normalized_shape for norm in norms} == {(16,)}


@pytest.mark.parametrize("criterion", ["taylor", "movement"])
def test_gradients_of_frozen_layers_cannot_decide(criterion, training_arguments):
    model = tiny.bert()
    model.bert.encoder.layer[0].requires_grad_(False)
    trainer = _trainer(
        training_arguments(max_steps=2),
        PruningSpec(sparsity=0.5, structure="neuron", criterion=criterion),
        model=model,
    )
    with pytest.raises(ValueError, match=r"layer\.0.*is\s+frozen"):
        trainer.train()


@pytest.mark.parametrize("order", [1, -1])
def test_neurons_and_weights_are_pruned_in_one_run_in_either_order(order, training_arguments):
    specs = [PruningSpec(sparsity=0.5, structure="neuron"), PruningSpec(sparsity=0.6)][::order]
    trainer = Trainer(
        tiny.bert(), training_arguments(max_steps=6), DataCollatorWithPadding(tiny.tokenizer()),
        train_dataset=tiny.text_dataset(32), callbacks=[*map(PruningCallback, specs), seen := _AtTheEnd()],
    )  # fmt: skip
    trainer.train()
    torch.testing.assert_close(_logits(trainer.model), seen.logits, atol=1e-5, rtol=0)
    assert trainer.model.config.intermediate_size == 32
    query = trainer.model.bert.encoder.layer[0].attention.self.query.weight
    assert int((query == 0).sum()) == 1024 - round(1024 * 0.4)
    facts = read_facts(trainer.model)["pruning"]
    assert [fact["spec"]["structure"] for fact in (*facts["earlier"], facts)] == [spec.structure for spec in specs]


@pytest.mark.parametrize("name", ["layer, taylor", "hidden, magnitude", "head, taylor"])
def test_a_checkpoint_from_the_middle_is_not_taken_for_the_model(name, training_arguments, tmp_path):
    trainer = _trainer(training_arguments(max_steps=6, save_strategy="steps", save_steps=3), SPECS[name])
    trainer.train()
    assert "unfinished_pruning" not in read_facts(trainer.model)
    middle = str(tmp_path / "out" / "checkpoint-3")
    if "head" in name:
        assert load_pruned(middle).num_parameters() == tiny.bert(layers=4).num_parameters()
    else:
        with pytest.raises(ValueError, match=r"middle of a training.*resume_from_checkpoint"):
            load_pruned(middle)


def test_the_sparsity_is_logged(training_arguments):
    trainer = _trainer(training_arguments(max_steps=4, logging_steps=1), SPECS["neuron, taylor, mean"])
    trainer.train()
    logged = [row["sparsity"] for row in trainer.state.log_history if "loss" in row]
    expected = [SPECS["neuron, taylor, mean"].sparsity_at(step / 4) for step in (1, 2, 3, 4)]
    assert logged == pytest.approx(expected, abs=1e-4)
