# SPDX-License-Identifier: Apache-2.0
"""Distances between how a student and a teacher relate positions, or the examples of a batch, to one another. Pure
tensor functions, computed in float32; a relation lies within one model, so widths may differ."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from .divergences import kl, log_probabilities


def relation_kl(
    student: torch.Tensor, teacher: torch.Tensor, heads: int, mask: torch.Tensor | None = None, causal: bool = False
) -> torch.Tensor:
    """KL divergence between the self-attention relations of one kind of vector: queries, keys or values.

    The vectors `A` are cut into `heads` parts of width `d`, and `R[h] = softmax(A_h A_h^T / sqrt(d))` relates every
    position to every other. The value is `1/H * sum_h KL(R_teacher[h, i] || R_student[h, i])` per position `i`. Wang et
    al., "MiniLMv2: Multi-Head Self-Attention Relation Distillation for Compressing Pretrained Transformers" (2021).

    Args:
        student (`torch.Tensor` of shape `(batch, seq, width)`): vectors of the student.
        teacher (`torch.Tensor` of shape `(batch, seq, teacher_width)`): vectors of the teacher.
        heads (`int`): number of relation heads, which divides both widths.
        mask (`torch.BoolTensor` of shape `(batch, seq)`, *optional*): positions to relate to; all without it.
        causal (`bool`, defaults to `False`): relate a position to itself and those before it only.

    Returns:
        `torch.Tensor` of shape `(batch, seq)`, float32.
    """
    seq = student.shape[1]
    related = torch.ones(1, 1, seq, seq, dtype=torch.bool, device=student.device)
    if causal:
        related = related.tril()
    if mask is not None:
        related = related & mask[:, None, None, :]
    log_student, log_teacher = (_log_relations(x, heads, related) for x in (student, teacher))
    return kl(log_teacher, log_student).mean(1)


def _log_relations(vectors: torch.Tensor, heads: int, related: torch.Tensor) -> torch.Tensor:
    parts = vectors.float().reshape(*vectors.shape[:2], heads, -1).transpose(1, 2)  # (batch, heads, seq, width/head)
    scores = parts @ parts.mT / math.sqrt(parts.shape[-1])  # (batch, heads, seq, seq)
    # The smallest number instead of minus infinity: a padded position may have nothing to relate to.
    return F.log_softmax(scores.masked_fill(~related, torch.finfo(scores.dtype).min), dim=-1)


def relational_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Difference of the distances between examples, each divided by their mean in the batch.

    `mean over j != i of huber(d_student[i, j], d_teacher[i, j])` per example `i`, where `d[i, j] = |x_i - x_j| / mu` and
    `mu` is the mean over all pairs that are apart. Park et al., "Relational Knowledge Distillation" (2019).

    Args:
        student (`torch.Tensor` of shape `(batch, width)`): one vector per example.
        teacher (`torch.Tensor` of shape `(batch, teacher_width)`): one vector per example.

    Returns:
        `torch.Tensor` of shape `(batch,)`, float32; 0 for a batch of 1. The gradient is finite, also where examples are
        the same.
    """
    ours, theirs = (_scaled_distances(x.float()) for x in (student, teacher))
    return F.smooth_l1_loss(ours, theirs, reduction="none").sum(1) / max(len(student) - 1, 1)


def relational_angle(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Difference of the angles between examples.

    `mean over i, k of huber(cos_student[i, j, k], cos_teacher[i, j, k])` per example `j`, where `i`, `j` and `k` are three
    different examples and `cos[i, j, k]` is the cosine of the angle at `x_j` between `x_i` and `x_k`. Park et al.,
    "Relational Knowledge Distillation" (2019). Arguments and result as of [`relational_distance`]; 0 below 3 examples.
    """
    count = len(student)
    ours, theirs = (_cosines(x.float()) for x in (student, teacher))
    same = torch.eye(count, dtype=torch.bool, device=student.device)
    # Where i or k is j, the cosines are 0 in both models already.
    values = F.smooth_l1_loss(ours, theirs, reduction="none").masked_fill(same, 0.0)
    return values.sum((1, 2)) / max((count - 1) * (count - 2), 1)


def _differences(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Differences, distances and which pairs are apart; to the others there is no direction, and no gradient."""
    differences = vectors.unsqueeze(0) - vectors.unsqueeze(1)  # (batch, batch, width), from the first to the second
    squares, lengths = differences.square().sum(-1), vectors.square().sum(-1)
    # Closer than float32 tells apart; without a mask the square root of 0 has an infinite slope.
    apart = squares > 1e-10 * (lengths.unsqueeze(0) + lengths.unsqueeze(1))
    return differences, squares.where(apart, 1.0).sqrt().where(apart, 0.0), apart


def _scaled_distances(vectors: torch.Tensor) -> torch.Tensor:
    _, distances, apart = _differences(vectors)
    mean = distances.sum() / apart.sum().clamp(min=1)
    return distances / mean.where(apart.any(), 1.0)


def _cosines(vectors: torch.Tensor) -> torch.Tensor:
    differences, distances, apart = _differences(vectors)
    directions = (differences / distances.where(apart, 1.0).unsqueeze(-1)).where(apart.unsqueeze(-1), 0.0)
    return directions @ directions.mT  # (batch, batch, batch): at the first, between the second and the third


def similarity_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Difference of the similarities between examples.

    `1/b * |g_student[i] - g_teacher[i]|^2` per example `i` of `b`, where `g[i]` is row `i` of `X X^T`, scaled to length
    1. Tung and Mori, "Similarity-Preserving Knowledge Distillation" (2019). Arguments and result as of
    [`relational_distance`].
    """
    ours, theirs = (_similarities(x.float()) for x in (student, teacher))
    return (ours - theirs).square().mean(1)


def _similarities(vectors: torch.Tensor) -> torch.Tensor:
    products = vectors @ vectors.T  # (batch, batch)
    squares = products.square().sum(1, keepdim=True)
    some = squares > 0
    return (products / squares.where(some, 1.0).sqrt()).where(some, 0.0)


def info_nce(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float = 0.07, excluded: torch.Tensor | None = None
) -> torch.Tensor:
    """Cross-entropy of telling an example's teacher vector from those of the other examples.

    `-log(exp(s_i . t_i / T) / sum_j exp(s_i . t_j / T))` per example `i`, of vectors scaled to length 1. It bounds the
    mutual information of both from below: `I >= log(batch) - value`. Van den Oord et al., "Representation Learning with
    Contrastive Predictive Coding" (2018).

    Both models have vectors of shape `(batch, width)`; the result is `(batch,)`, float32, and 0 without other examples.
    `excluded`, of shape `(batch, batch)`, says which `j` are left out of the sum for which `i`; never `i` itself.
    """
    scores = F.normalize(student.float(), dim=-1) @ F.normalize(teacher.float(), dim=-1).T / temperature
    if excluded is not None:
        same = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
        scores = scores.masked_fill(excluded & ~same, torch.finfo(scores.dtype).min)
    return -F.log_softmax(scores, dim=-1).diagonal()


def sorted_distance(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """`sum_i |p(i) - q(i)|` per position, where `p(i)` and `q(i)` are the `i`-th largest probabilities of either model.

    The fewer probabilities are filled up with zeros. It is the Wasserstein distance between the two predictions where all
    classes are equally far from one another. Boizard et al., "Towards Cross-Tokenizer Distillation: the Universal Logit
    Distillation Loss for LLMs" (2024), equation 3, which has `T = 1`.

    Args:
        student (`torch.Tensor` of shape `(..., classes)`): logits of the student.
        teacher (`torch.Tensor` of shape `(..., other classes)`): logits of the teacher.
        temperature (`float`, defaults to 1.0): `T`, larger than 0; probabilities are `softmax(logits / T)`.

    Returns:
        `torch.Tensor` of shape `(...)`, float32, in [0, 2].
    """
    # The order of the logits is that of the probabilities, and is found without rounding them first.
    q = log_probabilities(student.sort(dim=-1, descending=True).values, temperature).exp()
    p = log_probabilities(teacher.sort(dim=-1, descending=True).values, temperature).exp()
    missing = q.shape[-1] - p.shape[-1]
    p, q = F.pad(p, (0, max(missing, 0))), F.pad(q, (0, max(-missing, 0)))
    return (p - q).abs().sum(-1)
