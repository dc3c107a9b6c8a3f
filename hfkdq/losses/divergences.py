# SPDX-License-Identifier: Apache-2.0
"""Divergences between what a student and a teacher predict, one number per position. Pure functions of logits,
computed in float32."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch.nn import functional as F

from ..fields import NOT_NEGATIVE, check_fields, check_rules
from .features import masked_mean

RULED_OUT = -1e4
"""Logit of a class that is ruled out: its probability is exactly 0, and unlike minus infinity 0 times it is 0."""


def log_probabilities(
    logits: torch.Tensor, temperature: float = 1.0, valid_classes: torch.Tensor | None = None
) -> torch.Tensor:
    """`log softmax(logits / T)` over the last axis, float32. Classes outside of `valid_classes`, and those whose logit
    is minus infinity, get probability 0 and a finite logarithm."""
    scaled = _finite(logits, temperature)
    if valid_classes is not None:
        scaled = scaled.masked_fill(~valid_classes, RULED_OUT)
    return F.log_softmax(scaled, dim=-1)


def _finite(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """`logits / T`, float32, with `RULED_OUT` for minus infinity; NaN stays what it is."""
    return torch.nan_to_num(logits.float() / temperature, nan=math.nan, posinf=math.inf, neginf=RULED_OUT)


def forward_kl(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0, valid_classes: torch.Tensor | None = None
) -> torch.Tensor:
    """`T^2 * KL(softmax(teacher / T) || softmax(student / T))` per position.

    The factor `T^2` keeps the size of the gradient independent of the temperature (Hinton et al., "Distilling the
    Knowledge in a Neural Network", 2015). So it does in the other divergences.

    Args:
        student (`torch.Tensor` of shape `(..., classes)`): logits of the student.
        teacher (`torch.Tensor` of shape `(..., classes)`): logits of the teacher.
        temperature (`float`, defaults to 1.0): `T`, larger than 0.
        valid_classes (`torch.BoolTensor` of shape `(..., classes)`, *optional*): the classes that are possible.

    Returns:
        `torch.Tensor` of shape `(...)`, float32, at least 0 up to rounding.
    """
    log_q, log_p = (log_probabilities(logits, temperature, valid_classes) for logits in (student, teacher))
    return kl(log_p, log_q) * temperature**2


def kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """`KL(p || q)` over the last axis, of log probabilities."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


@dataclass(frozen=True)
class Divergence:
    """A divergence of a student's predictions from a teacher's.

    Class attributes:
        uses_temperature (`bool`): whether it compares softened probabilities, rather than logits.
        uses_target (`bool`): whether it is given the class on the label.
        across_rows (`bool`): whether a position's value depends on the other positions of the batch.
    """

    uses_temperature: ClassVar[bool] = True
    uses_target: ClassVar[bool] = False
    across_rows: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_fields(self)
        check_rules(self)

    def __call__(
        self,
        student: torch.Tensor,
        teacher: torch.Tensor,
        temperature: float = 1.0,
        valid_classes: torch.Tensor | None = None,
        target: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The divergence per position.

        Args:
            student (`torch.Tensor` of shape `(rows, classes)`): logits of the student.
            teacher (`torch.Tensor` of shape `(rows, classes)`): logits of the teacher.
            temperature (`float`, defaults to 1.0): `T`, larger than 0.
            valid_classes (`torch.BoolTensor` of shape `(rows, classes)`, *optional*): the classes that are possible.
            target (`torch.LongTensor` of shape `(rows,)`, *optional*): the class on the label, where there are labels;
                -100 for none, or float probabilities of shape `(rows, classes)` of a soft one.

        Returns:
            `torch.Tensor` of shape `(rows,)`, float32.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """`T^2 * KL(teacher || student)`: the student covers all that the teacher finds likely. Hinton et al. (2015)."""

    def __call__(self, student, teacher, temperature=1.0, valid_classes=None, target=None):  # type: ignore[no-untyped-def]
        return forward_kl(student, teacher, temperature, valid_classes)


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """`T^2 * KL(student || teacher)`: the student stays within what the teacher finds likely. Gu et al., "MiniLLM:
    Knowledge Distillation of Large Language Models" (2024)."""

    def __call__(self, student, teacher, temperature=1.0, valid_classes=None, target=None):  # type: ignore[no-untyped-def]
        return forward_kl(teacher, student, temperature, valid_classes)


@dataclass(frozen=True)
class JSD(Divergence):
    """Generalised Jensen-Shannon divergence: `T^2 * (b * KL(p || m) + (1 - b) * KL(q || m))`, `m = b * p + (1 - b) * q`.

    `p` is the teacher's distribution, `q` the student's, both softened by `T`. Agarwal et al., "On-Policy Distillation
    of Language Models: Learning from Self-Generated Mistakes" (2024), equation 1.

    Args:
        beta (`float`, defaults to 0.5): `b`, between 0 and 1, both excluded: there it vanishes, and divided by `b` or
            `1 - b` it becomes the forward or the reverse KL divergence.

    Raises:
        ValueError: `beta` outside of (0, 1).
    """

    beta: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.beta < 1.0:
            raise ValueError(
                f"JSD: beta must be between 0 and 1, both excluded, got {self.beta!r}. The limits are 'forward_kl' and "
                "'reverse_kl'."
            )

    def __call__(self, student, teacher, temperature=1.0, valid_classes=None, target=None):  # type: ignore[no-untyped-def]
        log_q, log_p = (log_probabilities(logits, temperature, valid_classes) for logits in (student, teacher))
        weights = torch.tensor([self.beta, 1.0 - self.beta], device=log_p.device).log()
        log_m = torch.logsumexp(torch.stack([log_p + weights[0], log_q + weights[1]]), dim=0)
        return (self.beta * kl(log_p, log_m) + (1.0 - self.beta) * kl(log_q, log_m)) * temperature**2


@dataclass(frozen=True)
class SoftCrossEntropy(Divergence):
    """`-T^2 * sum_c p_c log q_c` with the teacher's softened `p` and the student's `q`. The forward KL divergence plus
    the entropy of the teacher, which is its smallest value. Hinton et al. (2015)."""

    def __call__(self, student, teacher, temperature=1.0, valid_classes=None, target=None):  # type: ignore[no-untyped-def]
        log_q = log_probabilities(student, temperature, valid_classes)
        p = log_probabilities(teacher, temperature, valid_classes).exp()
        return -(p * log_q).sum(-1) * temperature**2


@dataclass(frozen=True)
class MSE(Divergence):
    """`mean_c (z_student - z_teacher)^2` of the logits themselves; without a temperature. Ba and Caruana, "Do Deep
    Nets Really Need to be Deep?" (2014); Kim et al., "Comparing Kullback-Leibler Divergence and Mean Squared Error
    Loss in Knowledge Distillation" (2021). In the project's own comparison it helped nowhere:
    docs/results/objectives.md."""

    uses_temperature: ClassVar[bool] = False

    def __call__(self, student, teacher, temperature=1.0, valid_classes=None, target=None):  # type: ignore[no-untyped-def]
        # A class that both rule out is no difference.
        return masked_mean((_finite(student) - _finite(teacher)).square(), valid_classes, dim=-1)


@dataclass(frozen=True)
class DKD(Divergence):
    """Decoupled distillation: `T^2 * (alpha * KL(b_t || b_s) + beta * KL(n_t || n_s))`.

    `b` is the pair (probability of the label's class, probability of all others), `n` the distribution over the other
    classes alone. Zhao et al., "Decoupled Knowledge Distillation" (2022). Where there is no label (none at all, or -100)
    the teacher's top class stands for it, and of a soft label its likeliest class. With two classes the second part is 0. In the project's own comparison it helped nowhere:
    docs/results/objectives.md.

    Args:
        alpha (`float`, defaults to 1.0): weight of the label's class.
        beta (`float`, defaults to 8.0): weight of the other classes.

    Raises:
        ValueError: a negative weight.
    """

    uses_target: ClassVar[bool] = True

    alpha: Annotated[float, NOT_NEGATIVE] = 1.0
    beta: Annotated[float, NOT_NEGATIVE] = 8.0

    def __call__(self, student, teacher, temperature=1.0, valid_classes=None, target=None):  # type: ignore[no-untyped-def]
        if target is not None and target.is_floating_point():
            target = target.argmax(-1)
        likeliest = teacher.argmax(-1)
        target = likeliest if target is None else torch.where(target < 0, likeliest, target)
        is_target = F.one_hot(target, teacher.shape[-1]).bool()
        others = ~is_target if valid_classes is None else valid_classes & ~is_target
        pairs, rest = [], []
        for logits in (student, teacher):
            log_p = log_probabilities(logits, temperature, valid_classes)
            log_target = log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1)
            log_others = torch.logsumexp(log_p.masked_fill(~others, RULED_OUT), dim=-1)
            pairs.append(torch.stack([log_target, log_others], dim=-1))
            rest.append(log_probabilities(logits, temperature, others))
        return (self.alpha * kl(pairs[1], pairs[0]) + self.beta * kl(rest[1], rest[0])) * temperature**2


@dataclass(frozen=True)
class DIST(Divergence):
    """`T^2 * (beta * (1 - r_inter) + gamma * (1 - r_intra))` with Pearson correlations of softened probabilities.

    `r_inter` correlates student and teacher over the classes, per position; `r_intra` over the positions of the batch,
    per class, mean over the classes. So its second part depends on how the data are cut into micro batches. Huang et
    al., "Knowledge Distillation from A Stronger Teacher" (2022). In the project's own comparison it helped nowhere:
    docs/results/objectives.md.

    Args:
        beta (`float`, defaults to 1.0): weight of the relation between classes.
        gamma (`float`, defaults to 1.0): weight of the relation within a class.

    Raises:
        ValueError: a negative weight.
    """

    across_rows: ClassVar[bool] = True

    beta: Annotated[float, NOT_NEGATIVE] = 1.0
    gamma: Annotated[float, NOT_NEGATIVE] = 1.0

    def __call__(self, student, teacher, temperature=1.0, valid_classes=None, target=None):  # type: ignore[no-untyped-def]
        q = log_probabilities(student, temperature, valid_classes).exp()
        p = log_probabilities(teacher, temperature, valid_classes).exp()
        inter = 1.0 - _pearson(q, p)  # (rows,)
        # Over a single row there is nothing to correlate.
        intra = (1.0 - _pearson(q.T, p.T)).mean() if len(q) > 1 else inter.new_zeros(())
        return (self.beta * inter + self.gamma * intra) * temperature**2


def _pearson(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.cosine_similarity(a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True), dim=-1, eps=1e-8)


DIVERGENCES: dict[str, type[Divergence]] = {
    "forward_kl": ForwardKL, "reverse_kl": ReverseKL, "jsd": JSD, "soft_ce": SoftCrossEntropy, "mse": MSE, "dkd": DKD,
    "dist": DIST,
}  # fmt: skip
"""The divergences by the names that `LogitKD` takes."""


def standardized(logits: torch.Tensor, valid_classes: torch.Tensor | None = None) -> torch.Tensor:
    """`(z - mean) / std` over the last axis, float32, so that a student need not match the scale of its teacher. Sun
    et al., "Logit Standardization in Knowledge Distillation" (2024), equation 9. Classes that are ruled out have no
    part in it, and stay so."""
    possible = ~logits.isneginf()
    valid_classes = possible if valid_classes is None else valid_classes & possible
    logits = _finite(logits)
    count = valid_classes.sum(-1, keepdim=True).clamp(min=1)
    mean = logits.masked_fill(~valid_classes, 0.0).sum(-1, keepdim=True) / count
    variance = (logits - mean).square().masked_fill(~valid_classes, 0.0).sum(-1, keepdim=True) / count
    return ((logits - mean) / (variance.sqrt() + 1e-7)).masked_fill(~valid_classes, RULED_OUT)


def binary_logits(logits: torch.Tensor) -> torch.Tensor:
    """Logits of two classes, yes and no, for which `softmax` gives `sigmoid(logits)`: shape `(..., labels, 2)`."""
    return torch.stack([logits, torch.zeros_like(logits)], dim=-1)


def log_tail(log_top: torch.Tensor) -> torch.Tensor:
    """Log of the probability that is left beside the given ones, `log(1 - sum exp(log_top))`, of shape `(..., 1)`."""
    total = torch.logsumexp(log_top, dim=-1, keepdim=True).clamp(max=-1e-7)
    # log(1 - exp(x)) in the form that is exact for this x (Mächler 2012, "Accurately computing log(1 - exp(-|a|))").
    return torch.where(total > -0.6931, torch.log(-torch.expm1(total)), torch.log1p(-total.exp()))


def coarse_log_probabilities(logits: torch.Tensor, indices: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Log probabilities of the classes `indices`, `(rows, k)`, with that of all others last: `(rows, k + 1)`, float32."""
    scaled = _finite(logits, temperature)
    log_top = scaled.gather(-1, indices) - torch.logsumexp(scaled, dim=-1, keepdim=True)
    return torch.cat([log_top, log_tail(log_top)], dim=-1)


@dataclass(frozen=True)
class TopLogits:
    """The `k` likeliest classes of a teacher, `(..., k)`, and their log probabilities with that of the rest last."""

    log_probabilities: torch.Tensor
    indices: torch.Tensor


class _Chunked(torch.autograd.Function):
    """Applies a function to chunks of rows; the backward pass computes it again, a chunk at a time."""

    @staticmethod
    def forward(ctx: Any, function: Any, rows: int, student: torch.Tensor, *others: Any) -> torch.Tensor:
        ctx.function, ctx.rows = function, rows
        ctx.save_for_backward(student, *others)
        return torch.cat([function(*parts) for parts in _cut(rows, student, *others)])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        student, *others = ctx.saved_tensors
        gradient = torch.empty_like(student)
        pieces = (torch.split(tensor, ctx.rows) for tensor in (gradient, grads[0]))
        parts = zip(*pieces, _cut(ctx.rows, student, *others), strict=True)
        for place, grad, (rows, *rest) in parts:
            with torch.enable_grad():
                rows = rows.detach().requires_grad_()
                place.copy_(torch.autograd.grad(ctx.function(rows, *rest), rows, grad)[0])
        return None, None, gradient, *(None for _ in others)


def _cut(rows: int, *tensors: torch.Tensor | None) -> Any:
    count = len(torch.split(tensors[0], rows))  # type: ignore[arg-type]
    return zip(*([None] * count if t is None else torch.split(t, rows) for t in tensors), strict=True)


def in_chunks(
    function: Callable[..., torch.Tensor], student: torch.Tensor, *others: torch.Tensor | None, elements: int = 2**24
) -> torch.Tensor:
    """`function(student, *others)` without ever holding more than a chunk of its temporaries.

    A divergence over a vocabulary makes several float32 tensors as large as the logits, and keeps some for the backward
    pass. Here rows are taken in chunks of `elements` logits, and computed once more in the backward pass. The gradient
    reaches `student` alone, which is of shape `(rows, classes)`; `others` are of shape `(rows, ...)` or `None`, and
    `function` gives one number per row. The default is 64 MiB of float32. Smaller tensors are not cut.
    """
    if student.numel() <= elements:
        return function(student, *others)
    rows = max(elements // student.shape[-1], 1)
    return _Chunked.apply(function, rows, student, *others)
