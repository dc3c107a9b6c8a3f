# SPDX-License-Identifier: Apache-2.0
import copy
import math

import pytest
import torch
from torch.nn import functional as F

from hfkdq.losses.features import mean_state
from hfkdq.losses.relations import relational_angle, relational_distance, similarity_distance
from hfkdq.objectives.model_signature import ModelSignature, signature_of
from hfkdq.objectives.samples import RKD, SimilarityPreservingKD

from .common import assert_teaches_the_student_alone, attached, padded, resnet, sound, step, tiny, wav2vec2

OBJECTIVES = [RKD(), SimilarityPreservingKD()]


def huber(a, b):
    d = abs(a - b)
    return 0.5 * d * d if d < 1 else d - 0.5


def naive_distance(student, teacher):
    n, found = len(student), []
    for x in (student, teacher):
        d = [[math.dist(x[i].tolist(), x[j].tolist()) for j in range(n)] for i in range(n)]
        mu = sum(map(sum, d)) / (n * (n - 1))
        found.append([[value / mu for value in row] for row in d])
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    return sum(huber(found[0][i][j], found[1][i][j]) for i, j in pairs) / len(pairs)


def naive_angle(student, teacher):
    n = len(student)
    triples = [(i, j, k) for i in range(n) for j in range(n) for k in range(n) if len({i, j, k}) == 3]

    def angle(x, i, j, k):
        return F.cosine_similarity(x[i] - x[j], x[k] - x[j], dim=0).item()

    return sum(huber(angle(student, *t), angle(teacher, *t)) for t in triples) / len(triples)


def naive_similarity(student, teacher):
    n, found = len(student), []
    for x in (student, teacher):
        g = [[(x[i] @ x[j]).item() for j in range(n)] for i in range(n)]
        found.append([[value / math.hypot(*row) for value in row] for row in g])
    return sum((found[0][i][j] - found[1][i][j]) ** 2 for i in range(n) for j in range(n)) / n**2


LOSSES = [
    (relational_distance, naive_distance),
    (relational_angle, naive_angle),
    (similarity_distance, naive_similarity),
]


@pytest.mark.parametrize(("loss", "naive"), LOSSES)
def test_relations_of_samples_are_those_of_the_formula(loss, naive):
    student, teacher = 3 * torch.randn(5, 4).double(), torch.randn(5, 7).double()
    # One example far away, so that Huber's straight part is reached.
    teacher[0] += 20
    values = loss(student, teacher)
    assert values.shape == (5,)
    assert values.mean().item() == pytest.approx(naive(student, teacher), rel=1e-4)
    assert loss(student, 3 * student).abs().max() < 1e-5  # none of them depends on the scale of a model


def test_a_triangle_by_hand():
    # Distances 3, 4, 5 against 1, 1, 1; the angles' cosines 0, 3/5, 4/5 against 1/2.
    student = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    teacher = torch.eye(3)
    expected = sum(0.5 * (d / 4 - 1) ** 2 for d in (3, 4, 5)) / 3
    assert relational_distance(student, teacher).mean().item() == pytest.approx(expected)
    assert relational_angle(student, teacher).tolist() == pytest.approx(
        [0.5 * (c - 0.5) ** 2 for c in (0, 0.6, 0.8)], rel=1e-4
    )


@pytest.mark.parametrize(("loss", "naive"), LOSSES)
@pytest.mark.parametrize("rows", [[0], [0, 0], [0, 0, 0], [0, 1, 1], [0, 1, 2, 1]])
def test_a_single_sample_and_equal_samples_give_finite_gradients(loss, naive, rows):
    student = torch.randn(3, 4)[rows].requires_grad_()
    value = loss(student, torch.randn(3, 6)[rows]).sum()
    value.backward()
    assert torch.isfinite(value)
    assert student.grad.abs().max() < 100
    if len(set(rows)) == 1:
        assert value.abs() < 1e-6
        assert student.grad.abs().max() < 1e-6


def test_samples_that_rounding_alone_tells_apart_have_no_direction():
    student = torch.randn(4, 8)
    student[1] = student[0] * (1 + 1e-7)
    student.requires_grad_()
    (relational_angle(student, torch.randn(4, 8)) + relational_distance(student, torch.randn(4, 8))).sum().backward()
    assert student.grad.abs().max() < 100


def test_samples_that_only_the_student_takes_for_one_have_angles_with_the_others_alone():
    student, teacher = torch.randn(3, 4)[[0, 0, 1, 2]], torch.randn(4, 4)
    assert relational_angle(student, teacher).mean().item() == pytest.approx(naive_angle(student, teacher), rel=1e-4)


def test_zero_vectors_give_finite_gradients():
    student = torch.zeros(3, 4, requires_grad=True)
    for loss, _ in LOSSES:
        loss(student, torch.randn(3, 4)).sum().backward()
    assert student.grad.abs().max() < 1e-6


def test_the_mean_state_counts_valid_positions_only():
    states = torch.arange(12.0).reshape(1, 3, 4).repeat(2, 1, 1)
    mask = torch.tensor([[True, True, False], [False, False, False]])
    assert mean_state(states, mask).tolist() == [[2.0, 3.0, 4.0, 5.0], [0.0] * 4]
    torch.testing.assert_close(mean_state(states), states.mean(1))
    maps = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(mean_state(maps, mask), maps.mean((2, 3)))
    assert mean_state(maps[:, :, 0, 0]).shape == (2, 3)
    with pytest.raises(ValueError, match="do not fit a mask"):
        mean_state(states, mask[:, :2])


def pooled(model, batch, layer=-1):
    with torch.no_grad():
        states = model(**batch, output_hidden_states=True).hidden_states[layer]
    mask = batch["attention_mask"].bool()
    return torch.stack([states[i, mask[i]].mean(0) for i in range(len(states))])


def test_the_objectives_compare_the_mean_states_of_the_last_layers():
    student, teacher, batch = tiny.bert(0), tiny.bert(1, layers=3, hidden=48), tiny.batch(tiny.bert(), size=5)
    ours, theirs = pooled(student, batch), pooled(teacher, batch)
    value, count = step(attached(RKD(distance=2.0, angle=3.0), student, teacher), student, teacher, batch)
    assert value.item() == pytest.approx(2 * naive_distance(ours, theirs) + 3 * naive_angle(ours, theirs), rel=1e-4)
    assert count == 5
    alone, _ = step(attached(RKD(distance=0, angle=1), student, teacher), student, teacher, batch)
    assert alone.item() == pytest.approx(naive_angle(ours, theirs), rel=1e-4)
    value, count = step(attached(SimilarityPreservingKD(), student, teacher), student, teacher, batch)
    assert value.item() == pytest.approx(naive_similarity(ours, theirs), rel=1e-4)
    assert count == 5


def test_layers_are_those_that_were_asked_for():
    student, teacher, batch = tiny.bert(0), tiny.bert(1, layers=3), tiny.batch(tiny.bert(), size=4)
    objective = attached(RKD(layers={1: 2, 2: 3}, distance=1, angle=1), student, teacher)
    assert objective.indices("hidden_states") == (frozenset({1, 2}), frozenset({2, 3}))
    pairs = [(pooled(student, batch, s), pooled(teacher, batch, t)) for s, t in ((1, 2), (2, 3))]
    expected = sum(naive_distance(*pair) + naive_angle(*pair) for pair in pairs) / 2
    assert step(objective, student, teacher, batch)[0].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.name)
@pytest.mark.parametrize(
    ("student", "teacher"),
    [(tiny.bert, lambda: tiny.llama(1, hidden=64)), (tiny.vit, lambda: resnet(1)), (wav2vec2, lambda: wav2vec2(1, 48, stride=5))],
    ids=["bert from llama", "vit from resnet", "sound in other frames"],
)  # fmt: skip
def test_models_of_different_kinds_teach_one_another(objective, student, teacher):
    student, teacher = student(), teacher()
    batch = sound() if student.main_input_name == "input_values" else tiny.batch(student)
    if student.main_input_name == "pixel_values":
        teacher.config.image_size = 8
    assert_teaches_the_student_alone(objective.copy(), student, teacher, batch)
    if student.main_input_name == "pixel_values":
        return
    value, _ = step(objective := attached(objective.copy(), student, teacher), student, teacher, batch)
    more = sound(total=5000) if student.main_input_name == "input_values" else padded(batch)
    torch.testing.assert_close(step(objective, student, teacher, more)[0], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.name)
def test_a_model_teaches_its_copy_nothing_and_a_batch_of_one_has_no_relations(objective):
    student = tiny.bert(0)
    teacher, other = copy.deepcopy(student), tiny.bert(1)
    value, _ = step(attached(objective.copy(), student, teacher), student, teacher, tiny.batch(student))
    assert abs(value) < 1e-5
    value, count = step(attached(objective.copy(), student, other), student, other, tiny.batch(student, size=1))
    value.backward()
    assert abs(value) < 1e-6
    assert count == 1
    assert all(torch.isfinite(p.grad).all() and p.grad.abs().max() < 1e-5 for p in student.parameters() if p.grad is not None)  # fmt: skip


def test_a_teacher_that_reads_another_text_has_a_mask_of_its_own():
    student, teacher = tiny.bert(0), tiny.bert(1)
    batch, texts = tiny.batch(student, seed=0), padded(tiny.batch(student, seed=5))
    objective = attached(RKD(), student, teacher)
    with torch.no_grad():
        outputs = student(**batch, output_hidden_states=True), teacher(**texts, output_hidden_states=True)
    both = {**batch, **{f"teacher_{key}": value for key, value in texts.items()}}
    ours, theirs = pooled(student, batch), pooled(teacher, texts)
    expected = 25 * naive_distance(ours, theirs) + 50 * naive_angle(ours, theirs)
    assert objective(*outputs, both).item() == pytest.approx(expected, rel=1e-4)


def test_a_teacher_of_which_only_states_are_kept():
    student, teacher, batch = tiny.bert(0), tiny.bert(1, hidden=48), tiny.batch(tiny.bert())
    shapes = {"hidden_states": [list(shape) for shape in signature_of(teacher).states()]}
    live, _ = step(attached(RKD(), student, teacher), student, teacher, batch)
    cached = attached(RKD(), student, ModelSignature("BertForSequenceClassification", teacher.config, shapes))
    torch.testing.assert_close(step(cached, student, teacher, batch)[0], live)


def test_settings_and_layers_that_make_no_sense_are_refused():
    for settings in ({"distance": -1.0}, {"angle": -1.0}, {"distance": 0.0, "angle": 0.0}):
        with pytest.raises(ValueError, match="RKD: distance and angle"):
            RKD(**settings)
    with pytest.raises(ValueError, match="out of range"):
        RKD(layers={1: 5}).attach(tiny.bert(), tiny.bert())
    peft = pytest.importorskip("peft")
    virtual = peft.get_peft_model(tiny.bert(), peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="Virtual tokens"):
        RKD().attach(virtual, tiny.bert())
