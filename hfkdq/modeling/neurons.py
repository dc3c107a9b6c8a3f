# SPDX-License-Identifier: Apache-2.0
"""The neurons of the feed-forward layers of a model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from .own_modules import OwnModule
from .probing import doubled, nested_configs
from .tracing import traced_neurons
from .units import CONVOLUTIONS, NoStructure, Slice, UnitGroup, each, runs

WIDTH_FIELDS = (
    "intermediate_size", "hidden_dim", "d_ff", "ffn_dim", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim", "mlp_ratio",
    "moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size_mlp",
)  # fmt: skip
"""Configuration fields that decide the number of feed-forward neurons, under one name or another."""

_INTERLEAVED = ("GptOssExperts",)  # gate and up in turns, where Transformers 4 does not say so


def width_fields(config: PretrainedConfig) -> dict[str, Any]:
    """The fields of `config` that decide the number of neurons, with their values; `"text_config.d_ff"` is one within another.

    Raises:
        ValueError: the configuration has none of the known ones.
    """
    found: dict[str, Any] = {}
    for prefix, inner in nested_configs(config):
        known = {*inner.to_dict(), *(getattr(inner, "attribute_map", None) or {})}
        values = {name: getattr(inner, name, None) for name in WIDTH_FIELDS if name in known}
        if values.get("n_inner", 0) is None:
            values["n_inner"] = 4 * inner.n_embd
        found |= {prefix + name: value for name, value in values.items() if type(value) in (int, float)}
    if not found:
        raise NoStructure(
            f"{type(config).__name__} has no feed-forward width: none of {', '.join(WIDTH_FIELDS)} is a number in it. "
            "Nor does it compute anything by a linear layer that linear layers alone read."
        )
    return found


def find_neurons(model: PreTrainedModel) -> list[UnitGroup]:
    """The neurons of every layer, as one group for each width field and layer.

    A tensor's dimension belongs to the neurons if it doubles when the model is made with twice the width. Where no known
    field tells, a batch shows what is computed by linear layers and read by linear layers alone.

    Raises:
        NoExample: there is no such field, and no batch to follow.
        ValueError: there are no neurons, or a layer of a known width has others than linear layers and convolutions
            at both ends of them.
    """
    try:
        return _neurons_of_fields(model)
    except NoStructure as error:
        found = traced_neurons(model)
        if not found and isinstance(model, OwnModule):  # whose configuration was made for it, and decides nothing
            raise NoStructure(
                f"{type(model).__name__} has no neurons that could go: it computes nothing by a linear layer that linear "
                "layers alone read."
            ) from error
        if not found:
            raise
        return found


def _neurons_of_fields(model: PreTrainedModel) -> list[UnitGroup]:
    groups: list[UnitGroup] = []
    seen: set[tuple[str, int]] = set()  # a field may have a second name
    for field, value in width_fields(model.config).items():
        found = [entry for entry in doubled(model, field, value) or [] if entry not in seen]
        seen |= set(found)
        groups += _by_layer(model, field, found)
    if not groups:
        raise NoStructure(
            f"No tensor of {type(model).__name__} follows {', '.join(width_fields(model.config))}, so its neurons cannot "
            "be told from its other parts."
        )
    return groups


def _by_layer(model: PreTrainedModel, field: str, dims: list[tuple[str, int]]) -> list[UnitGroup]:
    """Dimensions as groups: those of the innermost numbered module, or of the experts, that hold both ends of its neurons."""
    layers: dict[str, list[Slice]] = {}
    for name, dim in dims:
        module_name, _, tensor = name.rpartition(".")
        module = model.get_submodule(module_name)
        entry = Slice(module_name, module, tensor, dim, each(getattr(module, tensor).shape[dim]))
        layers.setdefault(module_name if _is_fused(module) else _layer_of(module_name), []).append(entry)
    while True:  # the two ends of a block may be numbered themselves, as in a Sequential
        partial = [layer for layer, slices in layers.items() if layer and not _has_both_ends(slices)]
        if not partial:
            break
        for layer in partial:
            layers.setdefault(_layer_of(layer.rpartition(".")[0]), []).extend(layers.pop(layer))
    return [_checked(model, field, layer, slices) for layer, slices in layers.items()]


def _is_fused(module: nn.Module) -> bool:
    """Whether it holds the weights of all experts of a layer, in tensors of three dimensions."""
    return any(parameter.dim() == 3 for parameter in module.parameters(recurse=False)) and not isinstance(
        module, CONVOLUTIONS
    )


def _has_both_ends(slices: list[Slice]) -> bool:
    if _is_fused(slices[0].module):
        return len({entry.tensor for entry in slices if entry.values.dim() == 3}) > 1
    return {"input", "output"} <= {entry.role for entry in slices}


def _layer_of(name: str) -> str:
    """`name` up to its last number; empty if it has none."""
    parts = name.split(".")
    last = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[: last + 1])


def _checked(model: PreTrainedModel, field: str, layer: str, slices: list[Slice]) -> UnitGroup:
    units = min(len(entry.positions) for entry in slices)
    roles = {entry.role for entry in slices}
    whole = all(len(entry.positions) in (units, 2 * units) for entry in slices)
    if not whole or not _has_both_ends(slices) or (roles != {"input", "output"} and not _is_fused(slices[0].module)):
        names = ", ".join(f"{entry.name}.{entry.tensor} {tuple(entry.values.shape)}" for entry in slices[:4])
        raise NoStructure(
            f"{layer or type(model).__name__}: {field} decides sizes of {names}, which are not all linear layers into "
            "and out of the same neurons, so they cannot be pruned."
        )
    paired = [replace(entry, positions=_positions(entry, units)) for entry in slices]
    return UnitGroup(layer, units, tuple(paired), field=field)


def _positions(entry: Slice, units: int) -> Tensor:
    """Where the units are: gate and up of a neuron may lie in one tensor, behind one another or in turns."""
    per_unit = len(entry.positions) // units
    concatenated = getattr(entry.module, "is_concatenated", type(entry.module).__name__ not in _INTERLEAVED)
    return runs(units, 1, per_unit) if concatenated else runs(units, per_unit)
