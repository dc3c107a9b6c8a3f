# SPDX-License-Identifier: Apache-2.0
"""What a spec prunes in a model: groups of weights or neurons that compete with one another, and their scores.

Knows no schedule and no Trainer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from ..architecture import FeedForward, find_feed_forwards, find_layer_stack
from ..specs import PruningSpec, module_matches


class PruningTarget(Protocol):
    """Units (weights or neurons) of one module that are ranked among themselves."""

    @property
    def linears(self) -> tuple[tuple[str, nn.Linear], ...]:
        """Names and modules of the linear layers concerned."""

    def scores(self) -> torch.Tensor:
        """How much each unit matters, at least 0 and exactly 0 for a unit that is gone; shape `(units,)`, float32."""

    def zero_(self, pruned: torch.Tensor) -> None:
        """Zeroes the units for which `pruned`, a bool tensor of shape `(units,)`, is true."""


@dataclass(frozen=True)
class WeightTarget:
    """The weights of one linear layer; their score is their magnitude."""

    name: str
    linear: nn.Linear

    @property
    def linears(self) -> tuple[tuple[str, nn.Linear], ...]:
        """The one layer."""
        return ((self.name, self.linear),)

    def scores(self) -> torch.Tensor:
        """`|w|`, row after row."""
        return self.linear.weight.detach().float().abs().flatten()  # (out_features * in_features,)

    @torch.no_grad()
    def zero_(self, pruned: torch.Tensor) -> None:
        """Zeroes weights."""
        self.linear.weight.masked_fill_(pruned.view_as(self.linear.weight), 0.0)


@dataclass(frozen=True)
class NeuronTarget:
    """The neurons of one feed-forward block; their score is the L2 norm of what enters and leaves them."""

    block: FeedForward

    @property
    def linears(self) -> tuple[tuple[str, nn.Linear], ...]:
        """Layers into the neurons, then out of them."""
        return self.block.inputs + self.block.outputs

    def scores(self) -> torch.Tensor:
        """`sqrt(sum of w ** 2)` over rows and bias entries of the inputs and columns of the outputs."""
        parts = [_squares(linear.weight).sum(dim=1) for _, linear in self.block.inputs]
        parts += [_squares(linear.bias) for _, linear in self.block.inputs if linear.bias is not None]
        parts += [_squares(linear.weight).sum(dim=0) for _, linear in self.block.outputs]
        return torch.stack(parts).sum(dim=0).sqrt()  # (width,)

    @torch.no_grad()
    def zero_(self, pruned: torch.Tensor) -> None:
        """Zeroes rows, bias entries and columns; the biases behind the neurons stay."""
        for _, linear in self.block.inputs:
            linear.weight.masked_fill_(pruned[:, None], 0.0)
            if linear.bias is not None:
                linear.bias.masked_fill_(pruned, 0.0)
        for _, linear in self.block.outputs:
            linear.weight.masked_fill_(pruned[None, :], 0.0)


def _squares(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.detach().float().square()


def find_targets(model: PreTrainedModel, spec: PruningSpec) -> list[PruningTarget]:
    """What `spec` prunes in `model`; looks only.

    Args:
        model (`PreTrainedModel`): the model to prune.
        spec (`PruningSpec`): what to prune.

    Returns:
        `list[PruningTarget]`: one entry per linear layer or feed-forward block, never empty.

    Raises:
        TypeError: `model` is no `PreTrainedModel`.
        ValueError: nothing matches, the model's structure is not clear, or a layer's weight is not a plain
            floating-point matrix.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"Pruning needs a Transformers PreTrainedModel, got {type(model).__name__}. "
            "Merge adapters with merge_and_unload() before pruning."
        )
    targets: list[PruningTarget]
    if spec.structure == "neuron":
        targets = [NeuronTarget(block) for block in find_feed_forwards(model)]
    else:
        targets = [WeightTarget(name, linear) for name, linear in _matching_linears(model, spec)]
    for target in targets:
        for name, linear in target.linears:
            _check_prunable(name, linear)
    return targets


def _matching_linears(model: PreTrainedModel, spec: PruningSpec) -> list[tuple[str, nn.Linear]]:
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if spec.target_modules is None:
        prefix = f"{find_layer_stack(model).name}."
        chosen = [(name, linear) for name, linear in linears if name.startswith(prefix)]
    else:
        chosen = [(name, linear) for name, linear in linears if module_matches(name, spec.target_modules)]
    matching = [(name, linear) for name, linear in chosen if not module_matches(name, spec.exclude_modules)]
    if not matching:
        names = ", ".join(name for name, _ in (chosen or linears)[:3]) or "none"
        raise ValueError(
            f"PruningSpec(target_modules={spec.target_modules!r}, exclude_modules={spec.exclude_modules!r}) matches "
            f"no linear layer of {type(model).__name__}. Linear layers of it are, for example: {names}."
        )
    return matching


def _check_prunable(name: str, linear: nn.Linear) -> None:
    weight = linear.weight
    if not weight.is_floating_point() or weight.shape != (linear.out_features, linear.in_features):
        raise ValueError(
            f"The weight of {name} ({type(linear).__name__}) is {weight.dtype} of shape {tuple(weight.shape)}; pruning "
            f"needs floating point of shape {(linear.out_features, linear.in_features)}. Load the model without "
            "quantization_config, and train it with DDP rather than with sharded weights."
        )
