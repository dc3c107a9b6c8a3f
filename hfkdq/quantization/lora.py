# SPDX-License-Identifier: Apache-2.0
"""The LoRA layer of PEFT around a fake-quantized layer: what is quantized is the weight with its adapters."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor


class QuantizedLoraLinear(LoraLinear):
    r"""A `lora.Linear` that computes \\(Q(W + \sum_i \frac{\alpha_i}{r_i} B_i A_i)\\) of its quantized input. The sum
    is over the active adapters, in the order and precision in which PEFT merges them, so that merging them later (Hu
    et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, section 4.1) changes nothing."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "adapter_names mixes adapters within a batch, but one quantized weight has one sum of adapters. Choose "
                "them with model.set_adapter, or remove the fake quantizers with strip_quantizers_(model)."
            )
        if not self.base_layer.fake_quantize_enabled:
            return super().forward(x, *args, **kwargs)
        return self.base_layer(x)

    def merged_weight(self, weight: Tensor) -> Tensor:
        """`weight`, that of the base layer, with what the active adapters add to it."""
        if self.disable_adapters or self.merged:
            return weight
        with torch.autocast(weight.device.type, enabled=False):
            for name in self.active_adapters:
                if name in self.lora_A:
                    weight = (weight + self.get_delta_weight(name)).to(weight.dtype)
        return weight


def unsupported_reason(layer: Any) -> str:
    """Why the fake quantizer cannot sit on the merged weight of a layer of PEFT; empty if it can."""
    if type(layer) not in (LoraLinear, QuantizedLoraLinear):
        return f"{type(layer).__module__.removeprefix('peft.tuners.')}.{type(layer).__name__} is no lora.Linear"
    for name in layer.lora_A:
        dropout = getattr(layer.lora_dropout[name], "p", 0.0)
        if dropout > 0.0:
            return (
                f"its adapter {name!r} has lora_dropout={dropout:g}, which drops inputs of the adapter alone and so is no "
                "function of one merged weight; use LoraConfig(lora_dropout=0.0)"
            )
        if name in layer.lora_variant:
            kind = type(layer.lora_variant[name]).__name__.removesuffix("LinearVariant")
            return f"its adapter {name!r} is of the kind {kind}, which adds no fixed product of two matrices"
        if layer.lora_bias[name]:
            return f"its adapter {name!r} has lora_bias=True"
    return ""
