# SPDX-License-Identifier: Apache-2.0
"""Plain `nn.Module`s that take and return dictionaries, made models of Transformers in place."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import re
from argparse import Namespace
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from ..schema import brief
from .checkpoints import INDEX, hub_arguments
from .forwards import base_of
from .probing import undrawn


class OwnModuleConfig(PretrainedConfig):
    """The configuration of a plain module: the fields of its own `config`, if it has one, and what hfkdq records."""

    model_type = "own_module"

    def __getitem__(self, name: str) -> Any:
        """A field, as modules read it whose `config` is a dict."""
        return getattr(self, name)


AutoConfig.register(OwnModuleConfig.model_type, OwnModuleConfig, exist_ok=True)


class OwnModule(PreTrainedModel):
    """What makes a plain module a `PreTrainedModel`; each gets a class of its own, over this one and that of the module."""

    config_class = OwnModuleConfig
    template: ClassVar[nn.Module]
    """The module as it came, without values: what a checkpoint is loaded into."""

    def __init__(self, config: PretrainedConfig) -> None:
        device = torch.get_default_device()
        _start(self, vars(copy.deepcopy(self.template)), config)
        made: dict[int, Any] = {}
        for module in self.modules():
            for name, old in [*module._parameters.items(), *module._buffers.items()]:
                if old is not None and old.is_meta and device.type != "meta":
                    # Recurrent layers keep a list of their weights, which follows what is set by name.
                    setattr(module, name, made.setdefault(id(old), _like(old, torch.zeros_like(old, device=device))))

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, **kwargs: Any) -> Any:
        """The module with the weights of a checkpoint, in eval mode; arguments are those of Transformers."""
        where = hub_arguments(kwargs)
        config = kwargs.get("config") or cls.config_class.from_pretrained(path, **where)
        model, state, dtype = cls(config), _weights(path, where), kwargs.get("dtype")
        own: dict[str, Any] = model.state_dict(keep_vars=True)
        fitting = {key for key in own.keys() & state.keys() if own[key].shape == state[key].shape}
        for key in fitting:
            if own[key].is_floating_point():
                own[key].data = own[key].data.to(state[key].dtype if dtype in (None, "auto") else dtype)
        model.load_state_dict({key: state[key] for key in fitting}, strict=False)
        found = {id(tensor) for key, tensor in own.items() if key in state}
        told = {
            "missing_keys": [key for key, tensor in own.items() if id(tensor) not in found],
            "unexpected_keys": sorted(state.keys() - own.keys()),
            "mismatched_keys": sorted(own.keys() & state.keys() - fitting),
            "error_msgs": [],
        }
        return (model.eval(), told) if kwargs.get("output_loading_info") else model.eval()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """How it is copied and pickled: nobody can import the class that was made for it."""
        return _blank, (self.template, type(self.config)), vars(self)


def config_name(config: PretrainedConfig) -> str:
    """What messages call a configuration: nobody wrote the one that was made for a plain module."""
    return "its configuration" if isinstance(config, OwnModuleConfig) else type(config).__name__


def as_pretrained_(model: Any) -> Any:
    """Makes a plain module a `PreTrainedModel`, in place; anything else is left as it is.

    It stays the same object with the same parameters, state dict and forward pass, and an instance of its own class.
    Besides it has a configuration, where hfkdq records what it does, and `save_pretrained`.

    Args:
        model (`Any`): a module whose forward pass takes the columns of a batch by name and returns a dictionary.

    Returns:
        `Any`: the same object.

    Raises:
        TypeError: it cannot be copied, or its attribute `config` is no `PretrainedConfig` and no plain fields either.
    """
    module = base_of(model)
    if is_own_module(module):
        config = _config_of(module)
        module.__class__ = _class_of(_without_values(module), type(config))
        _start(module, dict(vars(module)), config)
    return model


def own_class(model: Any) -> type[PreTrainedModel] | None:
    """The class of a model that a user gave, or this class itself; of a plain module what [`as_pretrained_`] would make it.

    Raises:
        TypeError: it is neither.
    """
    if model is None or (isinstance(model, type) and issubclass(model, PreTrainedModel)):
        return model
    if isinstance(model, PreTrainedModel):
        return type(model)
    if is_own_module(model):
        return _class_of(_without_values(model), type(_config_of(model)))
    raise TypeError(
        "model must be a PreTrainedModel, a class of them, or a module of your own with the layers of the checkpoint, got "
        f"{f'the class {model.__name__}' if isinstance(model, type) else type(model).__name__}."
    )


def is_own_module(model: Any) -> bool:
    """Whether this is a plain module of the user's: neither of Transformers nor one of PyTorch itself."""
    is_plain = isinstance(model, nn.Module) and not isinstance(model, PreTrainedModel)
    return is_plain and not type(model).__module__.startswith(("torch.", "peft."))


def _start(module: Any, own: dict[str, Any], config: PretrainedConfig) -> None:
    """Does what the constructor of a `PreTrainedModel` does beside making modules; `own` are the module's attributes."""
    with undrawn():
        PreTrainedModel.__init__(module, config)
        vars(module).update(own, config=config)
        module.post_init()


def _blank(template: nn.Module, config_class: type[PretrainedConfig]) -> Any:
    made = _class_of(template, config_class)
    return made.__new__(made)


def _class_of(template: nn.Module, config_class: type[PretrainedConfig]) -> Any:
    own = type(template)
    names = chain(template._modules, template._parameters, template._buffers, vars(template))
    hidden = [name for name in names if hasattr(PreTrainedModel, name) and not hasattr(nn.Module, name)]
    held = {name: _held(name) for name in hidden if name != "config"}
    ours = ("__init__", "__reduce_ex__")
    saving = {name: inspect.getattr_static(OwnModule, name) for name in (*ours, *_SAVING)}
    about = {
        "__module__": own.__module__,
        "__qualname__": own.__qualname__,
        "template": template,
        "config_class": config_class,
        "main_input_name": next(iter(inspect.signature(template.forward).parameters), "input_ids"),
        "_tied_weights_keys": _tied(template),
    }
    return type(own.__name__, (own, OwnModule), {**held, **saving, **about})


_SAVING = ("from_pretrained", "save_pretrained", "push_to_hub", "_from_config")
"""What stays that of Transformers, also where the module's class has another, as over `PyTorchModelHubMixin`."""


def _held(name: str) -> property:
    """What a module itself holds under a name that `PreTrainedModel` has for something else, such as `base_model`."""

    def get(self: Any) -> Any:
        if name in ("device", "dtype"):  # those of the parameters, which is what a module of its own means too
            return getattr(PreTrainedModel, name).fget(self)
        for kind in ("_parameters", "_buffers", "_modules"):
            if name in vars(self)[kind]:
                return vars(self)[kind][name]
        return vars(self)[name]

    return property(get, lambda self, value: vars(self).__setitem__(name, value))


def _without_values(module: nn.Module) -> nn.Module:
    """A copy of a module whose parameters and saved buffers take no memory."""
    tensors = chain(module.parameters(), _saved_buffers(module))
    memo = {id(tensor): _like(tensor, torch.empty_like(tensor, device="meta")) for tensor in tensors}
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:  # whatever a part raises that cannot be copied
        raise TypeError(
            f"{type(module).__name__} cannot be copied ({type(error).__name__}: {error}), as a trainer does. Keep what "
            "belongs to a process, such as open files and locks, out of the module."
        ) from error


def _saved_buffers(module: nn.Module) -> Iterator[Tensor]:
    for part in module.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and name not in part._non_persistent_buffers_set:
                yield buffer


def _like(old: Tensor, new: Tensor) -> Tensor:
    return nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new


def _tied(module: nn.Module) -> Any:
    """Names of tensors that are those of another name, in the form that the line of Transformers takes."""
    first: dict[int, str] = {}
    tied = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if first.setdefault(id(tensor), name) != name:
            tied[rf"^{re.escape(name)}$"] = first[id(tensor)]
    return (tied if int(transformers.__version__.split(".")[0]) >= 5 else list(tied)) or None


def _config_of(module: nn.Module) -> PretrainedConfig:
    """The configuration that a module gets: its own, or one with the fields of its own."""
    held = getattr(module, "config", None)
    if isinstance(held, PretrainedConfig):
        return held
    fields = dict(held) if isinstance(held, Mapping) else {} if held is None else _fields_of(held)
    try:
        if fields is None:
            raise TypeError(f"a {type(held).__name__}")
        json.dumps(fields, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{type(module).__name__}.config is {brief(error)}, and that is where Transformers has a configuration that is saved. Make "
            "it a PretrainedConfig, a dict or dataclass of plain values, or give the attribute another name."
        ) from error
    return OwnModuleConfig(**fields)


def _fields_of(held: Any) -> dict[str, Any] | None:
    """Fields of a dataclass or a namespace that has nothing else."""
    if dataclasses.is_dataclass(held) or isinstance(held, (Namespace, SimpleNamespace)):
        fields = dict(vars(held))
        if not [name for name in dir(held) if not name.startswith("_") and name not in fields]:
            return fields
    return None


def _weights(path: Any, where: Mapping[str, Any]) -> dict[str, Tensor]:
    index = cached_file(path, INDEX, _raise_exceptions_for_missing_entries=False, **where)
    parts = json.loads(Path(index).read_text())["weight_map"].values() if index else ["model.safetensors"]
    state: dict[str, Tensor] = {}
    for name in sorted(set(parts)):
        state.update(load_file(str(cached_file(path, name, **where))))
    return state
