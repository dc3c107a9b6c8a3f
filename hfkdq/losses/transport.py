# SPDX-License-Identifier: Apache-2.0
"""Distance between predictions over classes that have nothing to do with one another, such as two vocabularies.

A pure function of logits, computed in float32.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .divergences import log_probabilities


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
