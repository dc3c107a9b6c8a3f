# SPDX-License-Identifier: Apache-2.0
"""What a structure is meant for and is not found in: weights that a pruning leaves as they are without being asked to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from ..facts import AUXILIARY, NOTABLE, left_of
from ..modeling import find_heads, find_layer_stacks, find_neurons
from ..specs import PruningSpec
from .targets import WEIGHTED, PruningTarget

logger = logging.get_logger(__name__)


def left_unpruned(model: PreTrainedModel, spec: PruningSpec, targets: Sequence[PruningTarget]) -> dict[str, int]:
    """How many weights, parameters with more than one axis, by the name of their module, where they are a notable
    part. They lie in the layers of a stack. Of neurons and heads they are those of neither; of single weights those of
    modules that are no linear layer and no convolution, such as experts in one tensor. Other structures reach all that
    they are for, and so does a spec that names its targets."""
    if spec.structure in ("channel", "layer", "hidden", "vocab") or spec.target_modules is not None:
        return {}
    try:
        layers = tuple(f"{stack.name}." for stack in find_layer_stacks(model))
        units = [*find_neurons(model), *find_heads(model)] if spec.structure in ("neuron", "head") else []
    except ValueError:
        return {}
    known = {id(part.values) for target in targets for part in target.parts}
    known |= {id(entry.values) for group in units for entry in group.slices}
    if not units:  # what is excluded is meant to stay
        known |= {id(module.weight) for module in model.modules() if isinstance(module, WEIGHTED)}
    found: dict[str, int] = {}
    for name, values in _weights(model).items():
        if name.startswith(layers) and id(values) not in known:
            owner = name.rpartition(".")[0]
            found[owner] = found.get(owner, 0) + values.numel()
    return found if _share(model, found) > NOTABLE else {}


def share_reached(targets: Sequence[PruningTarget], left: dict[str, int]) -> float:
    """The share that targets have of all weights that a spec is for."""
    parts = (part.values for target in targets for part in target.parts)
    reached = {id(values): values.numel() for values in parts if values.dim() > 1}
    return sum(reached.values()) / max(1, sum(reached.values()) + sum(left.values()))


def describe_left(model: PreTrainedModel, left: dict[str, int]) -> dict[str, Any]:
    """`{"share": of all parameters, "modules": the largest eight by name}`, JSON-ready."""
    return left_of(left, _size(model))


def tell_left_unpruned(model: PreTrainedModel, spec: PruningSpec, targets: Sequence[PruningTarget]) -> None:
    """Warns where there is such a part."""
    left = left_unpruned(model, spec, targets)
    if not left:
        return
    largest = sorted(left, key=left.__getitem__, reverse=True)
    told = ", ".join(f"{name} ({type(model.get_submodule(name)).__name__}, {left[name]:,})" for name in largest[:4])
    logger.warning(
        f"structure={spec.structure!r} leaves {_share(model, left):.0%} of the parameters of {type(model).__name__} as they are, "
        f"as it does not know their modules: {told}{f' and {len(largest) - 4} more' if len(largest) > 4 else ''}. "
        "achieved_sparsity counts them. Name what is to be pruned in target_modules if that is meant."
    )


def _weights(model: PreTrainedModel) -> dict[str, Tensor]:
    saved = model.state_dict(keep_vars=True)
    return {
        name: values
        for name, values in saved.items()
        if isinstance(values, torch.nn.Parameter)
        and values.dim() > 1
        and values.is_floating_point()
        and not name.startswith(AUXILIARY)
    }


def _share(model: PreTrainedModel, left: dict[str, int]) -> float:
    return float(left_of(left, _size(model))["share"])


def _size(model: PreTrainedModel) -> int:
    saved = model.state_dict().keys()
    return sum(values.numel() for name, values in model.named_parameters() if name in saved)
