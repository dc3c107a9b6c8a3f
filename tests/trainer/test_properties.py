# SPDX-License-Identifier: Apache-2.0
"""What every objective has in common, seen through the trainer: one step, and the term as it was logged."""

import copy

import pytest
import torch
from transformers import DataCollatorWithPadding

from hfkdq import (
    CRD,
    RKD,
    VID,
    AdversarialKD,
    AttentionKD,
    HiddenStateKD,
    LogitKD,
    NoisyKD,
    QuantizationLoss,
    RelationKD,
    SimilarityPreservingKD,
)
from hfkdq.losses import DIVERGENCES
from hfkdq.schedules import BottomUp
from tests import tiny

from .common import losses, make_trainer, weights

LOGITS = {f"logits {name}": LogitKD(divergence=name) for name in DIVERGENCES}
STATES = {
    f"states {distance}": HiddenStateKD(distance=distance) for distance in ("mse", "cosine", "normalized_mse")
} | {
    "states nearest": HiddenStateKD(layers="dynamic"),
    "states last": HiddenStateKD(layers="last", embeddings=True),
    "states staged": HiddenStateKD(active=BottomUp()),
}
OBJECTIVES = {
    **LOGITS,
    **STATES,
    "standardised": LogitKD(standardize=True),
    "attention kl": AttentionKD(),
    "attention mse": AttentionKD(distance="mse"),
    "relations": RelationKD(),
    "rkd": RKD(),
    "similarities": SimilarityPreservingKD(),
    "crd": CRD(),
    "vid": VID(),
    "adversary": AdversarialKD(),
    "quantization": QuantizationLoss(),
}


def trained(training_arguments, objective, student, teacher, **kwargs):
    settings = dict(optim="sgd", learning_rate=0.1, max_grad_norm=0.0, max_steps=1, per_device_train_batch_size=8)
    settings.update(kwargs.pop("arguments", {}))
    trainer = make_trainer(training_arguments(**settings), [objective], student, teacher, **kwargs)
    trainer.train()
    ((value,),) = losses(trainer, trainer._distillation.terms[0].name)
    return trainer, value


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_student_like_its_teacher_has_nothing_to_learn(training_arguments, name):
    teacher = tiny.bert(1)
    _, value = trained(training_arguments, OBJECTIVES[name], copy.deepcopy(teacher), teacher)
    _, other = trained(training_arguments, OBJECTIVES[name], tiny.bert(0), teacher)
    if name == "quantization":  # there are no fake quantizers in either
        assert value == other == 0
    elif name in ("vid", "crd"):  # a learned map that is not the identity yet
        assert value > 0
    elif name == "logits soft_ce":  # the entropy of the teacher
        assert 0 < value < other
    else:
        assert abs(value) < 2e-5 < other


@pytest.mark.parametrize("name", OBJECTIVES)
def test_padding_changes_no_value(training_arguments, name):
    values = []
    for multiple in (None, 32):
        collator = DataCollatorWithPadding(tiny.tokenizer(), pad_to_multiple_of=multiple)
        values.append(
            trained(training_arguments, OBJECTIVES[name], tiny.bert(0), tiny.bert(1), data_collator=collator)[1]
        )
    assert values[0] == pytest.approx(values[1], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "quantization"])
def test_the_gradient_reaches_the_student_and_its_projections_alone(training_arguments, name):
    width = {} if name == "adversary" else {"hidden": 48}
    student, teacher = tiny.bert(0), tiny.bert(1, **width)
    before, fixed = weights(student), weights(teacher)
    settings = dict(optim="sgd", learning_rate=0.1, max_grad_norm=0.0, max_steps=1)
    trainer = make_trainer(training_arguments(**settings), [OBJECTIVES[name]], student, teacher)
    projections = (
        [] if trainer._distillation.projections is None else list(trainer._distillation.projections.parameters())
    )
    moved = [(parameter, parameter.detach().clone()) for parameter in projections]
    trainer.train()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(value, fixed[key]) for key, value in teacher.state_dict().items())
    assert any(not torch.equal(value, before[key]) for key, value in student.state_dict().items())
    learns = name.startswith("states") or name in ("crd", "vid")
    assert bool(moved) == learns
    # A later stage's projection waits for it; all others move at once.
    changed = [not torch.equal(parameter, old) for parameter, old in moved]
    assert all(changed) or (name == "states staged" and any(changed))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_bfloat16_agrees_with_float32(training_arguments, name):
    values = [
        trained(training_arguments, OBJECTIVES[name], tiny.bert(0), tiny.bert(1), arguments=dict(bf16=half))[1]
        for half in (False, True)
    ]
    assert values[0] == pytest.approx(values[1], rel=0.1, abs=1e-3)


def test_noise_differs_from_step_to_step_but_not_from_run_to_run(training_arguments):
    runs = []
    for _ in range(2):
        trainer = make_trainer(
            training_arguments(max_steps=3, optim="sgd", learning_rate=0.0),
            [NoisyKD(std=0.5)],
            tiny.bert(0),
            tiny.bert(1),
        )
        trainer.train()
        runs.append([row[0] for row in losses(trainer, "noisy_kd")])
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == 3
