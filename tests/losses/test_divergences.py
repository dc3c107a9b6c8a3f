# SPDX-License-Identifier: Apache-2.0
"""Every divergence against its formula written out in float64 loops, and the properties that all of them have."""

import math

import pytest
import torch
from torch import nn

from hfkdq.losses import DIST, DKD, JSD, MSE, ForwardKL, ReverseKL, SoftCrossEntropy
from hfkdq.losses.divergences import (
    binary_logits,
    coarse_log_probabilities,
    in_chunks,
    log_tail,
    standardized,
)

ALL = [
    ForwardKL(),
    ReverseKL(),
    JSD(beta=0.3),
    SoftCrossEntropy(),
    MSE(),
    DKD(alpha=2.0, beta=3.0),
    DIST(beta=2, gamma=3),
]
T = 2.5


def names(value):
    return type(value).__name__


def logits(rows=6, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, classes, generator=generator) * 2 for _ in range(2)]


def softmax(row, temperature=T):
    exps = [math.exp(float(x) / temperature) for x in row]
    return [e / sum(exps) for e in exps]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def pearson(a, b):
    ma, mb = sum(a) / len(a), sum(b) / len(b)
    cov = sum((x - ma) * (y - mb) for x, y in zip(a, b, strict=True))
    return cov / math.sqrt(sum((x - ma) ** 2 for x in a) * sum((y - mb) ** 2 for y in b))


def by_hand(divergence, student, teacher, target):
    rows = []
    qs, ps = [softmax(row) for row in student], [softmax(row) for row in teacher]
    for i, (q, p) in enumerate(zip(qs, ps, strict=True)):
        match divergence:
            case ForwardKL():
                rows.append(T**2 * kl(p, q))
            case ReverseKL():
                rows.append(T**2 * kl(q, p))
            case JSD(beta=b):
                m = [b * x + (1 - b) * y for x, y in zip(p, q, strict=True)]
                rows.append(T**2 * (b * kl(p, m) + (1 - b) * kl(q, m)))
            case SoftCrossEntropy():
                rows.append(-(T**2) * sum(x * math.log(y) for x, y in zip(p, q, strict=True)))
            case MSE():
                rows.append(
                    sum((float(x) - float(y)) ** 2 for x, y in zip(student[i], teacher[i], strict=True)) / len(p)
                )
            case DKD(alpha=alpha, beta=beta):
                t = int(target[i])
                pairs = [(x[t], 1 - x[t]) for x in (p, q)]
                rest = [[x[c] / (1 - x[t]) for c in range(len(x)) if c != t] for x in (p, q)]
                rows.append(T**2 * (alpha * kl(*pairs) + beta * kl(*rest)))
            case DIST(beta=beta, gamma=gamma):
                columns = [list(zip(*x, strict=True)) for x in (qs, ps)]
                intra = sum(1 - pearson(a, b) for a, b in zip(*columns, strict=True)) / len(p)
                rows.append(T**2 * (beta * (1 - pearson(q, p)) + gamma * intra))
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("divergence", ALL, ids=names)
def test_each_divergence_is_its_formula(divergence):
    student, teacher = logits()
    target = torch.tensor([0, 1, 2, 3, 4, 0])
    found = divergence(student, teacher, T, target=target)
    torch.testing.assert_close(found.double(), by_hand(divergence, student, teacher, target), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("divergence", ALL, ids=names)
def test_a_student_like_its_teacher_is_at_the_smallest_value(divergence):
    student, teacher = logits()
    floor = divergence(teacher, teacher, T)
    if isinstance(divergence, SoftCrossEntropy):
        entropy = [T**2 * -sum(p * math.log(p) for p in softmax(row)) for row in teacher]
        torch.testing.assert_close(floor, torch.tensor(entropy), rtol=1e-4, atol=1e-5)
    else:
        assert floor.abs().max() < 1e-5
    assert (divergence(student, teacher, T) > floor + 1e-3).all()
    # And there is no slope there.
    twin = teacher.clone().requires_grad_()
    divergence(twin, teacher, T).sum().backward()
    assert twin.grad.abs().max() < 1e-4


@pytest.mark.parametrize("divergence", ALL, ids=names)
def test_half_precision_logits_give_what_the_same_numbers_give_in_float32(divergence):
    student, teacher = (x.bfloat16() for x in logits())
    torch.testing.assert_close(
        divergence(student, teacher, T), divergence(student.float(), teacher.float(), T), rtol=1e-6, atol=1e-6
    )
    exact = [x.float() for x in logits()]
    torch.testing.assert_close(divergence(student, teacher, T), divergence(*exact, T), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("divergence", [d for d in ALL if not isinstance(d, DIST)], ids=names)
def test_classes_that_are_ruled_out_change_nothing(divergence):
    student, teacher = logits()
    target = torch.tensor([0, 1, 2, 3, 4, 0])
    wide = [torch.cat([x, torch.randn(6, 3) * 50], dim=1).requires_grad_() for x in (student, teacher)]
    valid_classes = torch.tensor([True] * 5 + [False] * 3).expand(6, 8)
    found = divergence(*wide, T, valid_classes=valid_classes, target=target)
    torch.testing.assert_close(found, divergence(student, teacher, T, target=target), rtol=1e-4, atol=1e-5)
    found.sum().backward()
    assert wide[0].grad[:, 5:].abs().max() == 0
    assert torch.isfinite(wide[0].grad).all()


def test_without_labels_the_teachers_top_class_stands_for_the_label():
    student, teacher = logits()
    torch.testing.assert_close(DKD()(student, teacher, T), DKD()(student, teacher, T, target=teacher.argmax(-1)))


def test_near_its_limits_jsd_is_forward_and_reverse_kl():
    student, teacher = logits()
    torch.testing.assert_close(
        JSD(beta=1e-4)(student, teacher) / 1e-4, ForwardKL()(student, teacher), rtol=0.02, atol=0.02
    )
    torch.testing.assert_close(
        JSD(beta=1 - 1e-4)(student, teacher) / 1e-4, ReverseKL()(student, teacher), rtol=0.02, atol=0.02
    )


def test_a_single_row_has_no_correlation_over_rows():
    student, teacher = logits(rows=1)
    assert torch.isfinite(DIST()(student, teacher)).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: JSD(beta=0.0), "beta must be between 0 and 1"),
        (lambda: JSD(beta=1.0), "beta must be between 0 and 1"),
        (lambda: DKD(beta=-1.0), "must not be negative"),
        (lambda: DIST(gamma=-1.0), "must not be negative"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_standardized_logits_have_mean_0_and_deviation_1_over_the_possible_classes():
    (x, _) = logits()
    z = standardized(5 * x + 3)
    torch.testing.assert_close(z.mean(-1), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.std(-1, unbiased=False), torch.ones(6))
    valid_classes = torch.tensor([True] * 4 + [False]).expand(6, 5)
    torch.testing.assert_close(standardized(x, valid_classes)[:, :4], standardized(x[:, :4]))


def test_binary_logits_are_a_sigmoid():
    (x, _) = logits()
    torch.testing.assert_close(binary_logits(x).softmax(-1)[..., 0], x.sigmoid())


def test_likeliest_classes_and_the_rest_together():
    student, teacher = logits(classes=9)
    indices = teacher.topk(3).indices
    log_p = coarse_log_probabilities(teacher, indices, T)
    p = torch.softmax(teacher / T, -1)
    torch.testing.assert_close(log_p.exp()[:, :3], p.gather(1, indices))
    torch.testing.assert_close(log_p.exp()[:, 3], 1 - p.gather(1, indices).sum(1))
    # What is told apart less is less far apart (data processing inequality), and never below 0.
    coarse = ForwardKL()(coarse_log_probabilities(student, indices, T), log_p)
    assert (coarse <= ForwardKL()(student, teacher, T) / T**2 + 1e-6).all()
    assert (coarse > 0).all()


@pytest.mark.parametrize("rest", [1e-6, 0.3, 0.7, 1 - 1e-6])
def test_the_rest_is_exact_where_little_or_nearly_all_is_left(rest):
    top = torch.tensor([[1.0 - rest]], dtype=torch.float64).log()
    torch.testing.assert_close(log_tail(top).exp(), torch.tensor([[rest]], dtype=torch.float64), rtol=1e-3, atol=0)


def test_nothing_left_has_no_infinite_gradient():
    top = torch.tensor([[0.0, -40.0]], requires_grad=True)
    log_tail(top).sum().backward()
    assert torch.isfinite(top.grad).all()


@pytest.mark.parametrize("divergence", [d for d in ALL if not d.across_rows], ids=names)
def test_chunks_give_the_same_values_and_gradients(divergence):
    student, teacher = logits(rows=7, classes=6)
    target = torch.arange(7) % 6
    whole = student.clone().requires_grad_()
    cut = student.clone().requires_grad_()
    weights = torch.arange(1.0, 8.0)

    def function(s, t, valid_classes, target):
        return divergence(s, t, T, valid_classes, target)

    values = in_chunks(function, cut, teacher, None, target, elements=13)  # 2 rows at a time
    expected = function(whole, teacher, None, target)
    torch.testing.assert_close(values, expected)
    (values * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(cut.grad, whole.grad)


def test_chunks_leave_no_temporary_of_the_size_of_the_logits():
    calls = []

    def function(student, teacher):
        calls.append(student.shape[0])
        return ForwardKL()(student, teacher)

    student = nn.Parameter(torch.randn(10, 100))
    values = in_chunks(function, student, torch.randn(10, 100), elements=300)
    assert calls == [3, 3, 3, 1]
    saved = [t for t in values.grad_fn.saved_tensors if t is not None]
    assert next(t.data_ptr() for t in saved) == student.data_ptr()  # the logits themselves, no copy of them
    values.sum().backward()
    assert calls == [3, 3, 3, 1] * 2


@pytest.mark.parametrize("divergence", [d for d in ALL if d.uses_temperature], ids=names)
def test_forbidden_classes_are_left_out_of_value_and_gradient(divergence):
    """Minus infinity in the logits of both models is as good as classes that are not there."""
    student, teacher = logits(classes=7)
    target = torch.tensor([0, 1, 2, 3, 4, 0])
    plain = student[:, :5].clone().requires_grad_()
    expected = divergence(plain, teacher[:, :5], T, target=target)
    forbidden = student.masked_fill(torch.arange(7) > 4, -torch.inf).requires_grad_()
    found = divergence(forbidden, teacher.masked_fill(torch.arange(7) > 4, -torch.inf), T, target=target)
    if not isinstance(divergence, DIST):  # a mean over the classes
        torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(x.sum(), y)[0] for x, y in ((found, forbidden), (expected, plain))]
    assert found.isfinite().all()
    assert gradients[0].isfinite().all()
    assert not gradients[0][:, 5:].any()
    if not isinstance(divergence, DIST):
        torch.testing.assert_close(gradients[0][:, :5], gradients[1])


def test_what_only_one_model_forbids_is_finite_too():
    student, teacher = logits()
    one = teacher.clone()
    one[:, 2] = -torch.inf
    p = one.div(T).softmax(-1)
    expected = T**2 * (p[:, [0, 1, 3, 4]] * (p.log() - student.div(T).log_softmax(-1))[:, [0, 1, 3, 4]]).sum(-1)
    torch.testing.assert_close(ForwardKL()(student, one, T), expected)
    assert ReverseKL()(student, one, T).isfinite().all()


@pytest.mark.parametrize("scaled", [standardized, lambda x: coarse_log_probabilities(x, x.topk(2).indices)])
def test_forbidden_classes_change_no_scale(scaled):
    x = logits(classes=7)[0].masked_fill(torch.arange(7) > 4, -torch.inf)
    torch.testing.assert_close(scaled(x)[:, :3], scaled(x[:, :5])[:, :3])


def test_dkd_takes_the_teachers_class_where_a_row_has_no_label():
    student, teacher = logits()
    found = DKD()(student, teacher, T, target=torch.tensor([0, -100, 2, -100, 1, 0]))
    bare, labelled = DKD()(student, teacher, T), DKD()(student, teacher, T, target=torch.tensor([0, 0, 2, 0, 1, 0]))
    without = torch.tensor([False, True, False, True, False, False])
    torch.testing.assert_close(found, torch.where(without, bare, labelled))
    soft = torch.eye(5)[[0, 0, 2, 0, 1, 0]] * 0.9 + 0.02
    torch.testing.assert_close(DKD()(student, teacher, T, target=soft), labelled)
