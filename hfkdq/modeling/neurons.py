# SPDX-License-Identifier: Apache-2.0
"""The neurons of the feed-forward layers of a model."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from .probing import doubled
from .units import Slice, UnitGroup, each

WIDTH_FIELDS = (
    "intermediate_size", "hidden_dim", "d_ff", "ffn_dim", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim", "mlp_ratio",
)  # fmt: skip
"""Configuration fields that decide the number of feed-forward neurons, under one name or another."""


def width_fields(config: PretrainedConfig) -> dict[str, Any]:
    """The fields of `config` that decide the number of neurons, with their values.

    Raises:
        ValueError: the configuration has none of the known ones.
    """
    known = {*config.to_dict(), *(getattr(config, "attribute_map", None) or {})}
    found = {name: getattr(config, name, None) for name in WIDTH_FIELDS if name in known}
    if found.get("n_inner", 0) is None:
        found["n_inner"] = 4 * config.n_embd
    found = {name: value for name, value in found.items() if type(value) in (int, float)}
    if not found:
        raise ValueError(
            f"{type(config).__name__} has no feed-forward width: none of {', '.join(WIDTH_FIELDS)} is a number in it. "
            "Neuron pruning needs one, so that the pruned model can be described by its configuration."
        )
    return found


def find_neurons(model: PreTrainedModel) -> list[UnitGroup]:
    """The neurons of every layer, as one group for each width field and layer.

    A tensor's dimension belongs to the neurons if it doubles when the model is made with twice the width.

    Raises:
        ValueError: no width in the configuration, or a layer whose neurons are not all computed and read by linear
            layers or convolutions.
    """
    groups = []
    for field, value in width_fields(model.config).items():
        found = doubled(model, field, value)
        groups += _by_layer(model, field, found or [])
    if not groups:
        raise ValueError(
            f"No tensor of {type(model).__name__} follows {', '.join(width_fields(model.config))}, so its neurons cannot "
            "be told from its other parts; structure='weight' can prune it."
        )
    return groups


def _by_layer(model: PreTrainedModel, field: str, dims: list[tuple[str, int]]) -> list[UnitGroup]:
    """Dimensions as groups: those of the innermost numbered module that holds both ends of its neurons."""
    layers: dict[str, list[Slice]] = {}
    for name, dim in dims:
        module_name, _, tensor = name.rpartition(".")
        module = model.get_submodule(module_name)
        size = getattr(module, tensor).shape[dim]
        layers.setdefault(_layer_of(module_name), []).append(Slice(module_name, module, tensor, dim, each(size)))
    while True:  # the two ends of a block may be numbered themselves, as in a Sequential
        partial = [layer for layer, slices in layers.items() if layer and len({s.role for s in slices}) < 2]
        if not partial:
            break
        for layer in partial:
            layers.setdefault(_layer_of(layer.rpartition(".")[0]), []).extend(layers.pop(layer))
    return [_checked(model, field, layer, slices) for layer, slices in layers.items()]


def _layer_of(name: str) -> str:
    """`name` up to its last number; empty if it has none."""
    parts = name.split(".")
    last = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[: last + 1])


def _checked(model: PreTrainedModel, field: str, layer: str, slices: list[Slice]) -> UnitGroup:
    units = {len(entry.positions) for entry in slices}
    roles = {entry.role for entry in slices}
    if len(units) != 1 or roles != {"input", "output"}:
        names = ", ".join(f"{entry.name}.{entry.tensor} {tuple(entry.values.shape)}" for entry in slices[:4])
        raise ValueError(
            f"{layer or type(model).__name__}: {field} decides sizes of {names}, which are not all linear layers into "
            "and out of the same neurons, so they cannot be pruned; structure='weight' can."
        )
    return UnitGroup(layer, units.pop(), tuple(slices))
