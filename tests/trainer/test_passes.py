# SPDX-License-Identifier: Apache-2.0
"""Objectives that run the models themselves: on noisy inputs, on the worst ones, and in full precision."""

import copy

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from hfkdq import AdversarialKD, CoTrainedTeacher, NoisyKD, QATCallback, QuantizationLoss, QuantizationSpec
from hfkdq.losses import forward_kl
from hfkdq.modeling.forwards import full_precision
from hfkdq.objectives import AttentionKD, HiddenStateKD, LogitKD, TaskLoss, TrainingStep
from hfkdq.objectives.perturbed import _Change
from hfkdq.quantization import prepare_qat_
from hfkdq.schedules import Linear
from tests import tiny

from .common import losses, make_trainer

SGD = dict(optim="sgd", learning_rate=0.0, max_grad_norm=0.0)


def first_batch(trainer):
    return {k: v for k, v in next(iter(trainer.get_train_dataloader())).items() if k != "labels"}


class Inputs(TrainerCallback):
    """What the models look up, or read, in every pass of a training."""

    def __init__(self, **models):
        self.seen = []
        for name, model in models.items():
            module = model if model.main_input_name != "input_ids" else model.bert.encoder
            module.register_forward_pre_hook(
                lambda m, args, kwargs, n=name: self.add(n, args, kwargs), with_kwargs=True
            )

    def add(self, name, args, kwargs):
        value = args[0] if args else kwargs.get("pixel_values", kwargs.get("hidden_states"))
        self.seen.append((name, value.detach().clone()))


# ------------------------------------------------------------------ noise


def test_noise_reaches_the_student_alone_and_is_as_large_as_asked(training_arguments):
    student, teacher = tiny.vit(0, layers=1), tiny.vit(1, layers=1)
    inputs = Inputs(student=student, teacher=teacher)
    trainer = make_trainer(
        training_arguments(max_steps=2, **SGD), [NoisyKD(std=0.5), LogitKD()], student, teacher,
        train_dataset=tiny.image_dataset(), eval_dataset=None, processing_class=None,
    )  # fmt: skip
    inputs.seen.clear()
    trainer.train()
    names = [name for name, _ in inputs.seen]
    assert names == ["student", "teacher", "student"] * 2  # noisy, then both as the batch is
    for step in (0, 3):
        noisy, clean, again = (value for _, value in inputs.seen[step : step + 3])
        torch.testing.assert_close(clean, again)
        noise = noisy - clean
        assert noise.std().item() == pytest.approx(0.5 * clean.std().item(), rel=0.1)
        assert abs(noise.mean().item()) < 0.1
    assert not torch.equal(inputs.seen[0][1] - inputs.seen[2][1], inputs.seen[3][1] - inputs.seen[5][1])
    noisy_kd, kd = losses(trainer, "noisy_kd", "logit_kd")[0]
    assert noisy_kd != kd


def test_the_noisy_term_is_that_of_the_noisy_student_and_the_clean_teacher(training_arguments):
    student, teacher = tiny.vit(0, layers=1), tiny.vit(1, layers=1)
    twin, inputs = copy.deepcopy(student), Inputs(student=student)
    trainer = make_trainer(
        training_arguments(max_steps=1), [NoisyKD(objective=LogitKD(temperature=3.0)), LogitKD()], student, teacher,
        train_dataset=tiny.image_dataset(), eval_dataset=None, processing_class=None,
    )  # fmt: skip
    inputs.seen.clear()
    trainer.train()
    noisy, clean = (value for _, value in inputs.seen)
    expected = forward_kl(twin(noisy).logits, teacher(clean).logits, 3.0).mean().item()
    assert losses(trainer, "noisy_kd")[0][0] == pytest.approx(expected, rel=1e-4)


def test_embeddings_get_noise_where_a_model_reads_tokens(training_arguments):
    trainer = make_trainer(training_arguments(max_steps=2), [NoisyKD(std=1.0), LogitKD()], tiny.bert(0), tiny.bert(0))
    trainer.train()
    (noisy, clean), *_ = losses(trainer, "noisy_kd", "logit_kd")
    assert noisy > 0.01
    assert clean < 1e-5
    hooks = trainer.model.get_input_embeddings()._forward_hooks
    assert not hooks


def test_tokens_are_replaced_but_neither_padding_nor_the_first_nor_special_ones():
    student = tiny.bert(0)
    student.config.sep_token_id = 3
    objective = NoisyKD(kind="tokens", probability=1.0, token_id=4)
    objective.attach(student, tiny.bert(1))
    ids = torch.tensor([[2, 10, 11, 3, 0, 0], [0, 2, 12, 13, 14, 3]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]])
    replaced = objective._replaced({"input_ids": ids, "attention_mask": mask}, student.config)
    assert replaced.tolist() == [[2, 4, 4, 3, 0, 0], [0, 2, 4, 4, 4, 3]]
    some = NoisyKD(kind="tokens", probability=0.5)
    many = torch.full((100, 50), 10)
    changed = (some._replaced({"input_ids": many}, student.config) != many).float().mean().item()
    assert changed == pytest.approx(0.5 * (1 - 1 / student.config.vocab_size), abs=0.03)


def test_hidden_states_of_a_noisy_student_go_through_their_projections(training_arguments):
    trainer = make_trainer(
        training_arguments(max_steps=3), [NoisyKD(objective=HiddenStateKD(), std=0.3)], teacher=tiny.bert(1, hidden=48)
    )
    trainer.train()
    values = [row[0] for row in losses(trainer, "noisy_kd")]
    assert values[0] != values[-1]
    assert trainer._distillation.projections is not None
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in trainer._distillation.projections.parameters())


# ------------------------------------------------------------------ adversaries


@pytest.mark.parametrize("steps", [1, 3])
def test_both_models_read_the_worst_input_within_reach(training_arguments, steps):
    student, teacher = tiny.vit(0, layers=1), tiny.vit(1, layers=1)
    twin, inputs = copy.deepcopy(student), Inputs(student=student, teacher=teacher)
    trainer = make_trainer(
        training_arguments(max_steps=1), [AdversarialKD(epsilon=0.05, steps=steps), LogitKD()], student, teacher,
        train_dataset=tiny.image_dataset(), eval_dataset=None, processing_class=None,
    )  # fmt: skip
    inputs.seen.clear()
    trainer.train()
    names = [name for name, _ in inputs.seen]
    # The teacher's answer, the student's gradients, then both on what came of them, then the batch as it is.
    assert names == ["teacher", *["student"] * steps, "teacher", "student", "teacher", "student"]
    clean = inputs.seen[0][1]
    worst = inputs.seen[steps + 1][1]
    torch.testing.assert_close(worst, inputs.seen[steps + 2][1])
    lengths, reach = (worst - clean).flatten(1).norm(dim=1), 0.05 * clean.flatten(1).norm(dim=1)
    assert (lengths <= reach * 1.001).all()
    if steps == 1:  # a whole step along the gradient of every example
        x = clean.clone().requires_grad_()
        forward_kl(twin(x).logits, teacher(clean).logits.detach(), 2.0).sum().backward()
        unit = x.grad / x.grad.flatten(1).norm(dim=1)[:, None, None, None]
        torch.testing.assert_close(worst, clean + reach[:, None, None, None] * unit, rtol=1e-3, atol=1e-4)
    adversarial, kd = losses(trainer, "adversarial_kd", "logit_kd")[0]
    expected = forward_kl(twin(worst).logits, teacher(worst).logits, 2.0).mean().item()
    assert adversarial == pytest.approx(expected, rel=1e-3)
    assert adversarial > kd
    assert all(p.grad is None for p in teacher.parameters())


def test_embeddings_are_changed_where_models_read_tokens(training_arguments):
    trainer = make_trainer(
        training_arguments(max_steps=2, **SGD), [AdversarialKD(epsilon=0.5), LogitKD()], tiny.bert(0), tiny.bert(1)
    )
    trainer.train()
    for adversarial, kd in losses(trainer, "adversarial_kd", "logit_kd"):
        assert adversarial > kd


class BarePasses:
    """Both models without a trainer around them."""

    def __init__(self, student, teacher):
        self.model, self.teacher_model = student, teacher

    def student(self, batch, needs=None, indices=None):
        return self.model(**batch)

    @torch.no_grad()
    def teacher(self, batch, needs=None, indices=None):
        return self.teacher_model(**batch)


@pytest.mark.parametrize("scale", [0.1, 30.0])
def test_the_worst_change_is_relative_to_the_embeddings_of_a_text(scale):
    student, teacher, seen = tiny.bert(0), tiny.bert(1), []
    with torch.no_grad():
        for model in (student, teacher):
            model.get_input_embeddings().weight *= scale
            model.get_input_embeddings().weight[0] = 100.0 * scale  # padding does not count
    objective, batch = AdversarialKD(epsilon=0.03), tiny.batch(student)
    objective.attach(student, teacher)
    embeddings = student.get_input_embeddings()(batch["input_ids"]) * batch["attention_mask"].unsqueeze(-1)
    student.bert.embeddings.LayerNorm.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    objective.run_forward(BarePasses(student, teacher), TrainingStep(batch))
    change = (seen[-1] - seen[0]).flatten(1).norm(dim=1)
    torch.testing.assert_close(change, 0.03 * embeddings.detach().flatten(1).norm(dim=1), rtol=1e-3, atol=0.0)


def test_an_encoder_decoder_looks_up_its_embeddings_twice():
    model = tiny.t5(0)
    ids = torch.randint(5, 90, (2, 5))
    change = _Change(torch.zeros_like, requires_grad=True)
    with change.of(model, {"input_ids": ids}) as batch:
        out = model(**batch, decoder_input_ids=ids)
    assert len(change.deltas) == 2
    gradients = torch.autograd.grad(out.logits.square().sum(), change.deltas)
    assert all(g.abs().sum() > 0 for g in gradients)


# ------------------------------------------------------------------ quantization loss


def test_full_precision_is_that_of_the_plain_model_and_moves_no_range():
    plain, model = tiny.bert(0), prepare_qat_(tiny.bert(0), QuantizationSpec())
    batch = tiny.batch(plain)
    model.train()(**batch)
    model.eval()
    quantized = model(**batch).logits
    with full_precision(model):
        torch.testing.assert_close(model(**batch).logits, plain(**batch).logits)
        model.train()(**{**batch, "input_ids": batch["input_ids"].flip(0)})
    torch.testing.assert_close(model.eval()(**batch).logits, quantized)
    assert not torch.equal(quantized, plain(**batch).logits)


def test_the_distance_is_that_of_the_quantizers_alone(training_arguments):
    """With the same dropout in both passes; without fake quantizers it is 0."""
    student = tiny.bert(0, hidden_dropout_prob=0.3)
    nothing = make_trainer(training_arguments(max_steps=2), [TaskLoss(), QuantizationLoss(), NoisyKD()], student)
    nothing.train()
    assert max(row[0] for row in losses(nothing, "quantization_loss")) < 1e-6
    student = tiny.bert(0, hidden_dropout_prob=0.3)
    trainer = make_trainer(
        training_arguments(max_steps=2), [TaskLoss(), QuantizationLoss(objective=LogitKD(divergence="mse"))], student,
        teacher=None, callbacks=[QATCallback(QuantizationSpec())],
    )  # fmt: skip
    trainer.train()
    for (value,) in losses(trainer, "quantization_loss"):
        assert 1e-7 < value < 0.05  # two dropouts of 0.3 would be some 1.0 apart


def test_the_quantization_loss_pulls_the_quantized_student_to_its_full_precision(training_arguments):
    def distance(weight):
        # At 8 bits rounding is so little that it is the order of sums which decides; here it shrinks to a third at most.
        spec = QuantizationSpec(activation_bits=None, weight_bits=4)
        trainer = make_trainer(
            training_arguments(max_steps=20, learning_rate=3e-3),
            [TaskLoss(), QuantizationLoss(objective=LogitKD(divergence="mse"), weight=weight)], tiny.bert(0), teacher=None,
            callbacks=[QATCallback(spec)],
        )  # fmt: skip
        trainer.train()
        return sum(row[0] for row in losses(trainer, "quantization_loss")[-10:])

    assert distance(1000.0) < distance(0.0)


def test_from_hard_labels_to_soft_labels_with_quantization_faded_in(training_arguments):
    """Progressive distillation: the weights of all three terms move, and every part has its say."""
    terms = [
        TaskLoss(weight=Linear(1, 0)), LogitKD(weight=Linear(0, 1)),
        QuantizationLoss(objective=LogitKD(divergence="mse"), weight=Linear(0, 2, begin=0.5)),
    ]  # fmt: skip
    trainer = make_trainer(
        training_arguments(max_steps=10), terms, tiny.bert(0), tiny.bert(1, hidden=48),
        callbacks=[QATCallback(QuantizationSpec())],
    )  # fmt: skip
    trainer.train()
    rows = losses(trainer, "loss", "task_loss", "logit_kd", "quantization_loss")
    for step, (loss, task, kd, quantization) in enumerate(rows):
        p = step / 10
        expected = (1 - p) * task + p * kd + 2 * max(0.0, (p - 0.5) / 0.5) * quantization
        assert loss == pytest.approx(expected, rel=2e-3, abs=2e-4)
    assert all(row[3] > 0 for row in rows)


# ------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NoisyKD(kind="salt"), "kind must be"),
        (lambda: NoisyKD(std=0), "std must be"),
        (lambda: NoisyKD(kind="tokens", probability=0), "probability must be"),
        (lambda: NoisyKD(objective=TaskLoss()), "must compare with a teacher"),
        (lambda: NoisyKD(objective=NoisyKD()), "on passes of its own"),
        (lambda: NoisyKD(objective=LogitKD(teacher="x")), "goes to the outer"),
        (lambda: AdversarialKD(epsilon=0), "epsilon and step_size"),
        (lambda: AdversarialKD(steps=0), "steps at least 1"),
        (lambda: QuantizationLoss(teacher="x"), "learns from no teacher"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("objective", "student", "teacher", "message"),
    [
        (NoisyKD(kind="tokens"), tiny.vit, tiny.vit, "reads pixel_values"),
        (AdversarialKD(), tiny.bert, lambda: tiny.bert(1, hidden=48), "32 and 48 wide"),
        (NoisyKD(objective=HiddenStateKD(layers={9: 1})), tiny.bert, tiny.bert, "out of range"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(objective, student, teacher, message):
    with pytest.raises(ValueError, match=message):
        objective.attach(student(), teacher())


def test_sharded_students_take_no_passes_of_their_own(training_arguments):
    args = training_arguments()
    trainer = nn.Module()
    trainer.args, trainer.model = args, tiny.bert()
    trainer.is_fsdp_enabled, trainer.is_deepspeed_enabled = False, True
    trainer.accelerator = type("A", (), {"is_fsdp2": True})()
    from hfkdq.trainer.arguments import refuse_unsupported

    with pytest.raises(NotImplementedError, match="NoisyKD does not work where"):
        refuse_unsupported(trainer, [NoisyKD()], [])


def test_attention_maps_of_a_noisy_student(training_arguments):
    trainer = make_trainer(
        training_arguments(max_steps=1), [NoisyKD(objective=AttentionKD()), AttentionKD()], tiny.bert(0), tiny.bert(1)
    )
    trainer.train()
    noisy, clean = losses(trainer, "noisy_kd", "attention_kd")[0]
    assert noisy != clean


class Repeating(LogitKD):
    """An objective of a user's own that runs both models once more."""

    def run_forward(self, passes, step):
        return TrainingStep(step.batch, student=passes.student(step.batch), teacher=passes.teacher(step.batch))


EXTRA = {
    "noisy": ([NoisyKD(weight=1e-9)], False),
    "quantization": ([QuantizationLoss(weight=1e-9)], True),
    "adversarial": ([AdversarialKD(weight=1e-9, steps=2)], False),
    "own": ([Repeating(weight=1e-9)], False),
}


@pytest.mark.parametrize("name", EXTRA)
@pytest.mark.parametrize("teacher_learns", [False, True])
def test_passes_of_their_own_leave_running_statistics_alone(name, teacher_learns, training_arguments):
    extra, quantized = EXTRA[name]

    def statistics(objectives):
        torch.manual_seed(0)
        student, teacher = tiny.resnet(0), tiny.resnet(1)
        trainer = make_trainer(
            training_arguments(max_steps=1, learning_rate=0.0), [TaskLoss(), LogitKD(), *objectives], student,
            CoTrainedTeacher(teacher) if teacher_learns else teacher, train_dataset=tiny.image_dataset(), eval_dataset=None,
            processing_class=None, callbacks=[QATCallback(QuantizationSpec())] if quantized else [],
        )  # fmt: skip
        trainer.train()
        models = student, teacher
        return [b.clone() for m in models for n, b in m.named_buffers() if "running" in n or "tracked" in n]

    found, expected = statistics(extra), statistics([])
    assert len(found) == len(expected) > 2
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert max(int(b) for b in found if not b.is_floating_point()) == 1


def test_a_pair_in_the_place_of_a_mean_is_refused_with_advice(training_arguments):
    def pair(student_out, teacher_out, batch):
        return (student_out.logits - teacher_out.logits).abs().mean(), 4

    trainer = make_trainer(training_arguments(max_steps=1), [TaskLoss(), pair], tiny.bert(0), tiny.bert(1))
    with pytest.raises(TypeError, match=r"pair gave a tuple .* Return the mean alone; positions\(batch\) tells"):
        trainer.train()
