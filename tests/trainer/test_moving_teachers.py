# SPDX-License-Identifier: Apache-2.0
"""Several teachers, the student's own moving average, and peers that learn along."""

import copy

import pytest
import torch
from transformers import AutoModelForSequenceClassification, Trainer

from hfkdq import (
    CoTrainedTeacher,
    EMATeacher,
    EnsembleKD,
    PruningCallback,
    PruningSpec,
    QATCallback,
    QuantizationSpec,
    quantize,
)
from hfkdq.losses import forward_kl
from hfkdq.objectives import ByAgreement, ByGradientNorm, HiddenStateKD, LogitKD, NoisyKD, TaskLoss
from hfkdq.quantization.records import quantizer_states
from hfkdq.schedules import Linear
from hfkdq.teachers.cotrained import PeerParameters
from hfkdq.trainer import DistillationTrainer
from tests import tiny

from .common import StopAt, assert_equal_weights, losses, make_trainer, weights

SGD = dict(optim="sgd", learning_rate=0.1, max_grad_norm=0.0, lr_scheduler_type="constant")


def first_batch(trainer):
    return next(iter(trainer.get_train_dataloader()))


def outputs(model, batch):
    return model(**{k: v for k, v in batch.items() if k != "labels"})


# ------------------------------------------------------------------ several teachers


def test_each_objective_learns_from_the_teacher_that_it_names(training_arguments):
    large, small = tiny.bert(1, layers=4), tiny.bert(2, hidden=16)
    objectives = [LogitKD(teacher="large"), LogitKD(teacher="small", temperature=1.0), HiddenStateKD(teacher="small")]
    student = tiny.bert(0)
    trainer = make_trainer(
        training_arguments(max_steps=1), objectives, copy.deepcopy(student), {"large": large, "small": small}
    )
    batch = first_batch(trainer)
    trainer.train()
    (row,) = losses(trainer, "logit_kd", "logit_kd_2", "hidden_state_kd")
    ours, theirs, others = (outputs(m, batch).logits for m in (student, large, small))
    assert row[0] == pytest.approx(forward_kl(ours, theirs, 2.0).mean().item(), rel=1e-4)
    assert row[1] == pytest.approx(forward_kl(ours, others, 1.0).mean().item(), rel=1e-4)
    assert row[2] > 0
    assert trainer.model.config.hfkdq["distillation"]["teacher"] == ", ".join(["BertForSequenceClassification"] * 2)
    assert set(trainer.teacher_model) == {"large", "small"}


@pytest.mark.parametrize("weighting", ["confidence", "mean"])
@pytest.mark.parametrize("labelled", [True, False])
def test_an_ensemble_weighs_its_teachers_example_by_example(weighting, labelled):
    student, *teachers = (tiny.bert(s) for s in range(4))
    named = {f"t{i}": model for i, model in enumerate(teachers)}
    objective = EnsembleKD(weighting=weighting)
    objective.attach(student, named)
    batch = tiny.batch(student)
    labels = {"labels": torch.tensor([0, 1, 2, 0])} if labelled else {}
    outs = {name: model(**batch) for name, model in named.items()}
    mean = objective(student(**batch), outs, {**batch, **labels})
    count = objective.positions({**batch, **labels})
    expected = []
    for row in range(4):
        costs, distances = [], []
        for out in outs.values():
            p = out.logits[row].softmax(-1)
            cost = -p[labels["labels"][row]].log() if labelled else -(p * p.log()).sum()
            costs.append(cost)
            distances.append(forward_kl(student(**batch).logits[row], out.logits[row], 2.0))
        total = sum(c.exp() for c in costs)
        for cost, distance in zip(costs, distances, strict=True):
            weight = (1 - cost.exp() / total) / 2 if weighting == "confidence" else 1 / 3
            expected.append(weight * distance)
    torch.testing.assert_close(mean, sum(expected) / 4)
    assert count == 4


@pytest.mark.parametrize(
    ("teacher", "objectives", "error", "message"),
    [
        ({"a": 1, "b": 2}, [LogitKD()], ValueError, "does not say which"),
        ({"a": 1, "b": 2}, [LogitKD(teacher="c")], ValueError, "which is not there. The teachers are: a, b"),
        (1, [LogitKD(teacher="c")], ValueError, "which is not there"),
        ({}, [LogitKD()], ValueError, "teachers need names"),
        ({"student": 1}, [LogitKD()], ValueError, "teachers need names"),
        ({"not a name": 1}, [LogitKD()], ValueError, "teachers need names"),
        ({"a": 1}, [EnsembleKD()], ValueError, "two teachers or more"),
        ({"a": 1, "b": 2}, [EnsembleKD(teachers=["a", "z"])], ValueError, "there is no z"),
        ({"a": "x", "b": 3.5}, [EnsembleKD()], TypeError, "dict of such by name, got float"),
        (1, [LogitKD(weight=ByGradientNorm())], ValueError, "Add TaskLoss"),
        (1, [TaskLoss(), HiddenStateKD(weight=ByAgreement())], ValueError, "weight for LogitKD"),
        (None, [LogitKD()], ValueError, "cache_teacher_outputs"),
    ],
)
def test_teachers_that_are_not_there_are_refused(training_arguments, teacher, objectives, error, message):
    def model(value):
        return tiny.bert(value) if isinstance(value, int) else value

    teacher = {k: model(v) for k, v in teacher.items()} if isinstance(teacher, dict) else model(teacher)
    with pytest.raises(error, match=message):
        make_trainer(training_arguments(), objectives, teacher=teacher)


# ------------------------------------------------------------------ the moving average of the student


def test_the_average_follows_the_student_after_every_step(training_arguments):
    seen = []

    class Watch(StopAt):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append({name: p.detach().clone() for name, p in model.named_parameters()})

    student = tiny.bert(0)
    start = {name: p.detach().clone() for name, p in student.named_parameters()}
    arguments = training_arguments(max_steps=4, **SGD)
    trainer = make_trainer(
        arguments, [TaskLoss(), LogitKD()], student, EMATeacher(decay=Linear(0.5, 0.9)), callbacks=[Watch(0)]
    )
    trainer.train()
    average = start
    for step, now in enumerate(seen, start=1):
        decay = 0.5 + 0.4 * step / 4
        average = {name: decay * average[name] + (1 - decay) * now[name] for name in average}
    for name, parameter in trainer.teacher_model.named_parameters():
        torch.testing.assert_close(parameter, average[name], rtol=1e-4, atol=1e-6)
    kd = [row[0] for row in losses(trainer, "logit_kd")]
    assert kd[0] == 0  # it starts as the student is
    assert min(kd[1:]) > 0


def test_an_average_that_forgets_all_is_the_student_itself(training_arguments):
    trainer = make_trainer(
        training_arguments(max_steps=3, **SGD), [TaskLoss(), LogitKD()], teacher=EMATeacher(decay=0.0)
    )
    trainer.train()
    assert_equal_weights(trainer.teacher_model, trainer.model)
    assert max(row[0] for row in losses(trainer, "logit_kd")) < 1e-6


def test_a_pruned_and_quantized_student_can_teach_itself(training_arguments):
    trainer = make_trainer(
        training_arguments(max_steps=6), [TaskLoss(), LogitKD(), HiddenStateKD()], teacher=EMATeacher(decay=0.9),
        callbacks=[PruningCallback(PruningSpec(sparsity=0.5, structure="weight")), QATCallback(QuantizationSpec())],
    )  # fmt: skip
    trainer.train()
    assert all(torch.isfinite(p).all() for p in trainer.teacher_model.parameters())
    assert losses(trainer, "logit_kd")[-1][0] > 0


# ------------------------------------------------------------------ peers


def test_both_learn_from_the_labels_and_from_each_other(training_arguments):
    """One step against the same losses and updates by hand."""
    student, peer = tiny.bert(0), tiny.bert(1, layers=3, hidden=48)
    twins = copy.deepcopy(student), copy.deepcopy(peer)
    objectives = [TaskLoss(), LogitKD(temperature=1.0, weight=0.5)]
    trainer = make_trainer(training_arguments(max_steps=1, **SGD), objectives, student, CoTrainedTeacher(peer))
    batch = first_batch(trainer)
    trainer.train()
    for model in twins:
        model.train()
    outs = [model(**batch) for model in twins]
    kd = [forward_kl(outs[i].logits, outs[1 - i].logits.detach()).mean() for i in (0, 1)]
    logged = losses(trainer, "task_loss", "logit_kd", "teacher_task_loss", "teacher_logit_kd", "loss")[0]
    parts = [outs[0].loss, kd[0], outs[1].loss, kd[1]]
    assert logged[:4] == pytest.approx([p.item() for p in parts], rel=1e-3)
    total = parts[0] + 0.5 * parts[1] + parts[2] + parts[3]
    assert logged[4] == pytest.approx(total.item(), rel=1e-3)
    total.backward()
    for model, twin in zip((student, peer), twins, strict=True):
        with torch.no_grad():
            for p in twin.parameters():
                p.sub_(0.1 * p.grad if p.grad is not None else 0.0)
        assert_equal_weights(model, twin, rtol=1e-4, atol=1e-6)


def test_both_can_be_saved_and_the_student_keeps_no_trace(training_arguments, tmp_path):
    student, peer = tiny.bert(0), tiny.bert(1, hidden=48)
    keys = set(student.state_dict())
    trainer = make_trainer(
        training_arguments(max_steps=4, save_strategy="steps", save_steps=2),
        [TaskLoss(), LogitKD(), HiddenStateKD()], student,
        CoTrainedTeacher(peer, [TaskLoss(), LogitKD(), HiddenStateKD(weight=0.1)]),
    )  # fmt: skip
    trainer.train()
    assert not hasattr(student, PeerParameters.NAME)
    assert not peer.training
    assert set(student.state_dict()) == keys
    trainer.save_model(str(tmp_path / "student"))
    trainer.teacher_model.save_pretrained(tmp_path / "peer")
    for folder, model in (("student", student), ("peer", peer)):
        loaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert_equal_weights(loaded, model)
    assert type(loaded) is type(peer)


def test_what_looks_for_layers_does_not_find_the_peers(training_arguments):
    student, peer = tiny.bert(0), tiny.bert(1)
    trainer = make_trainer(
        training_arguments(max_steps=6), [TaskLoss(), LogitKD()], student, CoTrainedTeacher(peer),
        callbacks=[PruningCallback(PruningSpec(sparsity=0.5, structure="neuron")), QATCallback(QuantizationSpec(), )],
    )  # fmt: skip
    trainer.train()
    assert student.config.intermediate_size == 32
    assert peer.config.intermediate_size == 64
    assert {type(m).__name__ for m in peer.modules() if "Linear" in type(m).__name__} == {"Linear"}


def test_peers_need_a_student_that_stays(training_arguments):
    with pytest.raises(ValueError, match="a peer would not start anew"):
        DistillationTrainer(
            args=training_arguments(), model_init=lambda: tiny.bert(0), teacher_model=CoTrainedTeacher(tiny.bert(1)),
            objectives=[LogitKD()],
        )  # fmt: skip


@pytest.mark.parametrize("objectives", [[], [NoisyKD()], [LogitKD(teacher="x")], [EnsembleKD()]])
def test_a_peer_learns_from_the_student_alone(training_arguments, objectives):
    with pytest.raises(ValueError, match="compare it with the student alone"):
        make_trainer(training_arguments(), [LogitKD()], teacher=CoTrainedTeacher(tiny.bert(1), objectives))


# ------------------------------------------------------------------ resuming, evaluating


TEACHERS = {
    "average": lambda: EMATeacher(decay=0.8),
    "peer": lambda: CoTrainedTeacher(tiny.bert(1, hidden=48), [TaskLoss(), LogitKD(), HiddenStateKD()]),
    "both": lambda: {"mean": EMATeacher(decay=0.8), "peer": CoTrainedTeacher(tiny.bert(1, hidden=48))},
    "frozen": lambda: tiny.bert(1, hidden=48),
}


def terms(kind):
    if kind == "both":
        return [TaskLoss(), LogitKD(teacher="mean"), LogitKD(teacher="peer"), HiddenStateKD(teacher="peer")]
    adaptive = [LogitKD(weight=ByAgreement()), HiddenStateKD(weight=ByGradientNorm(every=2)), NoisyKD(std=0.5)]
    return [TaskLoss(), *(adaptive if kind == "frozen" else [LogitKD(), HiddenStateKD()])]


@pytest.mark.parametrize("kind", TEACHERS)
def test_a_training_that_stops_goes_on_as_if_it_had_not(training_arguments, kind):
    settings = dict(max_steps=6, save_strategy="steps", save_steps=3, gradient_accumulation_steps=2, logging_steps=2)

    def run(folder, **kwargs):
        student = tiny.bert(0, hidden_dropout_prob=0.1)
        return make_trainer(
            training_arguments(folder, per_device_train_batch_size=4, **settings), terms(kind), student, TEACHERS[kind](),
            **kwargs,
        )  # fmt: skip

    whole = run("whole")
    whole.train()
    run("cut", callbacks=[StopAt(3)]).train()
    resumed = run("cut")
    resumed.train(resume_from_checkpoint=True)
    assert_equal_weights(resumed.model, whole.model)
    if kind != "frozen":
        models = [t.teacher_model if kind != "both" else t.teacher_model["mean"] for t in (whole, resumed)]
        assert_equal_weights(*models)
    rows = [{k: v for k, v in r.items() if k not in ("epoch",)} for r in whole.state.log_history if "loss" in r]
    again = [{k: v for k, v in r.items() if k not in ("epoch",)} for r in resumed.state.log_history if "loss" in r]
    assert rows == again


def test_evaluation_is_that_of_the_plain_trainer(training_arguments):
    for teacher in (EMATeacher(), CoTrainedTeacher(tiny.bert(1))):
        ours = make_trainer(training_arguments(), [TaskLoss(), LogitKD()], tiny.bert(0), teacher).evaluate()
        plain = make_trainer(training_arguments(), student=tiny.bert(0), cls=Trainer).evaluate()
        assert ours["eval_loss"] == plain["eval_loss"]


# ------------------------------------------------------------------ weights that adapt


def test_a_weight_follows_the_agreement_of_the_steps_before(training_arguments):
    student, teacher = tiny.bert(0), tiny.bert(1)
    weight = ByAgreement(low=0.5, high=2.0, momentum=0.0)
    trainer = make_trainer(
        training_arguments(max_steps=3, per_device_train_batch_size=8, gradient_accumulation_steps=2, **SGD),
        [LogitKD(weight=weight)], student, teacher,
    )  # fmt: skip
    agreements, used = [], []

    class Watch(StopAt):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            used.append(trainer.objectives[0].weight(0.0))

    measured = trainer.objectives[0].weight.measured

    def watched(objective, step):
        agree = step.student.logits.argmax(-1) == step.teacher.logits.argmax(-1)
        agreements.append(agree.float().mean().item())
        return measured(objective, step)

    object.__setattr__(trainer.objectives[0].weight, "measured", watched)
    trainer.add_callback(Watch(0))
    trainer.train()
    per_step = [sum(agreements[:2]) / 2, agreements[2]]  # the second window of an epoch of 3 batches is a short one
    assert used[0] == 2.0
    assert used[1:] == pytest.approx([0.5 + 1.5 * (1 - a) for a in per_step])
    assert weight._known is None  # the user's own object is left alone


def test_a_weight_balances_the_gradients(training_arguments):
    student, teacher = tiny.bert(0), tiny.bert(1)
    twin = copy.deepcopy(student).train()
    weight = ByGradientNorm(ratio=0.5, every=1, momentum=0.0)
    trainer = make_trainer(
        training_arguments(max_steps=2, **SGD),
        [TaskLoss(), LogitKD(weight=weight)],
        student,
        teacher,
        callbacks=[StopAt(1)],
    )
    batch = first_batch(trainer)
    trainer.train()
    trainer._distillation.weighting.adapt(trainer.accelerator)
    out = twin(**batch)
    norms = []
    for value in (out.loss, forward_kl(out.logits, outputs(teacher, batch).logits, 2.0).mean()):
        twin.zero_grad()
        value.backward(retain_graph=True)
        norms.append(torch.stack([p.grad.norm() for p in twin.parameters() if p.grad is not None]).norm().item())
    assert trainer.objectives[1].weight(0.0) == pytest.approx(0.5 * norms[0] / norms[1], rel=1e-3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: EMATeacher(decay=1.5), lambda: EMATeacher(decay=-0.1), lambda: ByAgreement(low=-1),
        lambda: ByAgreement(momentum=1.0), lambda: ByGradientNorm(ratio=0), lambda: ByGradientNorm(every=0),
        lambda: EnsembleKD(weighting="best"), lambda: EnsembleKD(objective=HiddenStateKD()), lambda: TaskLoss(teacher="x"),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(make):
    with pytest.raises(ValueError, match=r"must|learns from no teacher"):
        make()


def test_teachers_leave_the_weights_of_frozen_models_alone(training_arguments):
    large, small = tiny.bert(1), tiny.bert(2)
    before = weights(large), weights(small)
    make_trainer(training_arguments(max_steps=2), [EnsembleKD()], teacher={"large": large, "small": small}).train()
    for model, state in zip((large, small), before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_teacher_may_be_fake_quantized(training_arguments):
    teacher = tiny.bert(1, layers=4)
    plain = copy.deepcopy(teacher)
    quantize(teacher, QuantizationSpec(), calibration=[tiny.batch(teacher, seed=s) for s in range(3)])
    states = quantizer_states(teacher)
    student = tiny.bert(0)
    trainer = make_trainer(training_arguments(max_steps=2), [LogitKD()], copy.deepcopy(student), teacher)
    batch = first_batch(trainer)
    trainer.train()
    values = [
        forward_kl(outputs(student, batch).logits, outputs(m, batch).logits, 2.0).mean().item()
        for m in (teacher, plain)
    ]
    assert losses(trainer, "logit_kd")[0][0] == pytest.approx(values[0], rel=1e-4)
    assert values[0] != pytest.approx(values[1], rel=1e-4)
    assert str(quantizer_states(teacher)) == str(states)
