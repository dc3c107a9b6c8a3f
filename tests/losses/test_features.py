# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from hfkdq.losses import attention_kl, forward_kl, masked_mean, mean_squared_error


def test_masked_mean_counts_valid_positions_only():
    values = torch.tensor([[1.0, 2.0], [3.0, float("nan")]])
    assert masked_mean(values, torch.tensor([[1, 1], [1, 0]])) == 2.0
    assert masked_mean(values, torch.zeros(2, 2)) == 0.0
    with pytest.raises(ValueError, match="does not fit"):
        masked_mean(values, torch.ones(2))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_forward_kl_is_the_divergence_of_softened_distributions(temperature):
    student, teacher = torch.randn(5, 7), torch.randn(5, 7)
    p, q = (torch.softmax(x.double() / temperature, -1) for x in (teacher, student))
    expected = temperature**2 * (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(forward_kl(student, teacher, temperature).double(), expected, rtol=1e-5, atol=1e-6)
    assert forward_kl(student, student, temperature).abs().max() < 1e-6


@pytest.mark.parametrize("temperature", [0.5, 20.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward_kl_is_finite_for_extreme_logits(temperature, dtype):
    student = torch.tensor([[1e4, -1e4, 0.0]], dtype=dtype, requires_grad=True)
    loss = forward_kl(student, torch.tensor([[-1e4, 1e4, 0.0]], dtype=dtype), temperature).sum()
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


def test_gradient_of_forward_kl_does_not_shrink_with_the_temperature():
    # At high temperatures T^2 * KL tends to half the squared distance of centred logits (Hinton et al. 2015).
    student, teacher = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    (gradient,) = torch.autograd.grad(forward_kl(student, teacher, 1000.0).sum(), student)
    centred = (student - student.mean(-1, keepdim=True)) - (teacher - teacher.mean(-1, keepdim=True))
    torch.testing.assert_close(gradient, centred.detach() / 4, rtol=1e-2, atol=1e-3)


def test_mean_squared_error_by_hand():
    assert mean_squared_error(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 5.0]])).tolist() == [6.5]


def test_attention_kl_by_hand_and_with_padding():
    teacher = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]).reshape(1, 1, 2, 3)
    student = torch.tensor([[0.25, 0.75, 0.0], [0.5, 0.5, 0.0]]).reshape(1, 1, 2, 3)
    expected = [
        0.5 * torch.log(torch.tensor(2.0)) + 0.5 * torch.log(torch.tensor(2 / 3)),
        torch.log(torch.tensor(2.0)),
    ]
    torch.testing.assert_close(attention_kl(student, teacher), torch.tensor([expected]))
    assert attention_kl(teacher, teacher).abs().max() < 1e-6
