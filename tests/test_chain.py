# SPDX-License-Identifier: Apache-2.0
"""Distillation, pruning and quantization in one run, in every combination and order."""

import itertools
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback

from hfkdq import (
    AttentionKD,
    CompressionReport,
    DistillationTrainer,
    HiddenStateKD,
    LogitKD,
    PruningCallback,
    PruningSpec,
    QATCallback,
    QuantizationSpec,
    TaskLoss,
    export_onnx,
    load_quantized,
    make_student,
    prune,
    quantize,
)
from hfkdq.metrics import classification_metrics
from hfkdq.pruning.criteria import ImportanceStatistics
from hfkdq.pruning.masks import Masks
from hfkdq.pruning.targets import find_targets

from . import tiny

NEURONS = PruningSpec(sparsity=0.5, structure="neuron", end=0.6)


def objectives():
    return [TaskLoss(weight=0.5), LogitKD(), HiddenStateKD(), AttentionKD(weight=0.1)]


def run(arguments, callbacks, student=None, distil=True, resume=None, extra=()):
    settings = dict(
        train_dataset=tiny.text_dataset(), eval_dataset=tiny.text_dataset(12, seed=3), processing_class=tiny.tokenizer(),
        compute_metrics=classification_metrics, callbacks=[*callbacks, *extra],
    )  # fmt: skip
    student = student or tiny.bert(0, hidden_dropout_prob=0.1)
    if distil:
        teacher = tiny.bert(1, layers=4, hidden=48)
        trainer = DistillationTrainer(student, arguments, teacher_model=teacher, objectives=objectives(), **settings)
    else:
        trainer = Trainer(student, arguments, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("parts", list(itertools.product([True, False], repeat=3)), ids=str)
def test_every_combination_trains_and_leaves_an_ordinary_checkpoint(training_arguments, tmp_path, parts):
    distil, prunes, quantizes = parts
    callbacks = [PruningCallback(NEURONS)] * prunes + [QATCallback(QuantizationSpec())] * quantizes
    trainer = run(training_arguments(max_steps=4), callbacks, distil=distil)
    in_memory = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(tmp_path / "saved"))
    loaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert set(load_file(tmp_path / "saved" / "model.safetensors")) == set(tiny.bert().state_dict())
    assert loaded.config.intermediate_size == (32 if prunes else 64)
    facts = getattr(loaded.config, "hfkdq", {})
    names = {"distillation": distil, "pruning": prunes, "quantization": quantizes}
    assert set(facts) == {name for name, done in names.items() if done}
    again = load_quantized(str(tmp_path / "saved")) if quantizes else loaded
    plain = Trainer(again, trainer.args, eval_dataset=trainer.eval_dataset, processing_class=tiny.tokenizer())
    assert plain.evaluate()["eval_loss"] == pytest.approx(in_memory, abs=1e-6)


@pytest.mark.parametrize("estimator", ["moving_average", "learned"])
@pytest.mark.parametrize("pruned_first", [True, False])
def test_all_at_once_resumes_exactly(training_arguments, estimator, pruned_first):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop |= state.global_step == 4

    def attempt(folder, resume=None, extra=()):
        arguments = training_arguments(folder, max_steps=8, save_strategy="steps", save_steps=4)
        callbacks = [PruningCallback(NEURONS), QATCallback(QuantizationSpec(range_estimator=estimator))]
        return run(arguments, callbacks if pruned_first else callbacks[::-1], resume=resume, extra=extra)

    whole = attempt("whole")
    # Without the end of the run the checkpoint is what is left of it.
    attempt("cut", extra=[Stop()])
    resumed = attempt("cut", resume=True)
    assert whole.model.config.hfkdq["quantization"] == resumed.model.config.hfkdq["quantization"]
    for (name, one), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_accumulation_changes_nothing_with_everything_on(training_arguments):
    """The ranges that are learned, and the masks, follow from the same updates."""
    logs, models = [], []
    for size, steps in ((16, 1), (4, 4)):
        arguments = training_arguments(
            f"{size}", per_device_train_batch_size=size, gradient_accumulation_steps=steps, max_steps=3, optim="sgd", learning_rate=0.05
        )  # fmt: skip
        spec = QuantizationSpec(activation_bits=None)  # observed ranges see micro batches by definition
        trainer = run(arguments, [PruningCallback(NEURONS), QATCallback(spec)], student=tiny.bert(0))
        logs.append([[row["loss"], row["grad_norm"]] for row in trainer.state.log_history if "loss" in row])
        models.append(trainer.model)
    np.testing.assert_allclose(*logs, rtol=2e-3)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(
    "spec",
    [
        dict(),
        dict(weight_bits=2),
        dict(weight_bits=4, weight_estimator="mse", symmetric=False),
        dict(weight_bits=4, weight_mapping="power_law", activation_bits=4),
    ],
)
@torch.no_grad()
def test_removing_zeroed_neurons_changes_nothing_of_a_quantized_model(spec):
    model, batch = tiny.bert(0), tiny.batch(tiny.bert(0))
    quantize(model, QuantizationSpec(**spec), [batch])
    targets = find_targets(model, NEURONS)
    masks = Masks(targets, NEURONS, ImportanceStatistics(targets, NEURONS))
    masks.grow_to(NEURONS.sparsity)
    masks.apply_()
    zeroed = model(**batch).logits
    assert prune(model, NEURONS).config.intermediate_size == 32
    torch.testing.assert_close(model(**batch).logits, zeroed, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pruned_first", [True, False])
def test_learned_scales_of_weights_follow_the_removal_of_neurons(training_arguments, tmp_path, pruned_first):
    callbacks = [PruningCallback(NEURONS), QATCallback(QuantizationSpec(weight_bits=4, weight_estimator="learned"))]
    trainer = run(training_arguments(max_steps=6), callbacks if pruned_first else callbacks[::-1])
    trainer.save_model(str(tmp_path / "saved"))
    batch = tiny.batch(trainer.model)
    loaded = load_quantized(str(tmp_path / "saved"))
    assert loaded.config.intermediate_size == 32
    assert torch.equal(loaded(**batch).logits, trainer.model.eval()(**batch).logits)


def test_groups_that_removal_would_cut_are_refused_before_training(training_arguments):
    callbacks = [PruningCallback(PruningSpec(sparsity=0.25, structure="neuron")), QATCallback(QuantizationSpec(group_size=32))]  # fmt: skip
    steps = []

    class Count(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            steps.append(1)

    with pytest.raises(ValueError, match=r"output.dense: Pruning would leave 48 inputs, which group_size=32"):
        run(training_arguments(max_steps=6), callbacks, extra=[Count()])
    assert not steps


@pytest.mark.parametrize("estimator", ["moving_average", "learned"])
def test_what_was_trained_is_what_is_exported_and_reported(training_arguments, tmp_path, estimator):
    spec = QuantizationSpec(range_estimator=estimator)
    teacher = tiny.bert(1, layers=4)
    student = make_student(teacher, num_layers=2)
    trainer = run(training_arguments(max_steps=8), [PruningCallback(NEURONS), QATCallback(spec)], student=student)
    data = trainer.eval_dataset
    texts = data.remove_columns("labels")
    folder = export_onnx(
        trainer.model,
        tmp_path / "onnx",
        quantization=spec,
        processing_class=tiny.tokenizer(),
        calibration=texts,
        latency_rounds=0,
    )
    facts = json.loads((folder / "export_facts.json").read_text())
    assert facts["top1_agreement"] == 1.0
    assert facts["max_abs_diff"] <= 0.05 * facts["max_abs_logit"]
    assert facts["fused_linears"] == facts["quantized_linears"]
    report = CompressionReport.measure(
        teacher=teacher, student=trainer.model, onnx=folder, eval_dataset=data, processing_class=tiny.tokenizer(),
        compute_metrics=classification_metrics, latency_rounds=0,
    )  # fmt: skip
    rows = {engine.name: engine for engine in report.engines}
    assert rows["student"].metrics["accuracy"] == pytest.approx(trainer.evaluate()["eval_accuracy"])
    assert rows["ONNX int8"].metrics == pytest.approx(rows["student"].metrics)
    card = report.to_card()
    for fact in ("LogitKD", "50.0% of the feed-forward neurons", "8-bit weights", "2 of the teacher's 4 layers"):
        assert fact in card


def test_a_quantized_model_with_shapes_layer_by_layer_loads_back(tmp_path):
    model, batch = tiny.bert(0), tiny.batch(tiny.bert(0))
    spec = PruningSpec(sparsity=0.5, structure="neuron", ranking="global", plain_checkpoint=False)
    prune(model, PruningSpec(sparsity=0.5, structure="head", plain_checkpoint=False))
    model.bert.encoder.layer[0].intermediate.dense.weight.data *= 1.5
    prune(model, spec)
    widths = [layer.intermediate.dense.out_features for layer in model.bert.encoder.layer]
    assert widths[0] > widths[1]
    quantize(model, QuantizationSpec(weight_bits=4), [batch])
    model.save_pretrained(tmp_path)
    loaded = load_quantized(str(tmp_path))
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert [layer.intermediate.dense.out_features for layer in loaded.bert.encoder.layer] == widths
