# SPDX-License-Identifier: Apache-2.0
"""Where a Transformers model keeps its layers and its feed-forward neurons, read from its structure.

Knows names and shapes only; copying layers and removing neurons is done by those who ask.
"""

from __future__ import annotations

from dataclasses import dataclass

import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

WIDTH_FIELDS = ("intermediate_size", "hidden_dim", "d_ff", "ffn_dim")
"""Configuration fields that hold the number of feed-forward neurons, under one name or another."""

PER_LAYER_FIELDS = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""Configuration fields that hold a list with one entry per layer."""


ATTENTION_INPUTS = {
    "query": ("query", "q_proj", "q_lin", "query_proj", "q"),
    "key": ("key", "k_proj", "k_lin", "key_proj", "k"),
    "value": ("value", "v_proj", "v_lin", "value_proj", "v"),
}
"""Names of the modules that compute queries, keys and values, under which Transformers has them."""


@dataclass(frozen=True)
class LayerStack:
    """The stack of equal layers of a model: its dotted name and its modules, first layer first."""

    name: str
    layers: nn.ModuleList

    def __len__(self) -> int:
        return len(self.layers)


@dataclass(frozen=True)
class FeedForward:
    """Linear layers around the neurons of one layer.

    `inputs` are the (name, module) pairs whose outputs are the neurons (two in gated layers), `outputs` those that
    read them.
    """

    inputs: tuple[tuple[str, nn.Linear], ...]
    outputs: tuple[tuple[str, nn.Linear], ...]


def find_layer_stack(model: PreTrainedModel) -> LayerStack:
    """The stack of `config.num_hidden_layers` layers.

    Raises:
        ValueError: no such stack, or several (an encoder-decoder), so that there is no one answer.
    """
    count = getattr(model.config, "num_hidden_layers", None)
    stacks = [
        LayerStack(name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and _alike(module)
    ]
    # A list inside a layer can have the same length as the stack; the outermost one is the stack.
    outer = [stack for stack in stacks if not any(stack.name.startswith(f"{other.name}.") for other in stacks)]
    if len(outer) != 1:
        found = ", ".join(stack.name for stack in outer) or "none"
        raise ValueError(
            f"{type(model).__name__} should have one stack of {count} layers (config.num_hidden_layers); found: {found}. "
            "Encoders and decoders with a single stack are supported."
        )
    return outer[0]


def _alike(layers: nn.ModuleList) -> bool:
    return all(any(True for _ in layer.parameters()) and type(layer) is type(layers[0]) for layer in layers)


def evenly_spaced_layers(count: int, total: int) -> list[int]:
    """`count` of `total` layers, numbered from 1: `round(i * total / count)`, halves up, so the last is among them."""
    return [(2 * i * total + count) // (2 * count) for i in range(1, count + 1)]


def checkpoint_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class of Transformers that a checkpoint's configuration names.

    Raises:
        ValueError: it names none, or one that Transformers does not have.
    """
    names = config.architectures or []
    model_class = getattr(transformers, names[0], None) if names else None
    if model_class is None:
        raise ValueError(
            f"The configuration names {names} as its architecture, which transformers {transformers.__version__} does "
            "not have. Load the model yourself, with the code it was made with."
        )
    return model_class  # type: ignore[no-any-return]


def width_field(config: PretrainedConfig) -> str:
    """Name of the configuration field that holds the number of feed-forward neurons.

    Raises:
        ValueError: the configuration has none of the known fields.
    """
    for name in WIDTH_FIELDS:
        if isinstance(getattr(config, name, None), int):
            return name
    raise ValueError(
        f"{type(config).__name__} has no feed-forward width: none of {', '.join(WIDTH_FIELDS)} is an integer in it. "
        "Neuron pruning needs one, so that the pruned model can be described by its configuration."
    )


def find_feed_forwards(model: PreTrainedModel) -> list[FeedForward]:
    """The feed-forward block of every layer, first layer first.

    A linear layer belongs to it if one of its sides is the configured width and the other is not.

    Raises:
        ValueError: no width in the configuration, or a layer that is not clearly one such block and attention: no
            linear layer on one side of the neurons, several that read them, or a norm over them.
    """
    width = getattr(model.config, width_field(model.config))
    stack = find_layer_stack(model)
    return [_feed_forward(model, f"{stack.name}.{i}", layer, width) for i, layer in enumerate(stack.layers)]


def _feed_forward(model: PreTrainedModel, name: str, layer: nn.Module, width: int) -> FeedForward:
    linears = [(f"{name}.{n}", m) for n, m in layer.named_modules() if isinstance(m, nn.Linear)]
    inputs = tuple((n, m) for n, m in linears if m.out_features == width and m.in_features != width)
    outputs = tuple((n, m) for n, m in linears if m.in_features == width and m.out_features != width)
    known = {id(p) for _, m in inputs + outputs for p in m.parameters()}
    others = [f"{name}.{n}" for n, p in layer.named_parameters() if width in p.shape and id(p) not in known]
    if not inputs or len(outputs) != 1 or others:
        found = ", ".join([n for n, _ in inputs + outputs] + others) or "none"
        raise ValueError(
            f"Layer {name} of {type(model).__name__} should have linear layers into {width} neurons "
            f"({width_field(model.config)}) and one out of them, and nothing else of that width; found: {found}. "
            "Its neurons cannot be told from its other parts, so they cannot be pruned; structure='weight' can."
        )
    return FeedForward(inputs, outputs)
