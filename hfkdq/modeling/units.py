# SPDX-License-Identifier: Apache-2.0
"""What belongs to one neuron, head or channel: entries of several tensors that can only go together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class NoStructure(ValueError):
    """A model has nothing of a structure that could be pruned."""


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Slice:
    """The entries of one tensor, along one of its dimensions, that belong to the units of a group.

    Args:
        name (`str`): dotted name of the module that holds the tensor.
        module (`nn.Module`): that module.
        tensor (`str`): what the module calls it, such as `"weight"`.
        dim (`int`): the dimension.
        positions (`torch.Tensor`): int64 of shape `(units, entries per unit)`.
    """

    name: str
    module: nn.Module
    tensor: str
    dim: int
    positions: Tensor

    @property
    def values(self) -> Tensor:
        """The tensor as it is now."""
        return getattr(self.module, self.tensor)

    @property
    def role(self) -> str:
        """`"output"` if the module computes the units, `"input"` if it reads them, else `"other"`."""
        if self.tensor == "bias" and isinstance(self.module, (nn.Linear, Conv1D, *CONVOLUTIONS)):
            return "output"
        if self.tensor != "weight":
            return "other"
        if isinstance(self.module, Conv1D):
            return ("input", "output")[self.dim]
        if isinstance(self.module, (nn.Linear, *CONVOLUTIONS)):
            return ("output", "input")[self.dim] if self.dim < 2 else "other"
        return "other"

    def sums(self, values: Tensor) -> Tensor:
        """`values`, of the tensor's shape, summed over what belongs to each unit; shape `(units,)`."""
        others = [dim for dim in range(values.dim()) if dim != self.dim]
        along = values.sum(dim=others) if others else values
        return along[self.positions.to(along.device)].sum(dim=1)

    def entries(self, chosen: Tensor) -> Tensor:
        """Bool over the tensor's dimension, shaped to broadcast over the tensor: what belongs to the units `chosen`."""
        values = self.values
        found = torch.zeros(values.shape[self.dim], dtype=torch.bool, device=values.device)
        found[self.positions.to(values.device)[chosen.to(values.device)].flatten()] = True
        return found.view([-1 if dim == self.dim else 1 for dim in range(values.dim())])


@dataclass(frozen=True)
class UnitGroup:
    """Units that compete with one another: the neurons of a layer, the heads of an attention, the channels of a block.

    Args:
        name (`str`): dotted name of the module that they lie in.
        units (`int`): how many.
        slices (tuple of `Slice`): all that belongs to them.
        counts (tuple of `(name, module, attribute, per unit)`): integers that modules keep of them, such as a number of
            heads, and what one unit adds to each.
        field (`str`): the field of the configuration that decides how many, for neurons.
        followed (`bool`): whether a batch has shown what goes together. Such units go by the names of what computes them, as a
            layer may read several groups.
    """

    name: str
    units: int
    slices: tuple[Slice, ...]
    counts: tuple[tuple[str, nn.Module, str, int], ...] = ()
    field: str = ""
    followed: bool = False

    @property
    def names(self) -> list[str]:
        """The names that patterns may have for it: its own, and those of its layers."""
        return [self.name, *(entry.name for entry in (self.of_role("output") if self.followed else self.slices))]

    def of_role(self, role: str) -> tuple[Slice, ...]:
        """The slices of modules that compute (`"output"`) or read (`"input"`) the units."""
        return tuple(entry for entry in self.slices if entry.role == role)


def each(units: int) -> Tensor:
    """Positions where unit `u` has the entry `u`."""
    return torch.arange(units).unsqueeze(1)


def runs(units: int, length: int, blocks: int = 1) -> Tensor:
    """Positions where unit `u` has `length` entries in a row, in each of `blocks` blocks that follow one another."""
    inside = torch.arange(units * length).view(units, length)
    return torch.cat([inside + block * units * length for block in range(blocks)], dim=1)


def resize_(module: nn.Module) -> None:
    """Makes the sizes that a module keeps of itself those of its tensors."""
    weight = getattr(module, "weight", None)
    if weight is None:
        return
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, Conv1D):
        module.nx, module.nf = weight.shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = weight.shape
    elif isinstance(module, CONVOLUTIONS):
        if module.groups > 1:  # which go as a whole
            module.groups = module.groups * weight.shape[0] // module.out_channels
        module.out_channels, module.in_channels = weight.shape[0], weight.shape[1] * module.groups
    elif isinstance(module, nn.GroupNorm):
        module.num_groups = module.num_groups * weight.shape[0] // module.num_channels
        module.num_channels = weight.shape[0]
    elif isinstance(module, nn.modules.batchnorm._BatchNorm):
        module.num_features = weight.shape[0]
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(weight.shape)
