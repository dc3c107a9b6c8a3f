# SPDX-License-Identifier: Apache-2.0
"""Which entries of the parameters of a model can only go together, found by following one batch through it.

It knows operations of PyTorch, and no names of modules or of families.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

STAYS = 0
"""The label of what cannot go: it comes from nothing that could, or from several things at once."""

Axis = tuple[str, int]
"""Name of a tensor in the state dict, and one of its dimensions."""

_FACTORS = {"mm": (0, 1), "addmm": (1, 2), "bmm": (0, 1)}
"""Products of matrices, with the places of the two factors among the arguments."""


class Following(TorchDispatchMode):
    """Gives every tensor that is computed while it lasts labels for what its entries come from.

    Every place along every dimension of a parameter is a label of its own to begin with. Labels become one where an
    operation needs the one with the other: an input of a layer with the column that reads it, the two summands of a residual
    connection. An activation mostly has one label for each entry, a weight one for each of its dimensions.

    Args:
        parameters (`dict`): tensors by name.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.axes: dict[Axis, Tensor] = {}
        self._parents = [STAYS]
        self._labels = WeakTensorKeyDictionary()
        self._weights = WeakTensorKeyDictionary()  # parameters, and what is computed of them alone
        for name, values in parameters.items():
            found = []
            for dim, size in enumerate(values.shape):
                first = len(self._parents)
                self._parents += range(first, first + size)
                self.axes[name, dim] = torch.arange(first, first + size)
                found.append(_laid_out(self.axes[name, dim], values, dim))
            self._labels[values] = tuple(labels for labels in found if _changes(labels))
            self._weights[values] = True

    def root(self, label: int) -> int:
        """The one label that stands for all that are one with `label`."""
        while self._parents[label] != label:
            self._parents[label] = self._parents[self._parents[label]]
            label = self._parents[label]
        return label

    def keep(self, values: Iterable[Any]) -> None:
        """All that tensors come from stays."""
        for value in values:
            for labels in self._of(value):
                self._unite(labels, torch.tensor(STAYS))

    def _of(self, value: Any) -> tuple[Tensor, ...]:
        has_entries = isinstance(value, Tensor) and value.numel() > 0  # as not of no registers
        found: tuple[Tensor, ...] = self._labels.get(value, ()) if has_entries else ()
        if any(labels.shape != value.shape for labels in found):  # it was given another shape in place, as in a GRU
            self._labels[value] = ()
            for labels in found:
                self._unite(labels, torch.tensor(STAYS))
            return ()
        return found

    def _unite(self, one: Tensor, other: Tensor) -> None:
        """Makes labels one that lie at the same place."""
        one, other = torch.broadcast_tensors(one, other)
        for dim in range(one.dim()):  # what is the same throughout is looked at once
            if one.stride(dim) == 0 and other.stride(dim) == 0:
                one, other = one.narrow(dim, 0, 1), other.narrow(dim, 0, 1)
        for first, second in torch.stack([one.flatten(), other.flatten()]).unique(dim=1).t().tolist():
            low, high = sorted((self.root(first), self.root(second)))
            self._parents[high] = low  # so that STAYS, the lowest, wins

    def _along(self, value: Tensor, dim: int) -> Tensor:
        """The labels along a dimension that change in no other; elsewhere `STAYS`."""
        for labels in self._of(value):
            if _changes(labels) == {dim - value.dim()}:
                return labels[tuple(slice(None) if d == dim else 0 for d in range(value.dim()))]
        return torch.full((value.shape[dim],), STAYS)

    def _keep_others(self, value: Tensor, dim: int) -> None:
        """What changes in other dimensions than `dim` stays."""
        for labels in self._of(value):
            if _changes(labels) != {dim - value.dim()}:
                self._unite(labels, torch.tensor(STAYS))

    def _give(self, value: Tensor, labels: Iterable[Tensor]) -> None:
        normal = (_normal(entry) for entry in labels)
        self._labels[value] = tuple(entry for entry in normal if entry is not None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        with _disable_current_modes():
            if any(self._of(value) for value in inputs):
                self._follow(func, args, kwargs, inputs, outputs)
            if inputs and all(value in self._weights for value in inputs):
                self._weights.update(dict.fromkeys(outputs, True))
        return out

    def _follow(self, func: Any, args: Any, kwargs: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        name = func.overloadpacket.__name__
        if name == "convolution":
            self._convolve(outputs[0], args[0], args[1], args[2], args[6], args[8])
        elif name in _FACTORS:
            one, other = (args[place] for place in _FACTORS[name])
            self._multiply(outputs[0], one, other, args[0] if name == "addmm" else None)
        elif "batch_norm" in name:
            self._normalize(outputs[0], args[0], args[1:5], args[0].shape[1])
        elif name == "native_group_norm":
            self._normalize(outputs[0], args[0], args[1:3], args[6])
        elif torch.Tag.pointwise in func.tags:
            self._combine(outputs, inputs)
        else:
            found = None if func._schema.is_mutable else self._moved(func, args, kwargs, inputs, outputs)
            if found is None:
                self.keep(inputs)
            else:
                for value, labels in zip(outputs, found, strict=True):
                    self._give(value, labels)

    def _convolve(self, out: Tensor, x: Tensor, weight: Tensor, bias: Any, transposed: bool, groups: int) -> None:
        if transposed or x.dim() != weight.dim():
            self.keep([x, weight, bias])
            return
        given, made = self._along(x, 1), self._along(weight, 0)
        self._keep_others(x, 1)
        if groups == 1:
            self._unite(given, self._along(weight, 1))
        else:  # a group goes as a whole, with its inputs and its outputs
            self._unite(self._along(weight, 1), torch.tensor(STAYS))
            together = torch.cat([given.view(groups, -1), made.view(groups, -1)], dim=1)
            self._unite(together, together[:, :1])
        if bias is not None:
            self._unite(made, self._along(bias, 0))
        self._give(out, [_laid_out(made, out, 1)])

    def _multiply(self, out: Tensor, one: Tensor, other: Tensor, bias: Any) -> None:
        if one not in self._weights and other not in self._weights:  # the parts of an attention go as heads
            self.keep([one, other])
            return
        self._unite(self._along(one, one.dim() - 1), self._along(other, other.dim() - 2))
        left = []
        for value, read in ((one, -1), (other, -2)):
            for labels in self._of(value):
                if read not in _changes(labels):
                    left.append(labels.narrow(read, 0, 1).expand(out.shape))
                elif _changes(labels) != {read}:
                    self._unite(labels, torch.tensor(STAYS))
        for labels in left if bias is not None else ():
            if -1 in _changes(labels):
                self._unite(labels, self._along(bias, bias.dim() - 1))
        self._give(out, left)

    def _normalize(self, out: Tensor, x: Tensor, own: Sequence[Tensor | None], groups: int) -> None:
        """A norm of each channel, or of groups of them that go as a whole; `own` are its tensors."""
        given = self._along(x, 1)
        self._keep_others(x, 1)
        for values in own:
            if values is not None:
                self._unite(given, self._along(values, 0))
        together = given.view(groups, -1)
        sized = own[0] is not None or groups == len(given)  # what is left says how many groups there are
        self._unite(together, together[:, :1] if sized else torch.tensor(STAYS))
        self._give(out, [_laid_out(given, out, 1)])

    def _combine(self, outputs: list[Tensor], inputs: list[Tensor]) -> None:
        """An operation on entries at the same place."""
        found: list[Tensor] = []
        for labels in (entry for value in inputs for entry in self._of(value)):
            same = next((other for other in found if _changes(other) == _changes(labels)), None)
            if same is not None:
                self._unite(same, labels)
                continue
            for other in found:
                if _changes(other) & _changes(labels):
                    self._unite(other, torch.tensor(STAYS))
                    self._unite(labels, torch.tensor(STAYS))
            found.append(labels)
        for labels in found:
            for value in inputs:  # numbers of no parameter, such as a table of positions, could not follow
                wide = any(-dim <= value.dim() and value.shape[dim] > 1 for dim in _changes(labels))
                if wide and not any(_changes(own) & _changes(labels) for own in self._of(value)):
                    self._unite(labels, torch.tensor(STAYS))
        for value in outputs:
            self._give(value, [labels.expand(value.shape) for labels in found])

    def _moved(
        self, func: Any, args: Any, kwargs: Any, inputs: list[Tensor], outputs: list[Tensor]
    ) -> list[list[Tensor]] | None:
        """The labels of what an operation gives that moves entries, or averages some of one label; `None` of any other.

        It is told by running it on numbers that stand for the labels, twice.
        """
        if sum(len(self._of(value)) > 1 for value in inputs) > 1:
            return None
        moved: list[list[Tensor]] = [[] for _ in outputs]
        owners = list({id(value): value for value in inputs if self._of(value)}.values())
        for together in zip_longest(*(self._of(value) for value in owners)):
            known = torch.cat([_compact(labels).flatten() for labels in together if labels is not None]).unique()
            known = known[known != STAYS]
            decoded: list[list[Tensor | None]] = []
            for seed in range(2):
                order = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed))
                numbers = torch.zeros(int(known.max()) + 1, dtype=torch.float64)
                numbers[known] = 1.0 + order.double() / len(known)
                stands = {
                    id(value): torch.empty_like(value, dtype=torch.float64).copy_(numbers[labels])
                    for value, labels in zip(owners, together, strict=True)
                    if labels is not None
                }
                swapped = tree_map(lambda leaf, by=stands: by.get(id(leaf), leaf), (args, kwargs))
                try:
                    found = [v for v in tree_leaves(func(*swapped[0], **swapped[1])) if isinstance(v, Tensor)]
                except Exception:  # whatever an operation raises that is not for such numbers
                    return None
                decoded.append([_decoded(value, known, order) for value in found])
                if not any(value is not None for value in decoded[-1]):
                    return None
            for place, (one, other) in enumerate(zip(*decoded, strict=True)):
                if one is None or other is None:
                    continue  # indices and the like
                if bool((one < 0).any()) or not torch.equal(one, other):
                    return None
                moved[place].append(one)
        return moved


def _decoded(values: Tensor, known: Tensor, order: Tensor) -> Tensor | None:
    """The labels that numbers stand for: -1 where there is none such, `STAYS` for zero; `None` if they are no such numbers."""
    if not values.is_floating_point():
        return None
    place = (values.double() - 1.0) * len(known)
    nearest = place.round().clamp(0, len(known) - 1)
    labels = known[order.argsort()][nearest.long()]
    labels[(place - nearest).abs() > 1e-3] = -1  # of the distance between two
    labels[values == 0] = STAYS
    return labels


def _laid_out(along: Tensor, value: Tensor, dim: int) -> Tensor:
    """Labels along a dimension of a tensor, the same in all others."""
    return along.view([-1 if d == dim else 1 for d in range(value.dim())]).expand(value.shape)


def _compact(labels: Tensor) -> Tensor:
    for dim in range(labels.dim()):
        if labels.stride(dim) == 0:
            labels = labels.narrow(dim, 0, 1)
    return labels


def _changes(labels: Tensor) -> set[int]:
    """The dimensions that labels change in, counted from the last, which is -1."""
    return {d - labels.dim() for d in range(labels.dim()) if labels.shape[d] > 1 and labels.stride(d) != 0}


def _normal(labels: Tensor) -> Tensor | None:
    """Labels that are stored once along dimensions that they do not change in; `None` if there are none.

    Places without one among those of one label, such as padding adds, count as that label.
    """
    if len(_changes(labels)) < 2:
        return labels if bool(_compact(labels).any()) else None
    if not bool(labels.any()):
        return None
    for kept in (None, *range(labels.dim())):
        largest = labels.amax(dim=[dim for dim in range(labels.dim()) if dim != kept], keepdim=True)
        if bool(((labels == largest) | (labels == STAYS)).all()):
            return largest.expand(labels.shape)
    for dim in range(labels.dim()):
        if bool((labels == labels.narrow(dim, 0, 1)).all()):
            labels = labels.narrow(dim, 0, 1).expand(labels.shape)
    return labels
