# SPDX-License-Identifier: Apache-2.0
"""QATCallback in the plain Trainer: resuming, saved records, best model, late arrival."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from transformers import DataCollatorWithPadding, Trainer, TrainerCallback
from transformers.trainer_callback import TrainerState

from hfkdq import QATCallback, QuantizationSpec, load_quantized
from hfkdq.facts import read_facts
from hfkdq.modeling.checkpoints import plain_weights
from hfkdq.quantization import activation_ranges, prepare_qat_, quantized_modules, quantized_spec, records
from hfkdq.quantization.records import activation_quantizers, quantizer_states
from tests import tiny

ESTIMATORS = ["moving_average", "learned"]


def make_model():
    return tiny.bert(layers=1)


def make_trainer(args, spec=None, model=None, callbacks=(), cls=Trainer, **kwargs):
    tokenizer = tiny.tokenizer()
    if "model_init" not in kwargs:
        kwargs["model"] = make_model() if model is None else model
    qat = [] if spec is None else [QATCallback(spec)]
    return cls(
        args=args, train_dataset=tiny.text_dataset(32), eval_dataset=tiny.text_dataset(16, seed=1),
        data_collator=DataCollatorWithPadding(tokenizer), callbacks=[*qat, *callbacks], **kwargs,
    )  # fmt: skip


def ranges_in(folder):
    return json.loads((Path(folder) / "config.json").read_text())["hfkdq"]["quantization"]["ranges"]


def assert_same(model, other):
    assert quantizer_states(model) == quantizer_states(other)
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("estimator", QuantizationSpec.RANGE_ESTIMATORS)
def test_trains_every_parameter_and_saves_plain_files(training_arguments, estimator):
    spec = QuantizationSpec(range_estimator=estimator)
    plain = make_model()
    trainer = make_trainer(training_arguments(max_steps=2), spec)
    trainable = {id(parameter) for parameter in trainer.model.parameters()}
    trainer.train()
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimized == trainable
    assert all(
        not torch.equal(a, b)
        for a, b in zip(trainer.model.state_dict().values(), plain.state_dict().values(), strict=True)
    )
    assert len(activation_ranges(trainer.model)) == 8
    if estimator == "learned":
        assert all(
            q.scale.grad is None or q.scale.requires_grad for q in activation_quantizers(trainer.model).values()
        )
    trainer.save_model()
    with plain_weights():
        loaded, info = type(plain).from_pretrained(trainer.args.output_dir, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not quantized_modules(loaded)
    assert ranges_in(trainer.args.output_dir) == activation_ranges(trainer.model)
    batch = tiny.batch(loaded)
    assert torch.equal(load_quantized(trainer.args.output_dir)(**batch).logits, trainer.model.eval()(**batch).logits)


def test_learned_ranges_move_with_the_loss(training_arguments):
    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            self.first = self.first if state.global_step > 1 else quantizer_states(model)

    keep = Keep()
    trainer = make_trainer(
        training_arguments(max_steps=4), QuantizationSpec(range_estimator="learned"), callbacks=[keep]
    )
    trainer.train()
    last = quantizer_states(trainer.model)
    assert all(keep.first[name]["scale"] != last[name]["scale"] for name in last)


@pytest.mark.parametrize("restore_callbacks", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_resumes_exactly(training_arguments, estimator, restore_callbacks):
    spec = QuantizationSpec(range_estimator=estimator)
    settings = dict(max_steps=8, save_strategy="steps", save_steps=4)
    whole = make_trainer(training_arguments("whole", **settings), spec)
    whole.train()
    resumed = make_trainer(
        training_arguments("whole", restore_callback_states_from_checkpoint=restore_callbacks, **settings), spec
    )
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-4")
    assert_same(whole.model, resumed.model)
    assert whole.state.log_history[-2] == resumed.state.log_history[-2]


def test_resuming_loads_without_complaint(training_arguments, monkeypatch):
    spec = QuantizationSpec(range_estimator="learned")
    settings = dict(max_steps=2, save_strategy="steps", save_steps=1)
    make_trainer(training_arguments(**settings), spec).train()
    found = []
    monkeypatch.setattr(Trainer, "_issue_warnings_after_load", lambda self, result: found.append(result))
    trainer = make_trainer(training_arguments(**settings), spec)
    trainer.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-1")
    assert [(list(result.missing_keys), list(result.unexpected_keys)) for result in found] == [([], [])]


def test_resumes_from_a_checkpoint_without_qat(training_arguments):
    settings = dict(max_steps=4, save_strategy="steps", save_steps=2)
    make_trainer(training_arguments(**settings)).train()
    trainer = make_trainer(training_arguments(**settings), QuantizationSpec())
    trainer.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-2")
    state = TrainerState.load_from_json(f"{trainer.args.output_dir}/checkpoint-4/trainer_state.json")
    assert state.stateful_callbacks["QATCallback"]["attributes"]["ranges"] == quantizer_states(trainer.model)


def test_resuming_with_another_spec_is_refused(training_arguments):
    settings = dict(max_steps=2, save_strategy="steps", save_steps=1)
    make_trainer(training_arguments(**settings), QuantizationSpec()).train()
    trainer = make_trainer(training_arguments(**settings), QuantizationSpec(range_estimator="min_max"))
    with pytest.raises(ValueError, match="Resume with the same spec"):
        trainer.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-1")


class Begin(TrainerCallback):
    """Notes the quantizers' states that training begins with."""

    def on_step_begin(self, args, state, control, model, **kwargs):
        if not hasattr(self, "states"):
            self.states = quantizer_states(model)


@pytest.mark.parametrize(
    ("changed", "taken"),
    [
        (dict(range_estimator="min_max"), 8),
        (dict(exclude_modules=["classifier"]), 7),
        (dict(activation_bits=None), 0),
    ],
)
def test_resuming_with_another_spec_takes_over_what_fits_if_told_to(training_arguments, monkeypatch, changed, taken):
    settings = dict(max_steps=2, save_strategy="steps", save_steps=1)
    make_trainer(training_arguments(**settings), QuantizationSpec()).train()
    folder = Path(training_arguments(**settings).output_dir, "checkpoint-1")
    state = TrainerState.load_from_json(folder / "trainer_state.json")
    warnings, begin, spec = [], Begin(), QuantizationSpec(**changed)
    monkeypatch.setattr("hfkdq.quantization.callback.logger.warning", warnings.append)
    trainer = make_trainer(training_arguments(**settings), callbacks=[QATCallback(spec, strict_resume=False), begin])
    trainer.train(resume_from_checkpoint=str(folder))
    assert len(warnings) == 1
    assert "goes on with the new one" in warnings[0]
    assert len(begin.states) == taken
    ranges = state.stateful_callbacks["QATCallback"]["attributes"]["ranges"]
    assert begin.states == {name: ranges[name] for name in begin.states}
    state = TrainerState.load_from_json(folder.with_name("checkpoint-2") / "trainer_state.json")
    assert state.stateful_callbacks["QATCallback"]["args"]["spec"] == spec.to_dict()


class SaveFirst(TrainerCallback):
    """Saves at the end of a step, before every callback that the Trainer was given."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.trainer._save_checkpoint(self.trainer.model, trial=None)


def test_a_callback_that_saves_before_this_one_saves_the_ranges_of_its_step(training_arguments):
    whole = make_trainer(training_arguments(max_steps=4), QuantizationSpec())
    first = SaveFirst()
    first.trainer = whole
    whole.callback_handler.callbacks.insert(0, first)
    whole.train()
    resumed = make_trainer(training_arguments(max_steps=4), QuantizationSpec())
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    assert_same(whole.model, resumed.model)


class Watch(TrainerCallback):
    """Notes the ranges that the model has when a checkpoint is written."""

    def __init__(self):
        self.saved = {}

    def on_save(self, args, state, control, model, **kwargs):
        self.saved[state.global_step] = activation_ranges(model)


class SaveLate(TrainerCallback):
    """Asks for a save after every callback of ours has run."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = state.global_step == 3
        return control


@pytest.mark.parametrize(
    ("settings", "callbacks"),
    [
        (dict(save_strategy="steps", save_steps=2), []),
        (dict(save_strategy="epoch"), []),
        (dict(save_strategy="best", eval_strategy="steps", eval_steps=2, metric_for_best_model="loss"), []),
        (dict(save_strategy="no"), [SaveLate()]),
    ],
)
def test_every_saved_config_has_the_ranges_of_its_weights(training_arguments, settings, callbacks):
    watch = Watch()
    trainer = make_trainer(
        training_arguments(max_steps=4, **settings), QuantizationSpec(), callbacks=[*callbacks, watch]
    )
    trainer.train()
    assert watch.saved
    for step, ranges in watch.saved.items():
        assert ranges_in(f"{trainer.args.output_dir}/checkpoint-{step}") == ranges


class ReadFacts(TrainerCallback):
    """Reads what is recorded of a model in training, and copies its configuration."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, model, **kwargs):
        copied = copy.deepcopy(model.config)
        recorded = [read_facts(each)["quantization"]["ranges"] for each in (model, copied)]
        self.seen.append((activation_ranges(model), *recorded, json.loads(copied.to_json_string())["hfkdq"]))


def test_the_record_is_read_when_somebody_asks_and_at_no_other_step(training_arguments, monkeypatch):
    asked = []
    monkeypatch.setattr(records, "activation_ranges", lambda model: asked.append(1) or activation_ranges(model))
    counts = []
    for steps in (3, 9):
        trainer = make_trainer(training_arguments(max_steps=steps, save_strategy="no"), QuantizationSpec())
        trainer.train()
        counts.append(len(asked))
        asked.clear()
    assert counts[0] == counts[1] > 0
    assert read_facts(trainer.model)["quantization"]["ranges"] == activation_ranges(trainer.model)
    assert type(trainer.model.config.hfkdq["quantization"]) is dict
    reading = ReadFacts()
    make_trainer(training_arguments(max_steps=3), QuantizationSpec(), callbacks=[reading]).train()
    for ranges, read, copied, written in reading.seen:
        assert ranges == read == copied == written["quantization"]["ranges"]
    assert reading.seen[0][0] != reading.seen[2][0]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_best_model_comes_back_with_its_ranges(training_arguments, estimator):
    class Worsening(Trainer):
        def evaluate(self, *args, **kwargs):
            metrics = super().evaluate(*args, **kwargs)
            metrics["eval_error"] = float(self.state.global_step)
            return metrics

    args = training_arguments(
        max_steps=6, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, metric_for_best_model="error", greater_is_better=False,
    )  # fmt: skip
    trainer = make_trainer(args, QuantizationSpec(range_estimator=estimator), cls=Worsening)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    ranges = ranges_in(trainer.state.best_model_checkpoint)
    assert activation_ranges(trainer.model) == ranges == read_facts(trainer.model)["quantization"]["ranges"]
    assert ranges != ranges_in(f"{trainer.args.output_dir}/checkpoint-6")
    batch = tiny.batch(trainer.model)
    best = load_quantized(trainer.state.best_model_checkpoint)
    assert torch.equal(best(**batch).logits, trainer.model.eval()(**batch).logits)


def test_evaluates_the_quantized_model_before_and_after_training(training_arguments):
    trainer = make_trainer(training_arguments(max_steps=2), QuantizationSpec())
    before = trainer.evaluate()["eval_loss"]
    ranges = activation_ranges(trainer.model)
    assert before != make_trainer(training_arguments()).evaluate()["eval_loss"]
    assert ranges == {}
    trainer.train()
    ranges = activation_ranges(trainer.model)
    trainer.evaluate()
    assert quantized_modules(trainer.model)
    assert activation_ranges(trainer.model) == ranges


def test_add_callback(training_arguments):
    early = make_trainer(training_arguments(max_steps=3), QuantizationSpec())
    early.train()
    late = make_trainer(training_arguments(max_steps=3))
    late.add_callback(QATCallback(QuantizationSpec()))
    late.train()
    assert_same(early.model, late.model)


def test_learned_ranges_cannot_come_after_the_optimizer(training_arguments):
    trainer = make_trainer(training_arguments(max_steps=1))
    trainer.add_callback(QATCallback(QuantizationSpec(range_estimator="learned")))
    with pytest.raises(RuntimeError, match="constructor of the Trainer"):
        trainer.train()
    assert not quantized_modules(trainer.model)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_model_init(training_arguments, estimator):
    spec = QuantizationSpec(range_estimator=estimator)

    def model_init():
        return prepare_qat_(make_model(), spec) if estimator == "learned" else make_model()

    trainer = make_trainer(training_arguments(max_steps=2), spec, model_init=model_init)
    trainer.train()
    first, ranges = trainer.model, activation_ranges(trainer.model)
    trainer.train()
    assert trainer.model is not first
    assert activation_ranges(trainer.model) == ranges
    assert quantized_spec(trainer.model) == spec


def test_learned_with_a_float_model_init_says_what_to_do(training_arguments):
    spec = QuantizationSpec(range_estimator="learned")
    trainer = make_trainer(training_arguments(max_steps=1), spec, model_init=make_model)
    with pytest.raises(RuntimeError, match="model_init"):
        trainer.train()


def test_bf16(training_arguments):
    trainer = make_trainer(training_arguments(max_steps=2, bf16=True), QuantizationSpec(range_estimator="learned"))
    trainer.train()
    assert all(q.scale.dtype == torch.float32 for q in activation_quantizers(trainer.model).values())
    assert trainer.model.classifier.weight.dtype == torch.float32
    assert trainer.evaluate()["eval_loss"] > 0


def test_gradient_accumulation_and_checkpointing(training_arguments):
    args = training_arguments(max_steps=2, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    plain = make_trainer(args, QuantizationSpec())
    plain.train()
    model = make_model()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed = make_trainer(args, QuantizationSpec(), model=model)
    checkpointed.train()
    assert activation_ranges(plain.model) == activation_ranges(checkpointed.model)


def test_two_trainers_on_one_model(training_arguments):
    model = make_model()
    make_trainer(training_arguments(max_steps=1), QuantizationSpec(), model=model).train()
    make_trainer(training_arguments(max_steps=1), QuantizationSpec(), model=model).train()
    with pytest.raises(ValueError, match="strip_quantizers_"):
        make_trainer(training_arguments(), QuantizationSpec(activation_bits=None), model=model)


def test_weight_only(training_arguments):
    trainer = make_trainer(training_arguments(max_steps=2), QuantizationSpec(activation_bits=None))
    trainer.train()
    assert read_facts(trainer.model)["quantization"] == {
        "spec": QuantizationSpec(activation_bits=None).to_dict(),
        "ranges": {},
    }


def test_wrong_arguments(training_arguments):
    with pytest.raises(TypeError, match="takes a QuantizationSpec, got str"):
        QATCallback("int8")
    with pytest.raises(ValueError, match="matches no module"):
        make_trainer(training_arguments(), QuantizationSpec(target_modules=["nowhere"]))
