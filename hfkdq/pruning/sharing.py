# SPDX-License-Identifier: Apache-2.0
"""Layers that use the very same parameters, in memory and in training; what is saved stays a plain checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..facts import drop_fact, read_facts, record_fact
from ..modeling import find_layer_stacks

logger = logging.get_logger(__name__)

FACT = "sharing"


@torch.no_grad()
def share_layers(
    model: PreTrainedModel, groups: int | Sequence[Sequence[int]] | None = None, *, init: str = "first"
) -> PreTrainedModel:
    """Makes the layers of each group use the very same parameters, in place.

    Cross-layer parameter sharing as in Lan et al., "ALBERT: A Lite BERT for Self-supervised Learning of Language
    Representations" (2020). The layers stay modules of their own, with buffers and activation ranges of their own; their
    parameters are the same objects, so that `model.num_parameters()` counts them once, an optimizer made afterwards holds
    them once, and their gradient is the sum over the layers. The computation takes as long as before.

    `state_dict()`, `save_pretrained` and checkpoints of a `Trainer` hold every layer, with repeated values: a plain
    checkpoint, as large as before until it is compressed (see [`compressed_size`]). `from_pretrained` loads it like any
    other, and [`restore_sharing_`] shares the layers again. Loading layers that differ into a model that shares them is
    refused.

    Share before the `Trainer` is made, and before quantization-aware training; parameters that are sharded over devices
    (FSDP, DeepSpeed ZeRO-3) cannot be shared.

    Args:
        model (`PreTrainedModel`): a model with one stack of layers.
        groups (list of lists of `int`, or `int`, *optional*): numbers of the layers of each group, counted from 1;
            layers that are not named stay on their own. A number `k` makes `k` groups of consecutive layers, as even
            as possible: layer `i` of `L`, counted from 0, is in group `floor(i * k / L)`. All layers are one group by
            default.
        init (`str`, defaults to `"first"`): which weights a group starts from: `"first"`, those of the layer it names
            first, or `"mean"`, the mean over its layers.

    Returns:
        `PreTrainedModel`: the same model. What was done is in `model.config.hfkdq["sharing"]`: `layers`, the groups.

    Raises:
        TypeError: `model` is no `PreTrainedModel`.
        ValueError: groups that are out of range, empty or overlap, layers that are not alike, an unknown `init`, a
            model with quantized weights, fake quantizers or adapters, or without one clear stack of layers. The
            model is then as it was.

    Example:
        ```python
        >>> from transformers import BertConfig, BertModel
        >>> from hfkdq.pruning.sharing import share_layers
        >>> config = BertConfig(hidden_size=32, num_attention_heads=2, intermediate_size=64, num_hidden_layers=4)
        >>> model = share_layers(BertModel(config), groups=2)
        >>> model.config.hfkdq["sharing"]
        {'layers': [[1, 2], [3, 4]]}
        >>> model.encoder.layer[0].output.dense.weight is model.encoder.layer[1].output.dense.weight
        True

        ```
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"share_layers needs a Transformers PreTrainedModel, got {type(model).__name__}.")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError("The model has adapters, which belong to single layers. Merge them first, then share layers.")
    if "quantization" in read_facts(model):
        raise ValueError(
            "The model carries fake quantizers, whose scales were found for the weights before sharing. Call "
            "share_layers first and make the QATCallback or call quantize afterwards."
        )
    layers = _only_stack(model)
    chosen = _checked_groups(groups, len(layers))
    if init not in ("first", "mean"):
        raise ValueError(f"init={init!r} must be 'first' (the weights of a group's first layer) or 'mean'.")
    for group in chosen:
        _check_alike(layers, group)
    before = model.num_parameters()
    unshare_layers_(model)
    for group in chosen:
        if init == "mean":
            members = [_parameters(layers[number - 1]) for number in group]
            for name, parameter in members[0].items():
                wide = torch.promote_types(parameter.dtype, torch.float32)
                parameter.copy_(torch.stack([member[name].to(wide) for member in members]).mean(dim=0))
        _tie_(layers, group)
    record_fact(model, FACT, {"layers": chosen})
    logger.info(f"{len(layers)} layers in groups {chosen}: {before} parameters became {model.num_parameters()}.")
    return model


def restore_sharing_(model: PreTrainedModel) -> PreTrainedModel:
    """Shares the layers of a freshly loaded model again, as `model.config.hfkdq["sharing"]` says, in place. A model
    without this record is left as it is. Returns the same model. Raises `ValueError`: layers that the record calls
    shared are not equal. The model is then as it was."""
    groups = read_facts(model).get(FACT, {}).get("layers", [])
    if not groups:
        return model
    layers = _only_stack(model)
    groups = _checked_groups(groups, len(layers))
    for group in groups:
        _check_alike(layers, group)
        first = _parameters(layers[group[0] - 1])
        for number in group[1:]:
            other = _parameters(layers[number - 1])
            differing = [name for name, value in first.items() if not torch.equal(value, other[name])]
            if differing:
                raise ValueError(
                    f"config.hfkdq records that layers {group} share their weights, but {differing[0]} of layers "
                    f"{group[0]} and {number} differ. The layers were trained apart since; call "
                    "unshare_layers_(model) to drop the record, or share_layers(model, groups) to share them anew."
                )
    for group in groups:
        _tie_(layers, group)
    return model


@torch.no_grad()
def unshare_layers_(model: PreTrainedModel) -> PreTrainedModel:
    """Gives every layer parameters of its own again, with the values they have, and drops the record, in place.

    Optimizers made before are stale. Returns the same model.
    """
    layers = _only_stack(model)
    copies: dict[tuple[int, int], nn.Parameter] = {}  # by layer, so that ties within one stay
    for index, name, parameter in list(_repeated(layers)):
        key = (index, id(parameter))
        if key not in copies:
            copies[key] = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
        _set_(layers[index], name, copies[key])
    drop_fact(model, FACT)
    return model


def _only_stack(model: PreTrainedModel) -> nn.ModuleList:
    stacks = find_layer_stacks(model)
    if len(stacks) > 1:
        raise ValueError(
            f"{type(model).__name__} has {len(stacks)} stacks of layers ({', '.join(stack.name for stack in stacks)}); sharing is "
            "for encoders or decoders alone."
        )
    return stacks[0].layers


def _checked_groups(groups: int | Sequence[Sequence[int]] | None, total: int) -> list[list[int]]:
    count = 1 if groups is None else groups
    if isinstance(count, int):
        if isinstance(count, bool) or not 1 <= count <= total:
            raise ValueError(f"groups={groups!r}: {total} layers make 1 to {total} groups.")
        members: list[list[int]] = [[] for _ in range(count)]
        for i in range(total):
            members[i * count // total].append(i + 1)
        return members
    listed = count if isinstance(count, Sequence) else []
    found = [list(group) if isinstance(group, Sequence) else [] for group in listed]
    named = [number for group in found for number in group]
    in_range = all(type(number) is int and 1 <= number <= total for number in named)
    if not named or not all(found) or not in_range or len(set(named)) < len(named):
        raise ValueError(
            f"groups={groups!r} must be lists of layer numbers, 1 to {total}, each layer in one group at most, such as "
            f"groups=[[1, {total}]]."
        )
    return found


def _parameters(layer: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a layer that are saved; learned scales of fake quantizers are its own and are not."""
    saved = layer.state_dict().keys()
    return {name: p for name, p in layer.named_parameters(remove_duplicate=False) if name in saved}


def _check_alike(layers: nn.ModuleList, group: Sequence[int]) -> None:
    first = _parameters(layers[group[0] - 1])
    for name, parameter in first.items():
        if not parameter.is_floating_point() or parameter.is_meta:
            raise ValueError(
                f"{name} of layer {group[0]} is {parameter.dtype} on {parameter.device}; only floating-point weights in "
                "memory can be shared. Load the model without quantization_config and without offloading."
            )
    for number in group[1:]:
        other = _parameters(layers[number - 1])
        differing = sorted(first.keys() ^ other.keys())
        if differing:
            have, lack = (group[0], number) if differing[0] in first else (number, group[0])
            raise ValueError(
                f"Layers {group[0]} and {number} cannot share parameters: layer {have} has {differing[0]}, layer {lack} "
                "has not. Put layers with the same parameters into one group."
            )
        for name, parameter in first.items():
            here, there = _description(parameter), _description(other[name])
            if here != there:
                raise ValueError(
                    f"Layers {group[0]} and {number} cannot share parameters: {name} is {here} in layer {group[0]} and "
                    f"{there} in layer {number}. Put layers that are alike into one group."
                )


def _description(parameter: nn.Parameter) -> str:
    kind = "trained" if parameter.requires_grad else "frozen"
    return f"{kind}, {str(parameter.dtype).removeprefix('torch.')} of shape {tuple(parameter.shape)} on {parameter.device}"


def _set_(layer: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, last = name.rpartition(".")
    setattr(layer.get_submodule(owner), last, parameter)


def _tie_(layers: nn.ModuleList, group: Sequence[int]) -> None:
    first = _parameters(layers[group[0] - 1])
    for number in group[1:]:
        for name, parameter in first.items():
            _set_(layers[number - 1], name, parameter)
    # On the stack, so that a state dict of whatever contains it passes here.
    if _write_repeated not in layers._state_dict_hooks.values():
        layers.register_state_dict_post_hook(_write_repeated)
        layers.register_load_state_dict_pre_hook(_refuse_differing)


def _repeated(layers: nn.Module) -> Iterator[tuple[int, str, nn.Parameter]]:
    """Index of the layer, name in it, and parameter, of all that an earlier layer has already."""
    first: dict[int, int] = {}
    for index, layer in enumerate(layers.children()):
        for name, parameter in layer.named_parameters(remove_duplicate=False):
            if first.setdefault(id(parameter), index) != index:
                yield index, name, parameter


def _write_repeated(layers: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """Clones repeated tensors, which safetensors and `save_pretrained` refuse to write or would leave out."""
    for index, name, _ in _repeated(layers):
        key = f"{prefix}{index}.{name}"
        # With keep_vars=True the parameters themselves are asked for.
        if key in state_dict and not isinstance(state_dict[key], nn.Parameter):
            state_dict[key] = state_dict[key].clone()


def _refuse_differing(
    layers: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
    missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
) -> None:  # fmt: skip
    """Refuses to load different values into shared layers: the last would win, or the sharing would end."""
    values: dict[int, str] = {}
    for index, layer in enumerate(layers.children()):
        for name, parameter in layer.named_parameters(remove_duplicate=False):
            key = f"{prefix}{index}.{name}"
            other = values.setdefault(id(parameter), key)
            if other == key or key not in state_dict or other not in state_dict:
                continue
            assigned = local_metadata.get("assign_to_params_buffers", False)
            if assigned or not torch.equal(state_dict[key], state_dict[other]):
                error_msgs.append(
                    f"{other} and {key} are one parameter here (share_layers), but "
                    + ("assign=True would make them two." if assigned else "differ in what is to be loaded.")
                    + " Call unshare_layers_(model) first if the layers are to be different."
                )
                return
