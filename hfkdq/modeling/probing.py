# SPDX-License-Identifier: Apache-2.0
"""Which tensors of a model a field of its configuration decides, found by building it anew with another value."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import reduce
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ..facts import unmark_quantized
from .checkpoints import without_pooler

try:
    from transformers.initialization import no_init_weights  # type: ignore[import-not-found,unused-ignore]
except ImportError:  # Transformers 4
    from transformers.modeling_utils import no_init_weights  # type: ignore[no-redef,attr-defined,unused-ignore]

undrawn = no_init_weights
"""While it lasts, models are made without values drawn for their weights."""

HEAD_SIZES = ("head_dim", "attention_head_size", "key_value_proj_dim")
"""Under which names attention modules keep the size of a head."""

HEAD_COUNTS = ("num_attention_heads", "num_heads", "n_heads")
"""Under which names they keep the number of heads."""

HEAD_WIDTHS = ("all_head_size", "inner_dim", "split_size", "embed_dim", "dim")
"""Under which names they keep the product of the two."""

COUNTED = (*HEAD_COUNTS, *HEAD_WIDTHS)
"""Integers that follow the number of heads."""

Shapes = dict[str, tuple[int, ...]]
Numbers = dict[str, dict[str, Any]]


def shapes_of(model: PreTrainedModel) -> Shapes:
    """Shape of every tensor of the state dict."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def nested_configs(config: PretrainedConfig, prefix: str = "") -> Iterator[tuple[str, PretrainedConfig]]:
    """`config` and those within it, each with what its dotted name begins with: `""`, `"text_config."`."""
    yield prefix, config
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            yield from nested_configs(value, f"{prefix}{name}.")


def set_fields_(config: PretrainedConfig, fields: dict[str, Any]) -> None:
    """Gives fields of `config` other values, by dotted names."""
    for name, value in fields.items():
        *path, last = name.split(".")
        setattr(reduce(getattr, path, config), last, value)


def config_with(config: PretrainedConfig, **fields: Any) -> PretrainedConfig:
    """A copy of `config` with other values, without what was recorded of the model."""
    config = copy.deepcopy(config)
    vars(config).pop("hfkdq", None)
    unmark_quantized(config)
    set_fields_(config, fields)
    return config


def build_empty(model: PreTrainedModel | type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """A model of the same class, or of this class, made from `config`; no memory is taken and nothing is drawn at random.

    Raises:
        Exception: whatever the class raises for a configuration that it cannot be made from.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"), undrawn():
        return (model if isinstance(model, type) else type(model))._from_config(config, **without_pooler(model))


def build_shapes(model: PreTrainedModel, config: PretrainedConfig) -> Shapes:
    """Shapes of the tensors of such a model."""
    return shapes_of(build_empty(model, config))


def build_model(model: PreTrainedModel, config: PretrainedConfig) -> tuple[Shapes, Numbers]:
    """Shapes and numbers (as [`numbers_of`] gives them) of such a model."""
    built = build_empty(model, config)
    return shapes_of(built), numbers_of(built)


def numbers_of(model: PreTrainedModel) -> Numbers:
    """What attention modules keep of the numbers and the size of their heads, by name of the module."""
    found = {}
    for name, module in model.named_modules():
        numbers = {field: vars(module)[field] for field in (*COUNTED, *HEAD_SIZES, "scaling") if field in vars(module)}
        if any(field in numbers for field in HEAD_SIZES):
            found[name] = numbers
    return found


def doubled(model: PreTrainedModel, field: str, value: Any) -> list[tuple[str, int]] | None:
    """Dimensions, as (name of the tensor, dimension), that double when `field` becomes twice `value`.

    `None` if the model cannot be made so, or if other tensors or other sizes come of it.

    Raises:
        ValueError: the model has tensors that its class does not have by itself.
    """
    try:
        before = build_shapes(model, config_with(model.config, **{field: value}))
        after = build_shapes(model, config_with(model.config, **{field: 2 * value}))
    except Exception:
        return None
    if before.keys() != after.keys():
        return None
    own = sorted(set(model.state_dict()) - before.keys())
    if own:
        raise ValueError(
            f"{type(model).__name__} does not have {', '.join(own[:3])} by itself, so how they follow {field} is not known. "
            "Prune the plain model, before adapters or other parts are added to it."
        )
    found = []
    for name, shape in before.items():
        for dim, (old, new) in enumerate(zip(shape, after[name], strict=True)):
            if new == 2 * old:
                found.append((name, dim))
            elif new != old:
                return None
    return found
