# SPDX-License-Identifier: Apache-2.0
"""Distances between the hidden states and attentions of a student and a teacher, one number per position.

Pure tensor functions, computed in float32; they know no models, batches or weights.
"""

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
