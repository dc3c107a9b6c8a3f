# SPDX-License-Identifier: Apache-2.0
"""Half precision, compiled models, checkpointed activations and other ways to run the same training."""

from __future__ import annotations

import inspect
import types

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from torch.nn import functional
from transformers import Trainer, TrainerCallback
from transformers.modeling_outputs import CausalLMOutput

from hfkdq.objectives import AttentionKD, HiddenStateKD, LogitKD, TaskLoss
from tests import tiny

from .common import ALL_TERMS, assert_equal_weights, losses, make_trainer, teacher_of
from .test_peft import for_language_models

FIVE = int(transformers.__version__.split(".")[0]) >= 5
# Transformers 5 calls gradient checkpointing activation checkpointing, and warns of the older name.
CHECKPOINTING = "activation_checkpointing" if FIVE else "gradient_checkpointing"
NAMES = ("loss", "grad_norm", "task_loss", "logit_kd", "hidden_state_kd", "attention_kd")


def run(arguments, objectives=None, student=None, teacher=None, **kwargs):
    trainer = make_trainer(arguments, objectives or ALL_TERMS["sum"], student, teacher or teacher_of(), **kwargs)
    trainer.train()
    return trainer


# ---------------------------------------------------------------------- losses in float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_huge_logits_give_finite_losses_and_gradients(dtype, temperature):
    """In float16 the square of the temperature, the sum over the vocabulary and logit / 0.5 would overflow."""
    student, teacher = tiny.llama(0), tiny.llama(1)
    objective = LogitKD(temperature=temperature)
    objective.attach(student, teacher)
    generator = torch.Generator().manual_seed(0)
    shape = (2, 6, 95)
    signs = [torch.randint(0, 2, shape, generator=generator) * 2.0 - 1 for _ in range(2)]
    ours = (signs[0] * 1e4).to(dtype).requires_grad_()
    theirs = (signs[1] * 1e4).to(dtype)
    batch = {"labels": torch.ones(2, 6, dtype=torch.long)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mean = objective(CausalLMOutput(logits=ours), CausalLMOutput(logits=theirs), batch)
    mean.backward()
    assert mean.dtype == torch.float32
    assert torch.isfinite(mean)
    exact = [functional.log_softmax(x[:, :-1].detach().double() / temperature, -1) for x in (ours, theirs)]
    expected = (exact[1].exp() * (exact[1] - exact[0])).sum(-1).mean() * temperature**2
    assert mean.item() == pytest.approx(expected.item(), rel=1e-4)
    assert torch.isfinite(ours.grad).all()
    assert ours.grad.abs().sum() > 0


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_bf16_trains_on_losses_in_float32(training_arguments, scale):
    """The terms that are logged are those of the models' half-precision outputs, computed in float32."""
    seen, student, teacher = [], tiny.bert(0), teacher_of()
    for model in (student, teacher):
        model.classifier.weight.data *= scale

    def watch(student_out, teacher_out, batch):
        seen.append((student_out.logits.detach(), teacher_out.logits, torch.is_autocast_enabled("cpu")))
        return student_out.logits.float().sum() * 0

    types_of = {"student": [], "teacher": []}
    for name, model in (("student", student), ("teacher", teacher)):
        model.bert.pooler.dense.register_forward_hook(lambda m, a, output, n=name: types_of[n].append(output.dtype))
    arguments = training_arguments(max_steps=3, bf16=True)
    trainer = run(arguments, [LogitKD(), HiddenStateKD(), watch], student, teacher)
    assert types_of["student"][-1] == types_of["teacher"][-1] == torch.bfloat16
    assert student.dtype == torch.float32
    for (ours, theirs, autocast), (logged,) in zip(seen, losses(trainer, "logit_kd"), strict=True):
        assert not autocast
        pair = [functional.log_softmax(x.double() / 2, -1) for x in (ours, theirs)]
        exact = 4 * (pair[1].exp() * (pair[1] - pair[0])).sum(-1).mean()
        assert logged == pytest.approx(exact.item(), rel=1e-4)
    assert np.isfinite(losses(trainer, "loss", "grad_norm")).all()


def test_bf16_gives_nearly_the_losses_of_float32(training_arguments):
    whole, half = (run(training_arguments(f"{bf16}", max_steps=3, bf16=bf16)) for bf16 in (False, True))
    np.testing.assert_allclose(losses(half, *NAMES), losses(whole, *NAMES), rtol=0.05)
    assert losses(half, "loss") != losses(whole, "loss")


@pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
def test_evaluation_before_and_after_training_is_that_of_trainer_in_bf16(training_arguments, before):
    """A teacher prepared by accelerate makes evaluation believe that the student is, so it would run in float32."""
    results, modes = [], []
    for cls in ("plain", "ours"):
        student = tiny.bert(0)
        student.bert.pooler.dense.register_forward_hook(lambda m, a, output: modes.append(output.dtype))
        kwargs = dict(cls=Trainer) if cls == "plain" else {}
        arguments = training_arguments(cls, max_steps=1, bf16=True, learning_rate=0.0)
        trainer = make_trainer(arguments, [TaskLoss(), LogitKD()], student, **kwargs)
        if not before:
            trainer.train()
        modes.clear()
        results.append((trainer.evaluate()["eval_loss"], set(modes)))
    assert results[0] == results[1]
    assert results[0][1] == {torch.bfloat16}


def test_bf16_full_eval_is_that_of_trainer_and_leaves_the_student_trainable(training_arguments):
    results = []
    for cls in ("plain", "ours"):
        arguments = training_arguments(
            cls, max_steps=3, bf16_full_eval=True, eval_strategy="steps", eval_steps=1, learning_rate=0.0
        )
        kwargs = dict(cls=Trainer) if cls == "plain" else {}
        trainer = make_trainer(arguments, [TaskLoss(), LogitKD()], tiny.bert(0), **kwargs)
        trainer.train()
        results.append(
            (
                [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row],
                trainer.evaluate()["eval_loss"],
                trainer.model.dtype,
            )
        )
    assert results[0] == results[1]


@pytest.mark.gpu
def test_fp16_on_a_gpu_scales_the_sum_of_all_terms(training_arguments):
    arguments = [training_arguments(f"{fp16}", max_steps=4, fp16=fp16, use_cpu=False) for fp16 in (False, True)]
    whole, half = (run(a) for a in arguments)
    assert half.accelerator.scaler is not None
    np.testing.assert_allclose(losses(half, "loss", "logit_kd"), losses(whole, "loss", "logit_kd"), rtol=0.05)
    assert np.isfinite(losses(half, "loss")).all()


# ---------------------------------------------------------------------- the same again


def test_full_determinism_gives_the_same_bits_twice(training_arguments):
    runs = []
    for number in range(2):
        arguments = training_arguments(f"{number}", max_steps=3, full_determinism=True, seed=7)
        student = tiny.bert(0, hidden_dropout_prob=0.2)
        try:
            runs.append(run(arguments, student=student))
        finally:
            torch.use_deterministic_algorithms(False)
    assert losses(runs[0], *NAMES) == losses(runs[1], *NAMES)
    assert_equal_weights(runs[0].model, runs[1].model)


@pytest.mark.parametrize("setting", ["seed", "data_seed"])
def test_seeds_decide_what_they_decide_in_trainer(training_arguments, setting):
    def trained(value, **kwargs):
        arguments = training_arguments("out", max_steps=3, **{"seed": 0, setting: value})
        student = tiny.bert(0, hidden_dropout_prob=0.2)
        trainer = make_trainer(arguments, [TaskLoss(), LogitKD(weight=0.0)], student, **kwargs)
        trainer.train()
        return np.array(losses(trainer, "loss"))

    ours = [trained(value) for value in (1, 2, 1)]
    assert (ours[0] == ours[2]).all()
    assert not np.allclose(ours[0], ours[1], rtol=1e-3)
    for value, result in zip((1, 2), ours, strict=False):
        np.testing.assert_allclose(result, trained(value, cls=Trainer), rtol=2e-4)


# ---------------------------------------------------------------------- compiled


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.8"), reason="PyTorch 2.7 compiles the collecting of ViT's attentions away"
)
def test_compiled_models_give_the_losses_of_eager_ones(training_arguments):
    """Hidden states of line 5 are collected by hooks, and those of another width are projected by one."""
    torch._dynamo.reset()
    results, compiled = [], []
    for compile_ in (False, True):
        kwargs = dict(torch_compile=True, torch_compile_backend="eager") if compile_ else {}
        student, teacher = tiny.vit(0, layers=1), tiny.vit(1, layers=2, hidden=48)
        trainer = make_trainer(
            training_arguments(f"{compile_}", max_steps=3, **kwargs), ALL_TERMS["sum"], student, teacher,
            train_dataset=tiny.image_dataset(), processing_class=None,
        )  # fmt: skip
        for name, model in (("student", student), ("teacher", teacher)):
            model.classifier.register_forward_pre_hook(
                lambda m, a, n=name: compiled.append(n) if torch.compiler.is_compiling() else None
            )
        trainer.train()
        assert set(compiled) == ({"student", "teacher"} if compile_ else set())
        results.append(losses(trainer, *NAMES))
    np.testing.assert_allclose(*results, rtol=1e-3)
    assert set(trainer.model.state_dict()) == set(tiny.vit(0, layers=1).state_dict())


# ---------------------------------------------------------------------- checkpointed activations


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("term", ["hidden", "attention"])
@pytest.mark.parametrize("settings", [None, False, True], ids=["default", "not reentrant", "reentrant"])
def test_checkpointed_activations_give_the_same_gradient_of_every_term(training_arguments, kind, term, settings):
    """Reentrant checkpointing, the default of line 4, detaches attentions: their term alone has no gradient then."""
    if term == "attention" and settings:
        pytest.skip("refused at construction, see test_trainer.py")
    gradients = []
    for checkpointing in (False, True):
        student = getattr(tiny, kind)(0)
        teacher = teacher_of() if kind == "bert" else tiny.llama(1, layers=4)
        arguments = {CHECKPOINTING: checkpointing}
        if settings is not None:
            arguments[f"{CHECKPOINTING}_kwargs"] = {"use_reentrant": settings}
        data = for_language_models() if kind == "llama" else {}
        found = {}

        class Keep(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, model=None, found=found, **kwargs):
                found.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

        trainer = make_trainer(
            training_arguments(f"{checkpointing}", max_steps=1, **arguments), ALL_TERMS[term], student, teacher,
            callbacks=[Keep()], **data,
        )  # fmt: skip
        trainer.train()
        assert student.is_gradient_checkpointing == checkpointing
        gradients.append(found)
    # What a term does not reach has no gradient, or one of 0 where layers are run again.
    whole, again = ({name: g for name, g in found.items() if g.any()} for found in gradients)
    assert whole
    assert whole.keys() == again.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_attentions_are_computed_though_the_student_came_with_sdpa(training_arguments):
    student, teacher = (tiny.vit(i, layers=2 + 2 * i) for i in range(2))
    assert student.config._attn_implementation == "sdpa"
    trainer = make_trainer(
        training_arguments(max_steps=3, learning_rate=1e-2), [AttentionKD()], student, teacher,
        train_dataset=tiny.image_dataset(), processing_class=None,
    )  # fmt: skip
    trainer.train()
    (first,), *_, (last,) = losses(trainer, "attention_kd")
    assert 0 < last < first


# ---------------------------------------------------------------------- noise and fused losses


@pytest.mark.parametrize("itself", [False, True], ids=["own teacher", "base as teacher"])
def test_embedding_noise_reaches_the_student_alone_and_goes_with_the_training(training_arguments, itself):
    student = tiny.llama(0)
    if itself:
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", modules_to_save=["lm_head"])
        student = peft.get_peft_model(student, config)
    teacher = student.get_base_model() if itself else tiny.llama(1, layers=4)
    seen = []

    def watch(student_out, teacher_out, batch):
        seen.append((batch, student_out.logits.detach(), teacher_out.logits))
        return student_out.logits.sum() * 0

    untouched = tiny.llama(0) if itself else tiny.llama(1, layers=4)
    arguments = training_arguments(max_steps=2, neftune_noise_alpha=50.0, learning_rate=0.0)
    make_trainer(arguments, [LogitKD(), watch], student, teacher, **for_language_models()).train()
    assert not student.get_input_embeddings()._forward_hooks
    for batch, ours, theirs in seen:
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        with torch.no_grad():
            torch.testing.assert_close(theirs, untouched(**inputs).logits)
            assert not torch.allclose(ours, student.eval()(**inputs).logits, atol=1e-2)


def fused(model):
    """Gives a model what liger-kernel gives causal LMs: no logits in training unless asked for."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, skip_logits=None, **kwargs):
        output = plain(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)
        skipped.append(skip_logits)
        if skip_logits or (skip_logits is None and self.training and labels is not None):
            output.logits = None
        return output

    plain, skipped = model.forward, []
    model.forward = types.MethodType(forward, model)
    assert "skip_logits" in inspect.signature(model.forward).parameters
    return model, skipped


class FusedFromHere(TrainerCallback):
    """The kernels are looked for before; here the model itself brings what they would."""

    def on_train_begin(self, args, state, control, **kwargs):
        args.use_liger_kernel = True


@pytest.mark.parametrize("needed", [True, False])
def test_a_fused_loss_that_skips_logits_is_told_whether_they_are_needed(training_arguments, needed):
    objectives = [TaskLoss(), LogitKD() if needed else HiddenStateKD()]
    results = []
    for name in ("plain", "fused"):
        student, skipped = (tiny.llama(0), []) if name == "plain" else fused(tiny.llama(0))
        callbacks = [FusedFromHere()] if name == "fused" else None
        trainer = make_trainer(
            training_arguments(name, max_steps=2), objectives, student, tiny.llama(1), callbacks=callbacks,
            **for_language_models(),
        )  # fmt: skip
        skipped.clear()
        trainer.train()
        results.append(losses(trainer, "loss", "grad_norm", "task_loss"))
    assert skipped == [not needed] * 2
    np.testing.assert_allclose(*results, rtol=1e-4)


@pytest.mark.gpu
def test_liger_kernels_train_on_the_same_terms(training_arguments):
    pytest.importorskip("liger_kernel")
    results = []
    for liger in (False, True):
        arguments = training_arguments(f"{liger}", max_steps=3, use_liger_kernel=liger, use_cpu=False)
        trainer = run(arguments, [TaskLoss(), LogitKD()], tiny.llama(0), tiny.llama(1), **for_language_models())
        results.append(losses(trainer, *NAMES[:4]))
    np.testing.assert_allclose(*results, rtol=1e-2)
