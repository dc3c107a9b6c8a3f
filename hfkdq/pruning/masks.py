# SPDX-License-Identifier: Apache-2.0
"""Which units of the targets are pruned; the set only ever grows.

Knows numbers of units, not when they change.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..specs import PruningSpec
from .targets import NeuronTarget, PruningTarget


def units_kept(units: int, sparsity: float) -> int:
    """`max(1, round(units * (1 - sparsity)))`."""
    return max(1, round(units * (1.0 - sparsity)))


def check_widths(targets: Sequence[PruningTarget], spec: PruningSpec) -> None:
    """Refuses neurons to be removed before modules that need another number of inputs, as they say themselves.

    Raises:
        ValueError: such a module, with its reason.
    """
    for target in targets:
        if isinstance(target, NeuronTarget):
            for name, linear in target.block.outputs:
                check = getattr(linear, "check_inputs", None)
                try:
                    if check is not None:
                        check(units_kept(linear.in_features, spec.sparsity))
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from error


class Masks:
    """One mask per target, true where a unit is pruned.

    Args:
        targets (sequence of `PruningTarget`): what is pruned.
        from_zeros (`bool`, defaults to `False`): take units that are zero already as pruned, for a model that comes
            from a checkpoint of a pruned one; otherwise nothing is pruned yet.
    """

    def __init__(self, targets: Sequence[PruningTarget], from_zeros: bool = False) -> None:
        self.targets = list(targets)
        self.pruned = [target.scores() == 0 for target in self.targets]
        if not from_zeros:
            for mask in self.pruned:
                mask.fill_(False)
        self._counts = [int(mask.sum()) for mask in self.pruned]

    def grow_to(self, sparsity: float) -> None:
        """Prunes the units with the lowest scores of every target until the share `sparsity` of them is pruned."""
        for i, target in enumerate(self.targets):
            units = self.pruned[i].numel()
            count = units - units_kept(units, sparsity)
            if count > self._counts[i]:
                # A score below every other keeps pruned units pruned, whatever the optimizer has made of them.
                scores = target.scores().masked_fill_(self.pruned[i], -1.0)
                self.pruned[i][scores.topk(count, largest=False, sorted=False).indices] = True
                self._counts[i] = count

    def apply_(self) -> None:
        """Zeroes the pruned units in the model."""
        for target, pruned in zip(self.targets, self.pruned, strict=True):
            target.zero_(pruned)
