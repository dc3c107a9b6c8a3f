# SPDX-License-Identifier: Apache-2.0
"""Removes units from the tensors of a model, and describes the rest in its configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..facts import read_facts, record_fact
from ..modeling.bypass import bypass_
from ..modeling.hidden_width import hidden_field
from ..modeling.neurons import width_fields
from ..modeling.numbering import refit_
from ..modeling.own_modules import config_name
from ..modeling.probing import (
    Numbers,
    Shapes,
    build_empty,
    build_model,
    config_with,
    numbers_of,
    set_fields_,
    shapes_of,
)
from ..modeling.recorded_shapes import has_recorded_shapes, record_shapes
from ..modeling.units import Slice, resize_
from ..protocols import FollowsPruning
from ..specs import PruningSpec
from .targets import GroupTarget, LayerTarget, PruningTarget

_HEAD_FIELDS = ("num_attention_heads", "num_heads", "n_heads", "n_head")
_HEAD_FIELDS_OF_PARTS = ("encoder_attention_heads", "decoder_attention_heads")


def described_config(
    model: PreTrainedModel, spec: PruningSpec, targets: Sequence[PruningTarget], kept: Sequence[int]
) -> tuple[PretrainedConfig, str | None]:
    """The configuration of the model with `kept` units of each target, and why it cannot describe that, or `None`."""
    planned = _planned(model, targets, kept)
    candidates = _candidates(model, spec, targets, kept)
    for fields in candidates:
        config = config_with(model.config, **fields)
        try:
            if build_model(model, config) == planned:
                return config, None
        except Exception:
            continue
    return config_with(model.config), _reason(model, spec, targets, kept)


def _planned(model: PreTrainedModel, targets: Sequence[PruningTarget], kept: Sequence[int]) -> tuple[Shapes, Numbers]:
    """Shapes of the tensors after the removal, and the numbers that modules will keep of them."""
    shapes = {name: list(shape) for name, shape in shapes_of(model).items()}
    numbers = numbers_of(model)
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    for target, count in zip(targets, kept, strict=True):
        if not isinstance(target, GroupTarget):
            continue
        for entry in target.group.slices:
            for name in names.get(id(entry.values), []):
                shapes[name][entry.dim] -= (target.units - count) * entry.positions.shape[1]
        for name, _, attribute, per_unit in target.group.counts:
            if name in numbers:
                numbers[name][attribute] = count * per_unit
    return {name: tuple(shape) for name, shape in shapes.items()}, numbers


def _candidates(
    model: PreTrainedModel, spec: PruningSpec, targets: Sequence[PruningTarget], kept: Sequence[int]
) -> list[dict[str, Any]]:
    """Fields that might describe the model, the plainest first."""
    config = model.config
    shares = {count / target.units for target, count in zip(targets, kept, strict=True)}
    if spec.structure == "hidden":
        return [{hidden_field(config): kept[0]}]
    if spec.structure == "neuron":
        followed = any(isinstance(target, GroupTarget) and target.group.followed for target in targets)
        return _any_field(config, targets, kept) if followed else _width_candidates(model, targets, kept)
    if spec.structure == "head":
        if len(shares) != 1:
            return []
        share = shares.pop()
        known = config.to_dict()
        names = [n for n in (*_HEAD_FIELDS, *_HEAD_FIELDS_OF_PARTS) if type(known.get(n)) is int]
        heads = {name: round(getattr(config, name) * share) for name in names}
        if isinstance(getattr(config, "num_key_value_heads", None), int):
            heads["num_key_value_heads"] = round(config.num_key_value_heads * share)
        size = _size_of_heads(targets)
        return [heads] if size is None else [heads, {**heads, "head_dim": size}]
    return []


def _any_field(config: Any, targets: Sequence[PruningTarget], kept: Sequence[int]) -> list[dict[str, Any]]:
    """Every number of a configuration that is that of the neurons of each layer, where a batch has found these."""
    sizes = {(target.units, count) for target, count in zip(targets, kept, strict=True)}
    if len(sizes) != 1:
        return []
    units, count = sizes.pop()
    return [{name: count} for name, value in config.to_dict().items() if type(value) is int and value == units]


def _width_candidates(model: Any, targets: Sequence[PruningTarget], kept: Sequence[int]) -> list[dict[str, Any]]:
    values = width_fields(model.config)
    fields: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, float):  # a ratio of widths that differ between stages
            share = kept[0] / targets[0].units
            # The code truncates the product, so a ratio between two that fit is safe from rounding.
            fields[name] = value * share * (1.0 + 1e-9)
            continue
        counts = {
            round(value * count / target.units)  # shared experts may be several times as wide
            for target, count in zip(targets, kept, strict=True)
            if isinstance(target, GroupTarget) and target.group.field == name
        }
        if len(counts) == 1:
            fields[name] = counts.pop()
    return [fields]


def _size_of_heads(targets: Sequence[PruningTarget]) -> int | None:
    slices = [entry for target in targets if isinstance(target, GroupTarget) for entry in target.group.slices]
    sizes = [each.positions.shape[1] for each in slices if each.role == "output" and each.tensor == "weight"]
    return min(sizes, default=None)


def _reason(model: PreTrainedModel, spec: PruningSpec, targets: Sequence[PruningTarget], kept: Sequence[int]) -> str:
    name = config_name(model.config)
    if has_recorded_shapes(model.config):
        why = f"{name} does not describe the model even now, which has been pruned with plain_checkpoint=False before"
    elif len({count / target.units for target, count in zip(targets, kept, strict=True)}) > 1:
        why = f"layers would be left with different numbers of units ({spec.structure}), which {name} cannot say"
    elif spec.target_modules is not None or spec.exclude_modules is not None:
        why = f"target_modules and exclude_modules leave some layers as wide as they were, and {name} has one width for all"
    elif spec.structure == "head":
        why = f"{name} has no size of a head that its model reads: {type(model).__name__} divides its width by the number of heads"
    elif spec.structure == "hidden":
        why = f"{type(model).__name__} divides its hidden width by the number of heads, so that their size would change with it"
    else:
        why = f"no field of {name} decides only the sizes that would change"
    return (
        f"from_pretrained could not load the result: {why}. PruningSpec(plain_checkpoint=False, ...) removes the units all "
        "the same, for hfkdq.load_pruned to load."
    )


@torch.no_grad()
def remove_units_(model: PreTrainedModel, targets: Sequence[PruningTarget], pruned: Sequence[Tensor]) -> Numbers:
    """Removes units from the tensors of a model. An optimizer that holds the former parameters is stale. `pruned` has
    a bool tensor of shape `(units,)` for each target, true for units to remove. Returns, by the name of a module, the
    integers that it keeps of its shapes, as they are now."""
    counts: Numbers = {}
    found: dict[tuple[int, int], tuple[Slice, Tensor]] = {}  # targets may have their units side by side in one tensor
    names = {module: name for name, module in model.named_modules()}
    for target, mask in zip(targets, pruned, strict=True):
        if not isinstance(target, GroupTarget):
            continue
        left = (~mask).cpu()
        for entry in target.group.slices:
            whole = torch.ones(entry.values.shape[entry.dim], dtype=torch.bool)
            _, left_of = found.setdefault((id(entry.values), entry.dim), (entry, whole))
            left_of[entry.positions[~left].flatten()] = False
        for _, module, attribute, per_unit in target.group.counts:
            setattr(module, attribute, int(left.sum()) * per_unit)
            if module in names:  # its layer may have gone, or have another number, since the targets were found
                counts.setdefault(names[module], {})[attribute] = int(left.sum()) * per_unit
    for entry, left in found.values():
        kept = left.nonzero().flatten()
        slice_(model, entry.values, entry.dim, kept)
        if isinstance(entry.module, FollowsPruning) and entry.role == "output" and entry.tensor == "weight":
            entry.module.keep_outputs_(kept)
    return counts


@torch.no_grad()
def slice_(model: nn.Module, old: Tensor, dim: int, kept: Tensor) -> list[nn.Module]:
    """Keeps the entries `kept` of a tensor along an axis, wherever the model has it; the modules whose weight it is."""
    new = old.detach().index_select(dim, kept.to(old.device))
    new = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
    owners = []
    for module in model.modules():
        tensors: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for store in tensors:
            store.update({name: new for name, value in store.items() if value is old})
        if module._parameters.get("weight") is new:
            resize_(module)
            owners.append(module)
    return owners


def remove_layers_(model: PreTrainedModel, targets: Sequence[PruningTarget], pruned: Sequence[Tensor]) -> None:
    """Removes layers from their stacks, and says in the configuration how many are left and which they were."""
    stacks = [target.stack for target in targets if isinstance(target, LayerTarget)]
    kept_of = {stack.name: (~mask).nonzero().flatten().tolist() for stack, mask in zip(stacks, pruned, strict=True)}
    fields: dict[str, Any] = {}
    for stack in stacks:
        fields |= stack.fields(kept_of[stack.name])
    built = build_empty(model, config_with(model.config, **fields))
    set_fields_(model.config, fields)
    for stack in stacks:
        for layer in stack.layers:
            bypass_(layer, False)
            vars(layer).pop("bypassed", None)
        layers = nn.ModuleList([stack.layers[place] for place in kept_of[stack.name]])
        for layer, new in zip(layers, stack.in_model(built), strict=True):
            refit_(layer, layer, new)
        owner, _, name = stack.name.rpartition(".")
        setattr(model.get_submodule(owner), name, layers)
        stack.renumber_(model, built)
    shapes = read_facts(model).get("shapes")
    if shapes is not None:  # by names of layers, which have other numbers now
        counts = {_renumbered(name, kept_of): numbers for name, numbers in shapes["counts"].items()}
        counts.pop(None, None)
        record_fact(model, "shapes", {**shapes, "counts": counts})
        record_shapes(model, {})
    if len(targets) == 1:  # so that layer maps follow the layers of the teacher that are left
        units = targets[0].units
        before = read_facts(model).get("student", {"teacher_layers": units, "layers": list(range(1, units + 1))})
        left = [before["layers"][place] for place in next(iter(kept_of.values()))]
        record_fact(model, "student", {"teacher_layers": before["teacher_layers"], "layers": left})


def _renumbered(name: str, kept_of: dict[str, list[int]]) -> str | None:
    """The name of a module after layers have gone; `None` if it went with them."""
    for stack, kept in kept_of.items():
        if name.startswith(f"{stack}."):
            place, dot, rest = name.removeprefix(f"{stack}.").partition(".")
            return f"{stack}.{kept.index(int(place))}{dot}{rest}" if int(place) in kept else None
    return name
