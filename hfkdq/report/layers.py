# SPDX-License-Identifier: Apache-2.0
"""The weights of a model one by one: their bits and their zeros."""

from __future__ import annotations

from transformers import PreTrainedModel

from ..quantization import weight_quantizers
from .data import Layer


def describe_layers(model: PreTrainedModel) -> tuple[Layer, ...]:
    """The weights of two axes and more, in the order of the model; bits are those of a fake quantizer where there is one."""
    bits = {name: quantizer.bits for name, quantizer in weight_quantizers(model).items()}
    saved = model.state_dict().keys()
    return tuple(
        Layer(
            name=name,
            parameters=weight.numel(),
            bits=bits.get(name, 8 * weight.element_size()),
            sparsity=int((weight == 0).sum()) / max(1, weight.numel()),
        )
        for name, weight in model.named_parameters()
        if name in saved and weight.dim() > 1
    )
