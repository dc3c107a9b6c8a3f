# SPDX-License-Identifier: Apache-2.0
"""What `quantization=` of an export may be, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..quantization import layer_class
from ..specs import QuantizationSpec

# Largest difference from torch that passes, as a share of the largest logit. Where activations stay in floating point
# only rounding differs; a uint8 activation at a rounding tie may change its code, and move all that follow it.
FLOAT_TOLERANCE = 1e-4
INT8_TOLERANCE = 0.1
# Compared with the float model, so that this is the error of quantization itself.
FLOAT16_TOLERANCE = 0.02
DYNAMIC_TOLERANCE = 0.3

SPECS: dict[str, QuantizationSpec] = {
    "int8": QuantizationSpec(),
    "int8_weights": QuantizationSpec(activation_bits=None),
    "int4_weights": QuantizationSpec(weight_bits=4, group_size=32, activation_bits=None),
}
NAMES = ("float32", "float16", "dynamic", *SPECS, "auto")


@dataclass(frozen=True)
class Kind:
    """A kind of file: its name in the report, the spec of its integers, how far from torch it may be.

    Where the spec was only named, it is fitted to the model, see [`fitted`].
    """

    name: str
    spec: QuantizationSpec | None
    tolerance: float
    is_named: bool = False

    @property
    def has_integers(self) -> bool:
        """Whether torch computes with the file's own integers, so that the two can be equal."""
        return self.spec is not None

    @property
    def multiplies_integers(self) -> bool:
        """Whether activations are integers too."""
        return self.name in ("int8", "dynamic")


def kind_of(quantization: Any) -> Kind:
    """The kind of file that `quantization=` asks for.

    Raises:
        TypeError: it is neither a spec nor a name.
        ValueError: there is no such name.
    """
    if quantization is None or quantization == "float32":
        return Kind("float", None, FLOAT_TOLERANCE)
    if isinstance(quantization, QuantizationSpec):
        weights_only = quantization.activation_bits is None
        return Kind(
            "weights" if weights_only else "int8", quantization, FLOAT_TOLERANCE if weights_only else INT8_TOLERANCE
        )
    if not isinstance(quantization, str):
        raise TypeError(
            f"quantization must be None, a QuantizationSpec or one of {', '.join(NAMES)}, got {type(quantization).__name__}."
        )
    if quantization in SPECS:
        return replace(kind_of(SPECS[quantization]), is_named=True)
    if quantization == "float16":
        return Kind("float16", None, FLOAT16_TOLERANCE)
    if quantization == "dynamic":
        return Kind("dynamic", None, DYNAMIC_TOLERANCE)
    raise ValueError(
        f"quantization={quantization!r} does not exist. Use None, a QuantizationSpec or one of {', '.join(NAMES)}."
    )


def fitted(spec: QuantizationSpec, model: nn.Module) -> QuantizationSpec:
    """The spec with one scale a channel where its groups do not divide the inputs, and 8 bits for convolutions.

    Convolutions have few weights, and lose most at 4 bits.
    """
    if spec.group_size is None:
        return spec
    overrides = dict(spec.overrides)
    for name, module in model.named_modules():
        if not spec.selects(name, module):
            continue
        if layer_class(module) in (nn.Conv1d, nn.Conv2d):
            overrides[name] = {"weight_bits": 8, "group_size": None}
        elif isinstance(module, (nn.Linear, Conv1D)):
            inputs = len(module.weight) if isinstance(module, Conv1D) else module.in_features
            if inputs % spec.group_size:
                overrides[name] = {"group_size": None}
    return replace(spec, overrides=overrides)
