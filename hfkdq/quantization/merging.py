# SPDX-License-Identifier: Apache-2.0
"""Merging adapters of PEFT into the weights of a model, quantized by bitsandbytes or not, and with its fake quantizers."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .adapters import check_adapters, plain_modules, wrapped_modules
from .quantized_module import QuantizedModule
from .records import record_ranges


def merge_adapters(model: Any) -> PreTrainedModel:
    """A copy of a PEFT model in which the active adapters are part of the weights.

    Fake quantizers, ranges and their record stay; where they were put in before training, logits stay what they were bit
    for bit. Layers that bitsandbytes had quantized become floating point, of the precision they were loaded for, and the
    `overrides` of the spec in the copy say that they are not quantized.

    Args:
        model (`PeftModel`): a model with LoRA adapters, with or without fake quantizers; not changed.

    Returns:
        `PreTrainedModel`: the model without adapters, on the same device and in the same mode.

    Raises:
        TypeError: `model` is no `PeftModel`.
        ValueError: its adapters are of another kind than LoRA.

    Example:
        ```python
        from hfkdq.quantization import merge_adapters

        trainer.train()  # a PeftModel, with QATCallback(spec)
        merge_adapters(trainer.model).save_pretrained("out/merged")
        ```
    """
    peft = sys.modules.get("peft")
    if peft is None or not isinstance(model, peft.PeftModel):
        raise TypeError(f"merge_adapters takes a PeftModel, got {type(model).__name__}, which has nothing to merge.")
    check_adapters(model)
    model = copy.deepcopy(model)
    restored = _restore_integers_(model)
    merged: PreTrainedModel = model.merge_and_unload()
    for module in merged.modules():
        vars(module).pop("adapter", None)
    if restored:
        # The marks of bitsandbytes go, and its former layers stay out of the spec.
        quantizer = getattr(merged, "hf_quantizer", None)
        if quantizer is not None:
            quantizer.remove_quantization_config(merged)
        for mark in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
            vars(merged).pop(mark, None)
        for module in merged.modules():
            if isinstance(module, QuantizedModule):
                spec = module.quantization_spec
                module.quantization_spec = replace(spec, overrides={**spec.overrides, **dict.fromkeys(restored)})
        record_ranges(merged)
    return merged.requires_grad_(True)


def _restore_integers_(model: Any) -> list[str]:
    """Puts layers in floating point in the place of those of bitsandbytes and their adapters; their names."""
    owners = dict(plain_modules(model))
    linear: list[Any] = [entry for entry in wrapped_modules(model) if isinstance(entry[1], nn.Linear)]
    found = [entry for entry in linear if not entry[1].weight.is_floating_point()]
    for name, module, wrapper in found:
        parent, _, key = name.rpartition(".")
        if wrapper is not None and "modules_to_save" in wrapper._modules:
            raise ValueError(f"{name} is trained whole (modules_to_save), which integers cannot be. Leave it out.")
        setattr(owners[parent], key, _in_floating_point(module, wrapper))
    return [name for name, _, _ in found]


@torch.no_grad()
def _in_floating_point(module: nn.Linear, lora: Any) -> nn.Linear:
    """A linear layer with the weight that `module` of bitsandbytes stands for, and the active adapters in it."""
    weight = _dequantized(module)
    bias = module.bias
    for name in lora.active_adapters if lora is not None and not lora.disable_adapters else ():
        if name not in lora.lora_A:
            continue
        if name in lora.lora_variant:
            weight = lora.lora_variant[name].merge_safe(lora, name, weight)
        else:
            weight = (weight + lora.get_delta_weight(name)).to(weight.dtype)
        if lora.lora_bias[name]:
            added = lora.lora_B[name].bias * lora.scaling[name]
            bias = added if bias is None else bias + added
    plain = nn.Linear(module.in_features, module.out_features, bias is not None, device="meta").train(module.training)
    plain.weight = nn.Parameter(weight)
    if bias is not None:
        plain.bias = nn.Parameter(bias.to(weight.dtype))
    return plain


def _dequantized(module: nn.Linear) -> Tensor:
    from peft.utils.integrations import dequantize_module_weight

    state: Any = getattr(module.weight, "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        # Its kernel for AVX512 reads another layout, into which the first forward pass brings the weights.
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as unpack

        module.weight.data, state = unpack(module.weight.data, state)
        if not state.nested:  # bitsandbytes 0.50 leaves them transposed
            state.absmax = state.absmax.t().reshape(-1).float()
    return dequantize_module_weight(module).detach()
