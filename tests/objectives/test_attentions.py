# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch

from hfkdq.losses.features import attention_kl, attention_mse
from hfkdq.objectives.attentions import AttentionKD

from .common import assert_teaches_the_student_alone, attached, padded, sound, step, tiny, wav2vec2

DISTANCES = ["kl", "mse"]


def probabilities(*shape):
    return torch.softmax(2 * torch.randn(*shape), -1)


def naive(student, teacher, mask, distance):
    """Mean over queries and keys attended to, with loops."""
    total, queries = 0.0, 0
    heads = student.shape[1]
    for b in range(len(student)):
        valid = [i for i in range(mask.shape[1]) if mask[b, i]]
        for q in valid:
            for h in range(heads):
                p, s = teacher[b, h, q, valid].double(), student[b, h, q, valid].double()
                some = p > 0
                value = (p[some] * (p[some] / s[some]).log()).sum() if distance == "kl" else (p - s).square().mean()
                total += value.item() / heads
            queries += 1
    return total / queries, queries


def maps(model, batch):
    with torch.no_grad():
        return model.eval()(**batch, output_attentions=True).attentions


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("kind", ["bert", "llama", "vit"])
def test_the_value_is_the_mean_over_attended_queries(distance, kind):
    student, teacher = getattr(tiny, kind)(0), getattr(tiny, kind)(1, layers=4)
    objective, batch = (
        attached(AttentionKD(distance=distance, layers={1: 2, 2: 3}), student, teacher),
        tiny.batch(student),
    )
    value, count = step(objective, student, teacher, batch)
    ours, theirs = maps(student, batch), maps(teacher, batch)
    mask = batch.get("attention_mask", torch.ones(ours[0].shape[0], ours[0].shape[2]))
    expected = [naive(ours[s], theirs[t], mask, distance) for s, t in ((0, 1), (1, 2))]
    assert value.item() == pytest.approx(sum(v for v, _ in expected) / 2, rel=1e-3)
    assert count == (expected[0][1] if "attention_mask" in batch else 4)


@pytest.mark.parametrize("distance", DISTANCES)
def test_different_numbers_of_heads_are_compared_by_their_means(distance):
    student, teacher, batch = tiny.bert(0, heads=2), tiny.bert(1), tiny.batch(tiny.bert())
    value, _ = step(attached(AttentionKD(distance=distance, layers={2: 2}), student, teacher), student, teacher, batch)
    ours, theirs = (maps(model, batch)[1].mean(1, keepdim=True) for model in (student, teacher))
    expected, _ = naive(ours, theirs, batch["attention_mask"], distance)
    assert value.item() == pytest.approx(expected, rel=1e-3)


def test_the_distances_by_hand():
    teacher = torch.tensor([[[[0.5, 0.5, 0.0]], [[1.0, 0.0, 0.0]]]])  # (1, heads=2, queries=1, keys=3)
    student = torch.tensor([[[[0.25, 0.75, 0.0]], [[1.0, 0.0, 0.0]]]])
    mask = torch.tensor([[True, True, False]])
    assert attention_mse(student, teacher, mask).item() == pytest.approx((0.25**2 + 0.25**2) / 2 / 2)
    assert attention_mse(student, teacher).item() == pytest.approx((0.25**2 + 0.25**2) / 3 / 2)
    # Means of heads: (0.75, 0.25) against (0.625, 0.375).
    one = torch.tensor([[[[0.75, 0.25, 0.0]]]])
    assert attention_mse(one, student, mask).item() == pytest.approx(2 * 0.125**2 / 2)
    expected = 0.625 * torch.log(torch.tensor(0.625 / 0.75)) + 0.375 * torch.log(torch.tensor(0.375 / 0.25))
    assert attention_kl(one, student).item() == pytest.approx(expected.item())


def test_masked_keys_never_count_whatever_is_there():
    student, teacher, mask = probabilities(2, 4, 3, 5), probabilities(2, 4, 3, 5), torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    before = attention_mse(student, teacher, mask)
    student[1, ..., 3:] = torch.nan
    torch.testing.assert_close(attention_mse(student, teacher, mask), before)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_padding_changes_nothing(distance, kind):
    student, teacher = getattr(tiny, kind)(0), getattr(tiny, kind)(1)
    objective, batch = attached(AttentionKD(distance=distance), student, teacher), tiny.batch(student)
    value, count = step(objective, student, teacher, batch)
    again, count_again = step(objective, student, teacher, padded(batch))
    torch.testing.assert_close(again, value, rtol=1e-4, atol=1e-6)
    assert count == count_again


@pytest.mark.parametrize("distance", DISTANCES)
def test_padded_sound_changes_nothing(distance):
    student, teacher = wav2vec2(0), wav2vec2(1)
    objective = attached(AttentionKD(distance=distance), student, teacher)
    value, count = step(objective, student, teacher, sound())
    again, count_again = step(objective, student, teacher, sound(total=6000))
    torch.testing.assert_close(again, value, rtol=1e-3, atol=1e-6)
    assert count == count_again


@pytest.mark.parametrize("distance", DISTANCES)
def test_a_model_teaches_its_copy_nothing(distance):
    student = tiny.bert(0)
    teacher = copy.deepcopy(student)
    value, _ = step(attached(AttentionKD(distance=distance), student, teacher), student, teacher, tiny.batch(student))
    assert abs(value) < 1e-6


@pytest.mark.parametrize("distance", DISTANCES)
def test_the_gradient_reaches_the_student_alone(distance):
    student, teacher = tiny.bert(0, heads=2), tiny.bert(1)
    assert_teaches_the_student_alone(AttentionKD(distance=distance), student, teacher, tiny.batch(student))


def test_an_unknown_distance_is_refused():
    with pytest.raises(ValueError, match="'kl' or 'mse', got 'l1'"):
        AttentionKD(distance="l1")
