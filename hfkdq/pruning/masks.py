# SPDX-License-Identifier: Apache-2.0
"""Masks of pruned units, which only ever grow."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..protocols import FollowsPruning
from ..specs import PruningSpec
from .criteria import ImportanceStatistics
from .masked_norms import mask_norm_
from .targets import GroupTarget, LayerTarget, PruningTarget, WeightTarget


def units_kept(units: int, sparsity: float, multiple_of: int = 1) -> int:
    """`round(units * (1 - sparsity))`, or the multiple of `multiple_of` that is nearest to that; of fewer units all."""
    step = min(multiple_of, units)
    stays = units * (1.0 - sparsity)
    return round(stays) if step == 1 else min(units, max(1, round(stays / step)) * step)


def check_counts(targets: Sequence[PruningTarget], spec: PruningSpec) -> None:
    """Refuses a sparsity that would leave a target empty, or break groups that a module says it has. Raises
    `ValueError`: the target, what would be left, and why that cannot be."""
    sparsity, step = spec.sparsity or 0.0, spec.multiple_of
    if step > 1 and sparsity and all(units_kept(target.units, sparsity, step) == target.units for target in targets):
        raise ValueError(
            f"sparsity={sparsity} removes nothing, as multiple_of={step} keeps all units of every module. Choose a larger sparsity, or a "
            "smaller multiple."
        )
    for target in targets:
        kept = units_kept(target.units, sparsity, spec.multiple_of)
        protected = target.protected if isinstance(target, LayerTarget) else ()
        if spec.ranking == "local" and kept < max(1, len(protected)):
            raise ValueError(
                f"sparsity={sparsity} would leave {kept} of the {target.units} units ({spec.structure}) of {target.name or 'the model'}"
                f"{', of which some cannot go' if protected else ''}. Choose a smaller sparsity."
            )
        stack = target if isinstance(target, LayerTarget) and spec.removes else None
        if stack is not None and stack.best([0.0] * target.units, max(kept, 1)) is None:
            raise ValueError(
                f"No {kept} layers of {target.name} are in a pattern that the configuration can say. Choose another sparsity, or "
                "plain_checkpoint=False and load the result with hfkdq.load_pruned."
            )
        if (n_m := spec.kept_of) is not None and isinstance(target, WeightTarget) and target.shape[1] % n_m[1]:
            raise ValueError(
                f"{target.name} has {target.shape[1]} inputs, which groups of {n_m[1]} do not divide. Leave it out with "
                "exclude_modules, or choose another pattern."
            )
        if isinstance(target, GroupTarget) and spec.removes and spec.ranking == "local":
            _check_readers(target, target.units - kept)


def _check_readers(target: GroupTarget, gone: int) -> None:
    for entry in target.group.of_role("input"):
        try:
            if isinstance(entry.module, FollowsPruning):
                entry.module.check_inputs(entry.values.shape[entry.dim] - gone * entry.positions.shape[1])
        except ValueError as error:
            raise ValueError(f"{entry.name}: {error}") from error


class Masks:
    """One mask per target, true where a unit is pruned; `importance` scores the units."""

    def __init__(self, targets: Sequence[PruningTarget], spec: PruningSpec, importance: ImportanceStatistics) -> None:
        self.targets = list(targets)
        self.spec = spec
        self.importance = importance
        devices = [target.parts[0].values.device for target in self.targets]
        self.pruned = [torch.zeros(t.units, device=d).bool() for t, d in zip(self.targets, devices, strict=True)]
        self.sparsity = 0.0

    def counts(self) -> list[int]:
        return [int(mask.sum()) for mask in self.pruned]

    def grow_to(self, sparsity: float) -> None:
        """Prunes the units with the lowest scores until the share `sparsity` of them is pruned."""
        if sparsity <= self.sparsity:
            return
        self.sparsity = sparsity
        before = [mask.clone() for mask in self.pruned] if self.spec.cut == "mean" else []
        if self.spec.ranking == "global":
            self._grow_globally(sparsity)
        elif self.spec.kept_of is not None:
            for i in range(len(self.targets)):
                self._grow_groups(i, sparsity / (self.spec.sparsity or 1.0), *self.spec.kept_of)
        else:
            for i, target in enumerate(self.targets):
                count = target.units - units_kept(target.units, sparsity, self.spec.multiple_of)
                if count > int(self.pruned[i].sum()):
                    self.pruned[i][self._ranked(i).topk(count, largest=False, sorted=False).indices] = True
        for i, old in enumerate(before):
            self._fold_means(i, self.pruned[i] & ~old)

    def _ranked(self, i: int) -> Tensor:
        """Scores with pruned units below all others and protected ones above them."""
        scores = self.importance.scores(i).masked_fill(self.pruned[i], -torch.inf)
        target = self.targets[i]
        if isinstance(target, LayerTarget):  # those that will be left at the end stay, and others before
            left = units_kept(target.units, self.spec.sparsity or 0.0)
            alone = self.spec.ranking == "local" or len(self.targets) == 1
            kept = target.best(scores.tolist(), left) if alone else None
            scores[list(target.protected if kept is None else kept)] = torch.inf
        return scores

    def _grow_globally(self, sparsity: float) -> None:
        """All targets in one ranking; the best unit of each is out of reach, so that none is left empty."""
        ranked = []
        for i in range(len(self.targets)):
            scores = self._ranked(i)
            scores[scores.argmax()] = torch.inf
            ranked.append(scores.to(self.pruned[0].device))
        scores = torch.cat(ranked)
        reachable = int((scores < torch.inf).sum())
        count = min(len(scores) - units_kept(len(scores), sparsity), reachable)
        chosen = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
        chosen[scores.topk(count, largest=False, sorted=False).indices] = count > 0
        for mask, more in zip(self.pruned, torch.split(chosen, [len(entries) for entries in ranked]), strict=True):
            mask |= more.to(mask.device)

    def _grow_groups(self, i: int, share: float, n: int, m: int) -> None:
        """N:M: in the share `share` of the groups the `m - n` weights that matter least, cheapest groups first."""
        scores, mask = self.importance.scores(i).view(-1, m), self.pruned[i].view(-1, m)
        done = mask.any(dim=1)
        lowest = scores.topk(m - n, dim=1, largest=False)
        cost = lowest.values.sum(dim=1).masked_fill(done, -torch.inf)
        count = round(len(cost) * share)
        if count > int(done.sum()):
            groups = cost.topk(count, largest=False, sorted=False).indices
            groups = groups[~done[groups]]
            mask[groups.unsqueeze(1), lowest.indices[groups]] = True

    @torch.no_grad()
    def _fold_means(self, i: int, fresh: Tensor) -> None:
        """Adds to the biases behind the units that go now what they have brought on average."""
        target = self.targets[i]
        if not isinstance(target, GroupTarget) or not bool(fresh.any()):
            return
        for entry in target.group.of_role("input"):
            mean = self.importance.mean_input(i, entry.name)
            if mean is None:
                continue
            gone = entry.entries(fresh)
            weight = entry.values.float().masked_fill(~gone, 0.0)
            mean = mean.to(weight.device)
            entry.module.bias += mean @ weight if entry.dim == 0 else weight @ mean  # type: ignore[operator]

    def apply_(self, fade: float = 0.0) -> None:
        """Takes the pruned units out of what the model computes; `fade` is what is left of their weights, for decay."""
        for target, pruned in zip(self.targets, self.pruned, strict=True):
            if fade > 0.0:
                with torch.no_grad():
                    for part, mask in target.entries(pruned):
                        values = part.values
                        values.copy_(torch.where(mask, values * fade, values))
            else:
                target.apply_(pruned)

    def lift_(self) -> None:
        """Undoes masks that are no zeros in a tensor: bypassed layers and masked norms."""
        for target, pruned in zip(self.targets, self.pruned, strict=True):
            kept = torch.zeros_like(pruned)
            for norm in target.norms if isinstance(target, GroupTarget) else ():
                mask_norm_(norm, kept)
            if isinstance(target, LayerTarget):
                target.apply_(kept)
