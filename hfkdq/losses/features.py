# SPDX-License-Identifier: Apache-2.0
"""Distances between the hidden states and attentions of a student and a teacher, one number per position, and their
mean. Pure tensor functions, computed in float32."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def mean_squared_error(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean over the last axis of `(student - teacher)^2`.

    Args:
        student (`torch.Tensor` of shape `(..., width)`): states of the student.
        teacher (`torch.Tensor` of shape `(..., width)`): states of the teacher.

    Returns:
        `torch.Tensor` of shape `(...)`, float32.
    """
    return (student.float() - teacher.float()).square().mean(-1)


def cosine_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """`1 - cos(student, teacher)` over the last axis, in [0, 2]; arguments and result as of [`mean_squared_error`]."""
    return 1.0 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)


def normalized_squared_error(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """`|s / |s| - t / |t||^2` over the last axis; arguments and result as of [`mean_squared_error`].

    Sun et al., "Patient Knowledge Distillation for BERT Model Compression" (2019), equation 7.
    """
    return (F.normalize(student.float(), dim=-1) - F.normalize(teacher.float(), dim=-1)).square().sum(-1)


def gaussian_nll(mean: torch.Tensor, log_variance: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of `target` under a Gaussian per channel, without its constant.

    `mean over channels c of 1/2 * (log v_c + (target_c - mean_c)^2 / v_c)`. It can be negative. Ahn et al.,
    "Variational Information Distillation for Knowledge Transfer" (2019), equation 5, as a mean over the channels.

    `mean`, `log_variance` (`log v`) and `target` are of shape `(..., channels)`, the result of shape `(...)`, float32.
    """
    log_variance = log_variance.float()
    return 0.5 * (log_variance + (target.float() - mean.float()).square() * (-log_variance).exp()).mean(-1)


def mean_state(states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """One vector per example, `(batch, width)`, float32: the mean of its states over the positions that count, which are
    those of `mask`, `(batch, seq)`, or all without it; 0 where none does. States are of shape `(batch, seq, width)`; or
    feature maps, `(batch, channels, height, width)`, of which all positions count; or vectors, `(batch, width)`,
    already. Raises `ValueError`: a mask over another number of positions."""
    states = states.float()
    if states.dim() != 3:
        return states.flatten(2).mean(-1) if states.dim() > 3 else states
    if mask is not None and mask.shape != states.shape[:2]:
        raise ValueError(
            f"States over {states.shape[1]} positions do not fit a mask of shape {tuple(mask.shape)}. Virtual tokens, "
            "for example of prompt tuning, add positions; a teacher that is fed other texts needs a mask of its own."
        )
    return masked_mean(states, None if mask is None else mask.unsqueeze(-1).expand_as(states), dim=1)


def attention_kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL divergence of the student's attention distributions from the teacher's, mean over the heads.

    `1/H * sum_h KL(teacher[h, q] || student[h, q])` per query `q`, as in the attention transfer of Sun et al.,
    "MobileBERT" (2020). Different numbers of heads are compared by the mean of each model's heads.

    Args:
        student (`torch.Tensor` of shape `(batch, heads, queries, keys)`): attention probabilities.
        teacher (`torch.Tensor` of shape `(batch, teacher_heads, queries, keys)`): attention probabilities.

    Returns:
        `torch.Tensor` of shape `(batch, queries)`, float32. Keys to which the teacher gives 0 (padding) add nothing.
    """
    student, teacher = _paired_heads(student, teacher)
    log_student = student.clamp(min=torch.finfo(torch.float32).tiny).log()
    return F.kl_div(log_student, teacher, reduction="none").sum(-1).mean(1)


def attention_mse(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Squared difference of attention probabilities, mean over the heads and over the keys that count.

    `1/(H K) * sum_h sum_k (student[h, q, k] - teacher[h, q, k])^2` per query `q`. Jiao et al., "TinyBERT" (2020),
    equation 7, which takes it of the scores before the softmax rather than of the probabilities after it.
    Arguments and result as of [`attention_kl`]; `mask`, of shape `(batch, keys)`, says which keys count.
    """
    student, teacher = _paired_heads(student, teacher)
    squares = (student - teacher).square().mean(1)  # (batch, queries, keys)
    return masked_mean(squares, None if mask is None else mask.unsqueeze(1).expand_as(squares), dim=-1)


def _paired_heads(student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    student, teacher = student.float(), teacher.float()
    if student.shape[1] == teacher.shape[1]:
        return student, teacher
    return student.mean(1, keepdim=True), teacher.mean(1, keepdim=True)


def activation_map_distance(student: torch.Tensor, teacher: torch.Tensor, power: float = 2.0) -> torch.Tensor:
    """Squared distance between where two feature maps are active, one number per example.

    `|q_student / |q_student| - q_teacher / |q_teacher||^2` with `q = vec(sum over channels c of |F_c|^p)`. Zagoruyko and
    Komodakis, "Paying More Attention to Attention" (2017), equation 2. The larger map is pooled to the size of the other.

    Maps are of shape `(batch, channels, height, width)`, of other channels, heights and widths in the teacher; `power` is
    `p`, at least 1. The result is float32 of shape `(batch,)`.
    """
    maps = [features.float().abs().pow(power).sum(1) for features in (student, teacher)]  # (batch, height, width)
    size = tuple(min(sides) for sides in zip(*(m.shape[-2:] for m in maps), strict=True))
    ours, theirs = (F.normalize(F.adaptive_avg_pool2d(m, size).flatten(1), dim=-1) for m in maps)
    return (ours - theirs).square().sum(-1)


def masked_mean(values: torch.Tensor, mask: torch.Tensor | None = None, dim: int | None = None) -> torch.Tensor:
    """Mean of `values` over the positions where `mask` is nonzero.

    Args:
        values (`torch.Tensor`): one number per position, any shape.
        mask (`torch.Tensor`, *optional*): of the same shape; every position counts without it.
        dim (`int`, *optional*): the axis to take the mean over; all of them by default.

    Returns:
        `torch.Tensor`, 0-dimensional or without the axis `dim`; 0 where nothing is valid.

    Raises:
        ValueError: a mask of another shape.
    """
    if mask is None:
        return values.mean(dim)
    if mask.shape != values.shape:
        raise ValueError(f"A mask of shape {tuple(mask.shape)} does not fit positions of shape {tuple(values.shape)}.")
    mask = mask.to(device=values.device, dtype=torch.bool)
    return values.masked_fill(~mask, 0.0).sum(dim) / mask.sum(dim).clamp(min=1)
