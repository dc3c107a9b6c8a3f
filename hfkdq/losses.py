# SPDX-License-Identifier: Apache-2.0
"""Distances between what a student and a teacher give, per position, and their masked mean.

Pure tensor functions, computed in float32; they know no models, batches or weights.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


def masked_mean(values: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean of `values` over the positions where `mask` is nonzero.

    Args:
        values (`torch.Tensor`): one number per position, any shape.
        mask (`torch.Tensor`, *optional*): of the same shape; every position counts without it.

    Returns:
        `torch.Tensor`, 0-dimensional; 0 where nothing is valid.

    Raises:
        ValueError: a mask of another shape.
    """
    if mask is None:
        return values.mean()
    if mask.shape != values.shape:
        raise ValueError(
            f"The mask of shape {tuple(mask.shape)} does not fit positions of shape {tuple(values.shape)}."
        )
    mask = mask.to(device=values.device, dtype=torch.bool)
    return values.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)


def logit_kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """`T^2 * KL(softmax(teacher / T) || softmax(student / T))` per position.

    The factor `T^2` keeps the size of the gradient independent of the temperature (Hinton et al., "Distilling the
    Knowledge in a Neural Network", 2015).

    Args:
        student (`torch.Tensor` of shape `(..., classes)`): logits of the student.
        teacher (`torch.Tensor` of shape `(..., classes)`): logits of the teacher.
        temperature (`float`, defaults to 1.0): `T`, larger than 0.

    Returns:
        `torch.Tensor` of shape `(...)`, float32, at least 0 up to rounding.
    """
    log_student = F.log_softmax(student.float() / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher.float() / temperature, dim=-1)
    return F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(-1) * temperature**2


def mean_squared_error(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean over the last axis of `(student - teacher)^2`.

    Args:
        student (`torch.Tensor` of shape `(..., width)`): states of the student.
        teacher (`torch.Tensor` of shape `(..., width)`): states of the teacher.

    Returns:
        `torch.Tensor` of shape `(...)`, float32.
    """
    return (student.float() - teacher.float()).square().mean(-1)


def attention_kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL divergence of the student's attention distributions from the teacher's, mean over the heads.

    `1/H * sum_h KL(teacher[h, q] || student[h, q])` per query `q`, as in the attention transfer of Sun et al.,
    "MobileBERT" (2020).

    Args:
        student (`torch.Tensor` of shape `(batch, heads, queries, keys)`): attention probabilities.
        teacher (`torch.Tensor` of shape `(batch, heads, queries, keys)`): attention probabilities.

    Returns:
        `torch.Tensor` of shape `(batch, queries)`, float32. Keys to which the teacher gives 0 (padding) add nothing.
    """
    smallest = torch.finfo(torch.float32).tiny
    log_student = student.float().clamp(min=smallest).log()
    return F.kl_div(log_student, teacher.float(), reduction="none").sum(-1).mean(1)
