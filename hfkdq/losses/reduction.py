# SPDX-License-Identifier: Apache-2.0
"""The mean over those positions of a batch that count."""

from __future__ import annotations

import torch


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
        raise ValueError(
            f"The mask of shape {tuple(mask.shape)} does not fit positions of shape {tuple(values.shape)}."
        )
    mask = mask.to(device=values.device, dtype=torch.bool)
    return values.masked_fill(~mask, 0.0).sum(dim) / mask.sum(dim).clamp(min=1)
