# SPDX-License-Identifier: Apache-2.0
"""The stacks of layers of a model, encoder-decoders included, with the fields of the configuration that count them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from .probing import PER_LAYER_FIELDS, build_shapes, config_with

DEPTH_FIELDS = ("num_layers", "encoder_layers", "num_decoder_layers", "decoder_layers", "num_hidden_layers")
"""Configuration fields that hold a number of layers; an alias of another one comes last."""


@dataclass(frozen=True)
class CountedStack:
    """A stack of layers: its dotted name, its modules, and the configuration field that holds their number.

    `beside` names tensors outside of the stack whose shape depends on that number.
    """

    name: str
    layers: nn.ModuleList
    field: str
    beside: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.layers)

    def bound_to(self) -> list[int]:
        """Places of layers, from 0, that hold tensors which the others lack, and so cannot go."""
        names = [{name for name, _ in layer.named_parameters()} for layer in self.layers]
        common = set.intersection(*names)
        return [i for i, own in enumerate(names) if own - common]


def fields_of_depth(config: PretrainedConfig, count: int, kept: list[int], field: str) -> dict[str, Any]:
    """The fields of `config` for the layers `kept`, by place from 0, of the `count` that `field` counts."""
    fields: dict[str, Any] = {field: len(kept)}
    for name in PER_LAYER_FIELDS:
        values = vars(config).get(name)
        if isinstance(values, (list, tuple)) and len(values) == count:
            fields[name] = [values[place] for place in kept]
    return fields


def find_layer_stacks(model: PreTrainedModel) -> list[CountedStack]:
    """The stacks of layers whose number the configuration holds: one, or an encoder and a decoder.

    The tensors that a model with one layer more has are those of that layer, and tell where the stack is.

    Raises:
        ValueError: there is none.
    """
    known = {*model.config.to_dict(), *(getattr(model.config, "attribute_map", None) or {})}
    stacks: dict[str, CountedStack] = {}
    for field in DEPTH_FIELDS:
        count = getattr(model.config, field, None) if field in known else None
        if type(count) is not int:
            continue
        stack = _stack_of(model, field, count)
        if stack is not None:
            stacks.setdefault(stack.name, stack)
    if not stacks:
        raise ValueError(
            f"{type(model).__name__} has no stack of layers that {type(model.config).__name__} counts (as one of "
            f"{', '.join(DEPTH_FIELDS)}), so whole layers cannot be removed."
        )
    order = list(dict(model.named_modules()))
    return sorted(stacks.values(), key=lambda stack: order.index(stack.name))


def find_layer_stack(model: PreTrainedModel) -> CountedStack:
    """The one stack of layers of an encoder or a decoder.

    Raises:
        ValueError: there is none, or several (an encoder-decoder), so that there is no one answer.
    """
    try:
        stacks = find_layer_stacks(model)
    except ValueError:
        stacks = []
    if len(stacks) != 1:
        count = getattr(model.config, "num_hidden_layers", None)
        found = ", ".join(stack.name for stack in stacks) or "none"
        raise ValueError(
            f"{type(model).__name__} should have one stack of {count} layers (config.num_hidden_layers); found: {found}. "
            "Encoders and decoders with a single stack are supported."
        )
    return stacks[0]


def evenly_spaced_layers(count: int, total: int) -> list[int]:
    """`count` of `total` layers, numbered from 1: `round(i * total / count)`, halves up, so the last is among them."""
    return [(2 * i * total + count) // (2 * count) for i in range(1, count + 1)]


def _stack_of(model: PreTrainedModel, field: str, count: int) -> CountedStack | None:
    """The list that grows by one layer when `field` does."""
    longer = fields_of_depth(model.config, count, [*range(count), count - 1], field)
    try:
        before = build_shapes(model, config_with(model.config, **{field: count}))
        after = build_shapes(model, config_with(model.config, **longer))
    except Exception:  # whatever a class raises for a configuration that it cannot be made from
        return None
    marker = f".{count}."
    prefixes = {name.partition(marker)[0] for name in after.keys() - before.keys() if marker in name}
    if len(prefixes) != 1 or before.keys() - after.keys():
        return None
    name = prefixes.pop()
    layers = dict(model.named_modules()).get(name)
    if not isinstance(layers, nn.ModuleList):
        return None
    beside = [tensor for tensor, shape in before.items() if after[tensor] != shape]
    return CountedStack(name, layers, field, tuple(beside))
