# SPDX-License-Identifier: Apache-2.0
"""Shapes that a configuration cannot describe: written into it as facts, and built from them again."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..facts import read_facts, record_fact
from ..schema import brief
from .checkpoints import checkpoint_class, load_config, load_weights
from .layers import read_periods_
from .probing import COUNTED, Numbers, build_empty, build_shapes, config_with, shapes_of
from .units import resize_


def record_shapes(model: PreTrainedModel, counts: Numbers) -> bool:
    """Records what the configuration of `model` does not describe; `True` if that is nothing.

    Args:
        model (`PreTrainedModel`): the model, with the shapes that it has now.
        counts (`dict`): of modules by name the integers that they keep of their shapes, such as a number of heads.
    """
    described = build_shapes(model, config_with(model.config))
    tensors = {name: list(shape) for name, shape in shapes_of(model).items() if described.get(name) != shape}
    facts = read_facts(model)
    if not tensors:
        facts.pop("shapes", None)
        if facts or hasattr(model.config, "hfkdq"):
            model.config.hfkdq = facts
        return True
    counts = {**facts.get("shapes", {}).get("counts", {}), **counts}
    record_fact(model, "shapes", {"tensors": tensors, "counts": counts})
    return False


def has_recorded_shapes(config: PretrainedConfig) -> bool:
    """Whether plain `from_pretrained` cannot load a model with this configuration."""
    return "shapes" in read_facts(config) or read_periods_(config)


def load_checkpoint(
    path: str,
    config: PretrainedConfig | None = None,
    model_class: type[PreTrainedModel] | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """The model of a checkpoint: of the class that its configuration names, with the shapes that it records.

    Args:
        path (`str`): a folder or a model id on the Hub.
        config (`PretrainedConfig`, *optional*): the configuration, if it is loaded already.
        model_class (`type`, *optional*): the class, where it is one of the user's own.
        kwargs (*optional*): passed to `from_pretrained`.

    Raises:
        ValueError: the configuration names no class of Transformers, the record does not fit it, or a file is damaged.
    """
    if config is None:
        config = load_config(path, getattr(model_class, "config_class", None), **kwargs)
    if read_periods_(config):
        kwargs["config"] = config
    if model_class is None:
        model_class = checkpoint_class(config)
    model = load_weights(_shaped(model_class, config), path, **kwargs)
    model.__class__ = model_class
    return model


def build_recorded(path: str) -> PreTrainedModel:
    """The model of a folder with a configuration, without weights, which need not be there: they take no memory.

    Raises:
        ValueError: as of [`load_checkpoint`].
    """
    config = load_config(path)
    read_periods_(config)
    model_class = checkpoint_class(config)
    model = build_empty(_shaped(model_class, config), config)
    model.__class__ = model_class
    return model


def _shaped(model_class: type[PreTrainedModel], config: PretrainedConfig) -> type[PreTrainedModel]:
    """A class of the same name with the shapes that are recorded, so that from_pretrained finds the sizes of the file."""
    record = read_facts(config).get("shapes")
    if record is None:
        return model_class

    def __init__(self: Any, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, config, *args, **kwargs)
        reshape_(self, record)

    return type(model_class.__name__, (model_class,), {"__init__": __init__, "__module__": model_class.__module__})


@torch.no_grad()
def reshape_(model: nn.Module, record: dict[str, Any]) -> None:
    """Gives the modules of a model that is being built the recorded shapes, without values.

    Raises:
        ValueError: a name or an attribute that the model has not.
    """
    try:
        for name, shape in record["tensors"].items():
            owner, _, tensor = name.rpartition(".")
            module = model.get_submodule(owner)
            old = getattr(module, tensor)
            if (
                old is None
                or len(old.shape) != len(shape)
                or any(new > was for new, was in zip(shape, old.shape, strict=True))
            ):
                raise ValueError(f"{name} is {None if old is None else tuple(old.shape)}, not larger than {shape}")
            new = old.new_empty(shape)
            if isinstance(old, nn.Parameter):
                setattr(module, tensor, nn.Parameter(new, requires_grad=old.requires_grad))
            else:
                module.register_buffer(tensor, new, persistent=tensor not in module._non_persistent_buffers_set)
            resize_(module)
        for name, attributes in record["counts"].items():
            module = model.get_submodule(name)
            for attribute, value in attributes.items():
                if attribute not in COUNTED or type(value) is not int or not hasattr(module, attribute):
                    raise ValueError(f"{name} has no {attribute!r} that could be {value!r}")
                setattr(module, attribute, value)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"The recorded shapes do not fit {type(model).__name__}: {brief(error)}. Load the model with the line of Transformers "
            "that it was pruned with; names of modules differ between them."
        ) from error
