# SPDX-License-Identifier: Apache-2.0
"""The weights of a model one by one: their bits and their zeros."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedModel

from ..export.graph import stored_weights
from ..quantization import weight_quantizers
from .data import Layer

# What exporters put behind the name of a module.
_SUFFIX = re.compile(r"(\.(stored|weight|packed|codes)|_float16|_quantized)+$")


def describe_layers(model: PreTrainedModel) -> tuple[Layer, ...]:
    """The weights of two axes and more, in the order of the model; bits are those of a fake quantizer where there is one."""
    bits = {name: quantizer.bits for name, quantizer in weight_quantizers(model).items()}
    saved = model.state_dict().keys()
    return tuple(
        Layer(
            name=name, parameters=weight.numel(), bits=bits.get(name, 8 * weight.element_size()),
            sparsity=int((weight == 0).sum()) / max(1, weight.numel()),
        )
        for name, weight in model.named_parameters() if name in saved and weight.dim() > 1
    )  # fmt: skip


def describe_stored(files: Iterable[Path], model: PreTrainedModel) -> tuple[Layer, ...]:
    """The weights of ONNX files, under the names that they have in the model where those tell; bits are those on disk."""
    known = {name: weight.numel() for name, weight in model.named_parameters()}
    layers = []
    for stored in (stored for file in files for stored in stored_weights(file)):
        name = _SUFFIX.sub("", stored.name) + ".weight"
        name = name if name in known else stored.name
        numbers = known.get(name, stored.numbers)
        if numbers:
            bits = max(1, round(8 * stored.bytes / numbers))
            layers.append(Layer(name=name, parameters=numbers, bits=bits, sparsity=stored.zeros))
    return tuple(layers)
