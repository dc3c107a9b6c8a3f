# SPDX-License-Identifier: Apache-2.0
"""Where a Transformers model keeps its layers, read from its structure and its configuration."""

from __future__ import annotations

from dataclasses import dataclass

import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class LayerStack:
    """The stack of equal layers of a model: its dotted name and its modules, first layer first."""

    name: str
    layers: nn.ModuleList

    def __len__(self) -> int:
        return len(self.layers)


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
    name = names[0] if isinstance(names, list) and names else None
    model_class = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        raise ValueError(
            f"The configuration names {names!r:.200} as its architecture, which transformers {transformers.__version__} does "
            "not have. Load the model yourself, with the code it was made with."
        )
    return model_class
