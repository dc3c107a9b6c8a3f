# SPDX-License-Identifier: Apache-2.0
"""Prunable channels: inside a block, not on the skip connection."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .layers import find_layer_stacks
from .tracing import traced_channels
from .units import NoStructure, Slice, UnitGroup, each

_BOTTLENECKS = (("pwconv1", "pwconv2"),)


def is_convolutional(model: nn.Module) -> bool:
    """Whether convolutions over images do the work, which no file of integers is faster for where they compute in floats."""
    kinds = list(model.modules())
    return any(isinstance(module, nn.Conv2d) for module in kinds) and not any(
        "Attention" in type(module).__name__ for module in kinds
    )


def find_channels(model: PreTrainedModel, everywhere: bool = False) -> list[UnitGroup]:
    """The inner channels of every block of a known shape, or all channels that a batch shows can go.

    Known are blocks whose channels one convolution or linear layer computes and the next alone reads; what a residual
    connection adds to others stays in them. In a model of other blocks, what is added to one another goes together. The
    convolutions beside a stack of layers, which embed its inputs, are looked at `everywhere` alone.

    Raises:
        NoExample: there is no batch to follow.
        ValueError: there is nothing of the kind.
    """
    try:
        return _known_channels(model)
    except ValueError:
        found = traced_channels(model) if everywhere or not _has_layers(model) else []
        if not found:
            raise
        return found


def _has_layers(model: PreTrainedModel) -> bool:
    try:
        return bool(find_layer_stacks(model))
    except ValueError:
        return False


def _known_channels(model: PreTrainedModel) -> list[UnitGroup]:
    groups = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Sequential) and len(module) > 1 and all(_convolution(child) for child in module):
            groups += [
                _between(f"{name}.{i}", module[i], f"{name}.{i + 1}", module[i + 1]) for i in range(len(module) - 1)
            ]
        for first, second in _BOTTLENECKS:
            if isinstance(getattr(module, first, None), nn.Linear):
                groups.append(_linear(name, first, getattr(module, first), second, getattr(module, second)))
    if not groups:
        raise NoStructure(
            f"{type(model).__name__} has no block of convolutions whose inner channels could go. Those beside a stack of layers "
            "are looked at where target_modules names them."
        )
    return groups


def _convolution(module: nn.Module) -> bool:
    """Whether it is a convolution with a norm behind it."""
    return isinstance(getattr(module, "convolution", None), nn.Conv2d) and hasattr(module, "normalization")


def _between(name: str, block: Any, next_name: str, following: Any) -> UnitGroup:
    computes, reads, norm = block.convolution, following.convolution, block.normalization
    if computes.groups != 1 or reads.groups != 1:
        raise ValueError(
            f"{name}.convolution and {next_name}.convolution have {computes.groups} and {reads.groups} groups; removing "
            "channels would break them. Only ungrouped convolutions can be pruned."
        )
    channels = each(computes.out_channels)
    slices = [Slice(f"{name}.convolution", computes, "weight", 0, channels)]
    if computes.bias is not None:
        slices.append(Slice(f"{name}.convolution", computes, "bias", 0, channels))
    for tensor in ("weight", "bias", "running_mean", "running_var"):
        if getattr(norm, tensor, None) is not None:
            slices.append(Slice(f"{name}.normalization", norm, tensor, 0, channels))
    slices.append(Slice(f"{next_name}.convolution", reads, "weight", 1, channels))
    return UnitGroup(name, computes.out_channels, tuple(slices))


def _linear(name: str, first: str, computes: nn.Linear, second: str, reads: nn.Linear) -> UnitGroup:
    channels = each(computes.out_features)
    slices = [Slice(f"{name}.{first}", computes, "weight", 0, channels)]
    if computes.bias is not None:
        slices.append(Slice(f"{name}.{first}", computes, "bias", 0, channels))
    slices.append(Slice(f"{name}.{second}", reads, "weight", 1, channels))
    return UnitGroup(name, computes.out_features, tuple(slices))
