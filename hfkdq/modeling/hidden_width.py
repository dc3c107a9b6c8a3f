# SPDX-License-Identifier: Apache-2.0
"""The hidden width of a model: the channels that run through all of its layers along the residual connections."""

from __future__ import annotations

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from .heads import find_heads
from .neurons import width_fields
from .probing import config_with, doubled
from .units import NoStructure, Slice, UnitGroup, each

HIDDEN_FIELDS = ("hidden_size", "dim", "n_embd", "d_model")
"""Configuration fields that hold the hidden width."""

HIDDEN_FAMILIES = ("bert", "roberta", "distilbert", "electra", "mpnet", "gpt2", "llama", "vit", "deit")
"""Values of `config.model_type` whose models depend on the hidden width through the shapes of their tensors alone."""


def hidden_field(config: PretrainedConfig) -> str:
    """Name of the field that holds the hidden width.

    Raises:
        ValueError: a family for which it is not known that it can be changed, or a model that reads another's width.
    """
    if config.model_type not in HIDDEN_FAMILIES:
        raise NoStructure(
            f"structure='hidden' is not supported for {config.model_type}: scales, position tables or group counts in its "
            f"code depend on the hidden width, not only shapes. It is for {', '.join(HIDDEN_FAMILIES)}."
        )
    if getattr(config, "add_cross_attention", False):
        raise NoStructure(
            "structure='hidden' is not supported with add_cross_attention=True: the cross-attention reads hidden states of "
            "another model, whose width would not follow."
        )
    return next(name for name in HIDDEN_FIELDS if name in config.to_dict())


def find_hidden(model: PreTrainedModel) -> UnitGroup:
    """The hidden width as one group: everything that doubles when it does, apart from the sides of the heads.

    Raises:
        ValueError: a family that is not supported, or a tensor that has some of the width, but not all of it.
    """
    field = hidden_field(model.config)
    width = getattr(model.config, field)
    fixed = {name: value for name, value in width_fields(model.config).items() if isinstance(value, int)}
    fixed_config = config_with(model.config, **fixed, **_fixed_heads(model.config))
    original = model.config
    try:
        model.config = fixed_config
        found = doubled(model, field, width)
    finally:
        model.config = original
    if not found:
        raise ValueError(f"{type(model).__name__} cannot be made with another {field}, so its width cannot be pruned.")
    inner = {(entry.name, entry.tensor, entry.dim) for group in find_heads(model) for entry in group.slices}
    slices: list[Slice] = []
    tied: set[tuple[int, int]] = set()
    for name, dim in found:
        module_name, _, tensor = name.rpartition(".")
        if (module_name, tensor, dim) in inner:
            continue
        module = model.get_submodule(module_name)
        values = getattr(module, tensor)
        if (id(values), dim) in tied:
            continue
        tied.add((id(values), dim))
        size = values.shape[dim]
        if size != width:
            raise ValueError(
                f"{name} has {size} entries for a hidden width of {width}; channels of it cannot be removed one by one."
            )
        slices.append(Slice(module_name, module, tensor, dim, each(size)))
    return UnitGroup("", width, tuple(slices))


def _fixed_heads(config: PretrainedConfig) -> dict[str, int]:
    size = getattr(config, "head_dim", None)
    return {"head_dim": size} if isinstance(size, int) else {}


def norms_of(group: UnitGroup) -> list[tuple[str, nn.Module]]:
    """The norms over the hidden width: modules with a weight vector of that length."""
    found = {
        entry.name: entry.module
        for entry in group.slices
        if entry.tensor == "weight"
        and entry.values.dim() == 1
        and not isinstance(entry.module, (nn.Linear, nn.Embedding))
    }
    return list(found.items())
