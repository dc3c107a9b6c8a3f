# SPDX-License-Identifier: Apache-2.0
"""The attention heads of a model, with what belongs to them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .probing import HEAD_COUNTS, HEAD_SIZES, HEAD_WIDTHS
from .units import NoStructure, Slice, UnitGroup, each, runs

ATTENTION_INPUTS = {
    "query": ("query", "q_proj", "q_lin", "query_proj", "q"),
    "key": ("key", "k_proj", "k_lin", "key_proj", "k"),
    "value": ("value", "v_proj", "v_lin", "value_proj", "v"),
}
"""Names of the modules that compute queries, keys and values, under which Transformers has them."""

_OUTPUTS = ("out_proj", "o_proj", "out_lin", "o", "c_proj", "output.dense")
_FUSED = ("c_attn", "in_proj")  # queries, keys and values of GPT-2, in three blocks, and of DeBERTa, head by head
_POSITIONS = ("pos_proj", "pos_q_proj", "pos_key_proj", "pos_query_proj")
_VECTORS = ("q_bias", "v_bias")
_BIASES = ("relative_attention_bias",)
_FIXED = ("DetrAttention",)  # gives the heads' outputs the shape of its input, so their number cannot change


@dataclass(frozen=True)
class Attention:
    """An attention module: how many units it has (heads, or groups of heads that share a key), and their slices."""

    name: str
    module: nn.Module
    units: int
    slices: tuple[Slice, ...]
    counts: tuple[tuple[str, nn.Module, str, int], ...]


def find_heads(model: PreTrainedModel) -> list[UnitGroup]:
    """The attention heads of a model: one group for every attention.

    Where several heads share their keys and values (grouped queries), all that share them are one unit. Where a table
    of position biases is shared by the attentions of a stack (T5, MPNet), they have their heads in common too.

    Raises:
        ValueError: no attention that is known.
    """
    found = [attention for name, module in model.named_modules() if (attention := _attention(model, name, module))]
    if not found:
        raise NoStructure(
            f"{type(model).__name__} has no attention whose parts are known ({', '.join(ATTENTION_INPUTS['query'])} and so "
            "on), so its heads cannot be pruned."
        )
    return _tied_by_biases(model, found)


def _attention(model: PreTrainedModel, name: str, module: nn.Module) -> Attention | None:
    fused = _child(module, _FUSED)
    inputs = [_child(module, names) for names in ATTENTION_INPUTS.values()]
    output = _output(model, name, module)
    size = next(
        (getattr(module, field) for field in HEAD_SIZES if isinstance(getattr(module, field, None), int)), None
    )
    if output is None or size is None or (fused is None and None in inputs):
        return None
    heads = _features(output[1])[0] // size
    # Keys and values of fewer heads than queries: a unit is one of those with all its queries.
    units = heads if inputs[1] is None else _features(inputs[1][1])[1] // size
    per_unit = heads // units * size
    slices: list[Slice] = []
    if fused is not None:
        blocks = 3 if isinstance(fused[1], Conv1D) else 1
        slices += _computing(name, fused, runs(units, per_unit * 3 // blocks, blocks))
    else:
        for kind, child in zip(ATTENTION_INPUTS, filter(None, inputs), strict=True):
            slices += _computing(name, child, runs(units, per_unit if kind == "query" else size))
    for child_name in _POSITIONS:
        position = _child(module, (child_name,))
        slices += _computing(name, position, runs(units, size)) if position else []
    for vector in _VECTORS:
        if getattr(module, vector, None) is not None:
            slices.append(Slice(name, module, vector, 0, runs(units, size)))
    reads = 0 if isinstance(output[1], Conv1D) else 1
    slices.append(Slice(output[0], output[1], "weight", reads, runs(units, per_unit)))
    if type(module).__name__ in _FIXED:
        raise NoStructure(
            f"{name} ({type(module).__name__}) needs as many heads as its configuration says in this version of Transformers."
        )
    held = {id(entry.values) for entry in slices} | {id(p) for p in output[1].parameters()}
    others = [
        n for n, p in module.named_parameters() if id(p) not in held and heads in p.shape[-1:] and "bias_table" in n
    ]
    if others:
        raise NoStructure(
            f"{name} has {', '.join(others)} beside its heads, which is not known to follow them, so they cannot be pruned."
        )
    counts = [
        (name, module, field, heads // units) for field in HEAD_COUNTS if isinstance(getattr(module, field, None), int)
    ]
    counts += [
        (name, module, field, per_unit) for field in HEAD_WIDTHS if getattr(module, field, None) == heads * size
    ]
    return Attention(name, module, units, tuple(slices), tuple(counts))


def _child(module: nn.Module, names: tuple[str, ...]) -> tuple[str, nn.Module] | None:
    children = dict(module.named_children())
    return next(
        ((name, children[name]) for name in names if isinstance(children.get(name), (nn.Linear, Conv1D))), None
    )


def _output(model: PreTrainedModel, name: str, module: nn.Module) -> tuple[str, nn.Module] | None:
    """The layer behind the heads: in the attention itself, or beside it."""
    for prefix in (name, name.rpartition(".")[0]):
        for child in _OUTPUTS:
            path = f"{prefix}.{child}" if prefix else child
            try:
                found = model.get_submodule(path)
            except AttributeError:
                continue
            if isinstance(found, (nn.Linear, Conv1D)):
                return path, found
    return None


def _features(module: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear layer."""
    rows, columns = module.weight.shape  # type: ignore[misc]
    return (rows, columns) if isinstance(module, Conv1D) else (columns, rows)


def _computing(prefix: str, child: tuple[str, nn.Module], positions: Tensor) -> list[Slice]:
    name, module = f"{prefix}.{child[0]}", child[1]
    found = [Slice(name, module, "weight", 1 if isinstance(module, Conv1D) else 0, positions)]
    if getattr(module, "bias", None) is not None:
        found.append(Slice(name, module, "bias", 0, positions))
    return found


def _tied_by_biases(model: PreTrainedModel, attentions: list[Attention]) -> list[UnitGroup]:
    """Groups: attentions below the parent of a table of position biases are one, if there is such a table."""
    tables = [
        (name, module)
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in _BIASES and isinstance(module, nn.Embedding)
    ]
    groups = []
    left = list(attentions)
    for table_name, table in tables:
        owner = table_name.rpartition(".")[0]
        kind = type(model.get_submodule(owner)), owner.rpartition(".")[2]
        # The stack that the table serves: above the layer that holds it, or, where it lies beside the layers, its parent.
        parts = owner.split(".")
        numbers = [i for i, part in enumerate(parts) if part.isdigit()]
        stack = ".".join(parts[: numbers[0]]) if numbers else owner
        served = [
            attention
            for attention in left
            if attention.name.startswith(f"{stack}.") and (not numbers or kind == _kind(attention))
        ]
        if not served:
            continue
        left = [attention for attention in left if attention not in served]
        units = served[0].units
        slices = tuple(entry for attention in served for entry in attention.slices)
        slices += (Slice(table_name, table, "weight", 1, each(units)),)
        groups.append(UnitGroup(stack, units, slices, tuple(count for a in served for count in a.counts)))
        if not numbers:  # a module beside the layers may keep the number of heads too
            parent = model.get_submodule(owner)
            extra = tuple((owner, parent, f, 1) for f in HEAD_COUNTS if getattr(parent, f, None) == units)
            groups[-1] = UnitGroup(stack, units, slices, groups[-1].counts + extra)
    groups += [UnitGroup(a.name, a.units, a.slices, a.counts) for a in left]
    order = {attention.name: i for i, attention in enumerate(attentions)}
    return sorted(groups, key=lambda group: min(i for name, i in order.items() if name.startswith(group.name)))


def _kind(attention: Attention) -> tuple[type, str]:
    return type(attention.module), attention.name.rpartition(".")[2]
