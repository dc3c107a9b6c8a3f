# SPDX-License-Identifier: Apache-2.0
"""Neurons and channels of any model, found by following a batch through it: what can only go together is one of them."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .following import STAYS, Axis, Following
from .proof import Probe
from .units import CONVOLUTIONS, Slice, UnitGroup

_LINEAR = (nn.Linear, Conv1D)


def traced_channels(model: PreTrainedModel) -> list[UnitGroup]:
    """Channels of convolutions, and of linear layers over maps (batch, height, width, channels).

    Those that are added to one another go together; a linear layer behind them loses what it reads of them.

    Raises:
        NoExample: there is no batch to follow.
    """
    found, over_maps = _traced(model)
    return [
        group
        for group in found
        if any(isinstance(entry.module, CONVOLUTIONS) or entry.name in over_maps for entry in group.slices)
    ]


def traced_neurons(model: PreTrainedModel) -> list[UnitGroup]:
    """What linear layers compute and linear layers alone read, with whatever handles each by itself between them.

    Raises:
        NoExample: there is no batch to follow.
    """
    found, over_maps = _traced(model)
    return [
        group
        for group in found
        if all(
            isinstance(entry.module, _LINEAR) and entry.name not in over_maps
            for entry in (*group.of_role("input"), *group.of_role("output"))
            if getattr(entry.module, "groups", 1) == 1
        )
    ]


def _traced(model: PreTrainedModel) -> tuple[list[UnitGroup], set[str]]:
    """All units that can go, in groups of those that lie in the same tensors, and the linear layers over maps."""
    probe = Probe(model)
    saved = {n: v for n, v in probe.twin.state_dict(keep_vars=True).items() if isinstance(v, torch.Tensor)}
    first = {id(values): name for name, values in reversed(saved.items()) if values.is_floating_point()}
    parameters = {name: values for name, values in saved.items() if first.get(id(values)) == name}
    over_maps: set[str] = set()
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: over_maps.add(name) if args[0].dim() > 3 else None)
        for name, module in probe.twin.named_modules()
        if isinstance(module, _LINEAR)
    ]
    with Following(parameters) as following:
        found = probe.run(probe.twin)
    following.keep(tree_leaves(dict(found)))
    for handle in handles:
        handle.remove()
    return _groups(model, following), over_maps


def _groups(model: PreTrainedModel, following: Following) -> list[UnitGroup]:
    units: dict[int, dict[Axis, list[int]]] = defaultdict(dict)
    for axis, labels in following.axes.items():
        for place, label in enumerate(labels.tolist()):
            root = following.root(label)
            if root != STAYS:
                units[root].setdefault(axis, []).append(place)
    alike: dict[tuple[tuple[Axis, int], ...], list[dict[Axis, list[int]]]] = defaultdict(list)
    for unit in units.values():
        alike[tuple((axis, len(places)) for axis, places in unit.items())].append(unit)
    groups = []
    for signature, members in alike.items():
        slices = []
        for (name, dim), _ in signature:
            owner, _, tensor = name.rpartition(".")
            positions = torch.tensor([unit[name, dim] for unit in members])
            slices.append(Slice(owner, model.get_submodule(owner), tensor, dim, positions))
        computing = [entry.name for entry in slices if entry.role == "output"]
        if len(members) > 1 and computing and any(entry.role == "input" for entry in slices):
            groups.append(UnitGroup(computing[0], len(members), tuple(slices), followed=True))
    return groups
