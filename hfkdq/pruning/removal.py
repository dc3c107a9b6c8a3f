# SPDX-License-Identifier: Apache-2.0
"""Cutting neurons out of the feed-forward layers of a model, so that its configuration describes what is left.

Knows which neurons go, not why.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from ..architecture import FeedForward, width_field


def remove_neurons_(model: PreTrainedModel, blocks: Sequence[FeedForward], pruned: Sequence[torch.Tensor]) -> None:
    """Removes neurons from every block and writes the new width into the configuration.

    Modules stay what they are, with smaller parameters; an optimizer that holds the former ones is stale.

    Args:
        model (`PreTrainedModel`): the model that the blocks belong to.
        blocks (sequence of `FeedForward`): all feed-forward blocks of the model.
        pruned (sequence of `torch.Tensor`): for each block a bool tensor of shape `(width,)`, true for the neurons
            to remove; the same number in every block.

    Raises:
        ValueError: blocks that would be left with different widths.
    """
    kept = [(~mask).nonzero().flatten() for mask in pruned]  # (neurons left,) each
    widths = sorted({len(indices) for indices in kept})
    if len(widths) != 1:
        raise ValueError(
            f"The feed-forward layers would be left with different widths ({', '.join(map(str, widths))}), which "
            f"{width_field(model.config)} cannot say. Remove the same number of neurons from each."
        )
    for block, indices in zip(blocks, kept, strict=True):
        for _, linear in block.inputs:
            linear.weight = _selected(linear.weight, 0, indices)
            if linear.bias is not None:
                linear.bias = _selected(linear.bias, 0, indices)
            linear.out_features = widths[0]
            follow = getattr(linear, "keep_outputs_", None)
            if follow is not None:  # a module that knows more of its channels than weight and bias
                follow(indices)
        for _, linear in block.outputs:
            linear.weight = _selected(linear.weight, 1, indices)
            linear.in_features = widths[0]
    setattr(model.config, width_field(model.config), widths[0])


def _selected(parameter: torch.Tensor, dim: int, indices: torch.Tensor) -> nn.Parameter:
    values = parameter.detach().index_select(dim, indices)
    return nn.Parameter(values, requires_grad=parameter.requires_grad)
