# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch

from hfkdq.losses.features import activation_map_distance
from hfkdq.objectives.feature_maps import FeatureMapKD

from .common import assert_teaches_the_student_alone, attached, convnext, resnet, step, tiny


def images(size=4, side=32):
    return {"pixel_values": torch.randn(size, 1, side, side, generator=torch.Generator().manual_seed(0))}


def naive(student, teacher, power):
    """The formula for two maps of one size, with loops; one number per example."""
    values = []
    for b in range(len(student)):
        vectors = []
        for features in (student[b], teacher[b]):
            channels, height, width = features.shape
            q = [
                sum(abs(features[c, y, x].item()) ** power for c in range(channels))
                for y in range(height)
                for x in range(width)
            ]
            length = sum(value**2 for value in q) ** 0.5
            vectors.append([value / length for value in q])
        values.append(sum((a - b) ** 2 for a, b in zip(*vectors, strict=True)))
    return values


@pytest.mark.parametrize("power", [1.0, 2.0, 4.0])
def test_the_distance_is_that_of_the_formula(power):
    student, teacher = torch.randn(2, 3, 4, 5), torch.randn(2, 7, 4, 5)
    found = activation_map_distance(student, teacher, power)
    assert found.tolist() == pytest.approx(naive(student, teacher, power), rel=1e-4)
    assert activation_map_distance(student, -2 * student, power).abs().max() < 1e-6  # neither sign nor scale count


def test_the_larger_map_is_pooled_on_either_side():
    small, large = torch.rand(2, 3, 4, 4), torch.rand(2, 5, 8, 8)
    # Channels are summed before, so a map of blocks says what the map of their means of squares says.
    blocks = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert activation_map_distance(blocks, small).abs().max() < 1e-6
    means = large.square().sum(1, keepdim=True).unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2)).sqrt()
    expected = naive(small, means, 2)
    assert activation_map_distance(small, large).tolist() == pytest.approx(expected, rel=1e-4)
    assert activation_map_distance(large, small).tolist() == pytest.approx(expected, rel=1e-4)
    assert activation_map_distance(torch.rand(1, 2, 3, 8), torch.rand(1, 2, 6, 4)).shape == (1,)


def test_a_map_without_activity_gives_a_finite_gradient():
    student = torch.zeros(1, 2, 3, 3, requires_grad=True)
    activation_map_distance(student, torch.rand(1, 2, 3, 3)).sum().backward()
    assert student.grad.abs().max() == 0


def maps(model, batch):
    # In training mode batch normalisation takes the statistics of the batch.
    return model(**batch, output_hidden_states=True).hidden_states


@pytest.mark.parametrize(
    ("settings", "student", "teacher", "pairs"),
    [
        ({}, resnet, lambda: resnet(1, (16, 24, 32)), {1: 1, 2: 2, 3: 3}),
        ({}, lambda: resnet(sizes=(8, 12)), lambda: resnet(1, (8, 12, 16, 20)), {1: 2, 2: 4}),
        ({}, convnext, lambda: convnext(1, (12, 16, 20, 24)), {1: 1, 2: 2, 3: 3, 4: 4}),
        ({"layers": {0: 0, 3: 4}, "power": 1.0}, resnet, lambda: convnext(1), {0: 0, 3: 4}),
    ],
)
def test_stages_are_compared_pair_by_pair(settings, student, teacher, pairs):
    student, teacher, batch = student(), teacher(), images()
    objective = attached(FeatureMapKD(**settings), student, teacher)
    assert objective.indices("hidden_states") == (frozenset(pairs), frozenset(pairs.values()))
    value, count = step(objective, student, teacher, batch)
    with torch.no_grad():
        ours, theirs = maps(student, batch), maps(teacher, batch)
    power = settings.get("power", 2.0)
    expected = torch.stack(
        [activation_map_distance(ours[s], theirs[t], power).mean() for s, t in pairs.items()]
    ).mean()
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)
    assert count == objective.positions(batch) == 4


@pytest.mark.parametrize("make", [resnet, convnext])
def test_a_model_teaches_its_copy_nothing(make):
    student = make()
    teacher = copy.deepcopy(student).train()
    value, _ = step(attached(FeatureMapKD(), student, teacher), student, teacher.train(), images())
    assert abs(value) < 1e-6


def test_the_gradient_reaches_the_student_alone():
    assert_teaches_the_student_alone(FeatureMapKD(), resnet(0), convnext(1), images())


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="power must be at least 1"):
        FeatureMapKD(power=0.5)
    with pytest.raises(ValueError, match="compares feature maps"):
        FeatureMapKD().attach(tiny.vit(), resnet())
    with pytest.raises(ValueError, match="out of range"):
        FeatureMapKD(layers={4: 1}).attach(resnet(), resnet())
