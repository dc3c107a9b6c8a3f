# SPDX-License-Identifier: Apache-2.0
"""Norms over some of their channels, so that a model with a narrower hidden width can be trained in its old shapes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class MaskedNorm:
    """A norm whose statistics are those of the channels that are not pruned. A pruned channel comes in as zero and has
    a weight of zero. The mean of squares over `h` channels of which `k` are left is `k / h` of that over the ones
    left, so an input times `sqrt(h / k)`, and the output divided by it, is exact for norms without a mean; `LayerNorm`
    is computed on the channels left."""

    pruned: Tensor

    def forward(self, hidden_states: Tensor) -> Tensor:
        kept = ~self.pruned
        if isinstance(self, nn.LayerNorm):
            bias = None if self.bias is None else self.bias[kept]
            states = hidden_states[..., kept]
            values = nn.functional.layer_norm(states, states.shape[-1:], self.weight[kept], bias, self.eps)
            out = values.new_zeros(hidden_states.shape)
            return out.masked_scatter(kept.expand_as(out), values)
        scale = (len(kept) / kept.sum()) ** 0.5
        return super().forward(hidden_states * scale) / scale  # type: ignore[misc]


_CLASSES: dict[type, type] = {}


def mask_norm_(norm: nn.Module, pruned: Tensor) -> None:
    """Leaves the channels `pruned`, a bool tensor, out of a norm; all of them count again if it is all false."""
    original = getattr(norm, "_unmasked_class", type(norm))
    if not bool(pruned.any()):
        if original is not type(norm):
            norm.__class__ = original
            del norm.pruned, norm._unmasked_class
        return
    if original is type(norm):
        made = _CLASSES.setdefault(original, type(f"Masked{original.__name__}", (MaskedNorm, original), {}))
        norm.__class__ = made
        object.__setattr__(norm, "_unmasked_class", original)
    weight: Any = norm.weight
    object.__setattr__(norm, "pruned", pruned.detach().to(weight.device, torch.bool).clone())
