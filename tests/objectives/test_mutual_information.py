# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hfkdq.losses.features import gaussian_nll
from hfkdq.losses.relations import info_nce
from hfkdq.objectives.model_signature import ModelSignature, signature_of
from hfkdq.objectives.mutual_information import CRD, VID, GaussianProjection
from hfkdq.objectives.projections import Projections

from .common import assert_teaches_the_student_alone, attached, padded, resnet, sound, step, tiny, wav2vec2

OBJECTIVES = [CRD(), VID()]


def pair():
    return tiny.bert(0), tiny.bert(1, layers=4, hidden=48)


def states(model, batch, layer):
    with torch.no_grad():
        return model.eval()(**batch, output_hidden_states=True).hidden_states[layer]


def test_info_nce_is_the_cross_entropy_of_finding_the_own_vector():
    student, teacher = torch.randn(4, 6), torch.randn(4, 6)
    for i, value in enumerate(info_nce(student, teacher, 0.5)):
        scores = [math.exp(F.cosine_similarity(student[i], t, dim=0).item() / 0.5) for t in teacher]
        assert value.item() == pytest.approx(-math.log(scores[i] / sum(scores)), rel=1e-4)
    # Nothing is told apart where all teacher vectors are one.
    torch.testing.assert_close(info_nce(student, teacher[:1].expand(4, 6)), torch.full((4,), math.log(4)))
    assert info_nce(teacher, teacher, 0.01).max() < 1e-3
    assert info_nce(student[:1], teacher[:1]).abs().item() == 0


def test_excluded_examples_are_no_negatives():
    student, teacher = torch.randn(3, 6), torch.randn(3, 6)
    excluded = torch.tensor([[True, True, False], [True, True, False], [False, False, True]])
    found = info_nce(student, teacher, 0.5, excluded)
    kept = [0, 2]
    torch.testing.assert_close(found[0], info_nce(student[kept], teacher[kept], 0.5)[0])
    torch.testing.assert_close(found[2], info_nce(student, teacher, 0.5)[2])


def test_crd_contrasts_mapped_means_of_the_last_layers():
    (student, teacher), batch = pair(), tiny.batch(tiny.bert(), size=5)
    objective = attached(CRD(temperature=0.2), student, teacher)
    value, count = step(objective, student, teacher, batch)
    (learned,) = getattr(student, Projections.NAME).maps.values()
    vectors = []
    for model, layer in ((student, 2), (teacher, 4)):
        found, mask = states(model, batch, layer), batch["attention_mask"].bool()
        vectors.append(torch.stack([found[i, mask[i]].mean(0) for i in range(5)]))
    expected = info_nce(learned(vectors[0]), vectors[1], 0.2).mean()
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    assert count == objective.positions(batch) == 5


def test_examples_of_the_same_class_are_no_negatives_of_each_other():
    batch = tiny.batch(tiny.bert(), size=4)

    def value(labels, **settings):
        torch.manual_seed(0)
        student, teacher = pair()
        data = batch if labels is None else {**batch, "labels": torch.tensor(labels)}
        return step(attached(CRD(**settings), student, teacher), student, teacher, data)[0]

    everything = value(None)
    assert value([1, 1, 1, 1]).item() == 0
    torch.testing.assert_close(value([0, 1, 2, 3]), everything)
    torch.testing.assert_close(value([1, 1, 1, 1], exclude_same_class=False), everything)
    torch.testing.assert_close(value([-100, -100, -100, -100]), everything)
    assert 0 < value([0, 0, 1, 1]) < everything
    torch.testing.assert_close(value([0.5, 0.5, 0.5, 0.5]), everything)  # numbers are no classes
    torch.testing.assert_close(value([[1, 1]] * 4), everything)  # nor are tags


def test_gaussian_nll_is_that_of_a_normal_distribution_without_its_constant():
    mean, log_variance, target = torch.randn(3, 5), torch.randn(3, 5), torch.randn(3, 5)
    normal = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    expected = -(normal.log_prob(target) + 0.5 * math.log(2 * math.pi)).mean(-1)
    torch.testing.assert_close(gaussian_nll(mean, log_variance, target), expected)


def test_a_gaussian_projection_is_linear_with_one_variance_per_channel():
    learned = GaussianProjection(4, 6)
    assert not any(isinstance(module, nn.Linear) for module in learned.modules())
    inputs = torch.randn(2, 3, 4)
    mean, log_variance = learned(inputs).chunk(2, -1)
    torch.testing.assert_close(mean, F.linear(inputs, learned.weight, learned.bias))
    torch.testing.assert_close(log_variance.exp(), torch.full((2, 3, 6), 5.0))
    with torch.no_grad():
        learned.spread.fill_(-1e4)
    assert torch.isfinite(learned(inputs)).all()


def test_vid_is_the_likelihood_of_the_teachers_states_at_positions_attended_to():
    (student, teacher), batch = pair(), tiny.batch(tiny.bert())
    objective = attached(VID(layers={1: 2, 2: 4}), student, teacher)
    maps = list(getattr(student, Projections.NAME).maps.values())
    for learned in maps:
        nn.init.normal_(learned.spread)
    value, count = step(objective, student, teacher, batch)
    terms = []
    for (s, t), learned in zip(((1, 2), (2, 4)), maps, strict=True):
        mean = F.linear(states(student, batch, s), learned.weight, learned.bias)
        variance = F.softplus(learned.spread) + 1e-5
        error = (states(teacher, batch, t) - mean).square()
        per_position = (0.5 * (variance.log() + error / variance)).mean(-1)
        terms.append(per_position[batch["attention_mask"].bool()].mean())
    torch.testing.assert_close(value, sum(terms) / 2, rtol=1e-4, atol=1e-5)
    assert count == objective.positions(batch) == batch["attention_mask"].sum()


def test_the_variance_learns_how_far_a_channel_can_be_predicted():
    target = torch.randn(512, 2) * torch.tensor([0.5, 2.0])
    learned = GaussianProjection(3, 2)
    optimizer = torch.optim.Adam(learned.parameters(), 0.05)
    for _ in range(400):
        value = gaussian_nll(*learned(torch.zeros(512, 3)).chunk(2, -1), target).mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    variance = F.softplus(learned.spread).detach()
    torch.testing.assert_close(variance, target.var(0), rtol=0.1, atol=0.0)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.name)
def test_padding_changes_nothing(objective):
    (student, teacher), batch = pair(), tiny.batch(tiny.bert())
    objective = attached(objective.copy(), student, teacher)
    value, count = step(objective, student, teacher, batch)
    again, count_again = step(objective, student, teacher, padded(batch))
    torch.testing.assert_close(again, value, rtol=1e-4, atol=1e-5)
    assert count == count_again


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.name)
@pytest.mark.parametrize("make", [pair, lambda: (tiny.llama(0), tiny.bert(1)), lambda: (wav2vec2(0), wav2vec2(1, 48))])
def test_the_gradient_reaches_the_student_and_its_maps_alone(objective, make):
    student, teacher = make()
    batch = sound() if student.main_input_name == "input_values" else tiny.batch(student)
    assert_teaches_the_student_alone(objective.copy(), student, teacher, batch)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.name)
def test_training_lowers_the_value(objective):
    (student, teacher), batch = pair(), tiny.batch(tiny.bert(), size=8)
    objective = attached(objective.copy(), student, teacher)
    optimizer, values = torch.optim.Adam(student.parameters(), 3e-3), []
    for _ in range(20):
        value, _ = step(objective, student, teacher, batch)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < values[0] - 0.1


def test_a_batch_of_one_teaches_nothing_by_contrast():
    (student, teacher), batch = pair(), tiny.batch(tiny.bert(), size=1)
    value, count = step(attached(CRD(), student, teacher), student, teacher, batch)
    value.backward()
    assert value.item() == 0
    assert count == 1
    assert all(p.grad.abs().max() == 0 for p in student.parameters() if p.grad is not None)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.name)
def test_a_teacher_of_which_only_states_are_kept(objective):
    values = []
    for cached in (False, True):
        student, teacher = pair()
        shapes = {"hidden_states": [list(shape) for shape in signature_of(teacher).states()]}
        signature = ModelSignature("BertForSequenceClassification", teacher.config, shapes)
        torch.manual_seed(0)
        objective = attached(objective.copy(), student, signature if cached else teacher)
        values.append(step(objective, student, teacher, tiny.batch(student))[0])
    torch.testing.assert_close(values[0], values[1])


@pytest.mark.parametrize(
    ("objective", "student", "teacher", "message"),
    [
        (CRD(), resnet, resnet, "CRD compares hidden states"),
        (VID(), resnet, resnet, "VID compares hidden states"),
        (VID(), tiny.bert, tiny.vit, "VID compares position with position"),
        (VID(layers={1: 7}), tiny.bert, tiny.bert, "out of range"),
        (CRD(layers={3: 1}), tiny.bert, tiny.bert, "out of range"),
    ],
)
def test_models_that_do_not_fit_are_refused_at_attach(objective, student, teacher, message):
    student = student()
    with pytest.raises(ValueError, match=message):
        objective.attach(student, teacher())
    assert not hasattr(student, Projections.NAME)


def test_a_temperature_must_be_larger_than_zero():
    with pytest.raises(ValueError, match="CRD: temperature"):
        CRD(temperature=0.0)
