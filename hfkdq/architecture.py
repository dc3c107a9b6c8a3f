# SPDX-License-Identifier: Apache-2.0
"""Where a Transformers model keeps its layers and its feed-forward neurons, read from its structure.

Knows names and shapes only; copying layers and removing neurons is done by those who ask.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

WIDTH_FIELDS = ("intermediate_size", "hidden_dim", "d_ff", "ffn_dim")


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
        ValueError: no width in the configuration, or a layer without the two sides of such a block.
    """
    width = getattr(model.config, width_field(model.config))
    stack = find_layer_stack(model)
    blocks = []
    for index, layer in enumerate(stack.layers):
        linears = [
            (f"{stack.name}.{index}.{name}", m) for name, m in layer.named_modules() if isinstance(m, nn.Linear)
        ]
        inputs = tuple((n, m) for n, m in linears if m.out_features == width and m.in_features != width)
        outputs = tuple((n, m) for n, m in linears if m.in_features == width and m.out_features != width)
        if not inputs or not outputs:
            raise ValueError(
                f"Layer {stack.name}.{index} of {type(model).__name__} has no linear layers into and out of "
                f"{width} neurons ({width_field(model.config)}); its neurons cannot be told from its other parts."
            )
        blocks.append(FeedForward(inputs, outputs))
    return blocks
