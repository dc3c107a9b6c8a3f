# SPDX-License-Identifier: Apache-2.0
"""Turns fake quantizers into modules that hold integer codes and trace to ONNX operators."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from ...quantization import (
    AttentionQuantizer,
    QuantizedConv1D,
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedModule,
    quantized_modules,
)
from .activations import ActivationQDQ
from .layers import FoldedConv, FoldedLinear, IntegerConv1d, IntegerLinear, NBitLinear, StoredEmbedding

__all__ = ["check_lowerable", "lower_quantizers_"]

_LOWERABLE = (QuantizedLinear, QuantizedConv1D, QuantizedConv1d, QuantizedConv2d, QuantizedEmbedding)


def check_lowerable(model: PreTrainedModel) -> None:
    """Refuses recurrent modules, and fake quantizers that are off yet or wider yet than their spec."""
    for name, module in quantized_modules(model).items():
        if not isinstance(module, _LOWERABLE):
            raise ValueError(
                f"{name} has recurrent weights ({type(module).__name__}), which this release does not write. "
                f"load_quantized runs them in torch; exclude_modules={[name]} leaves them in floating point, "
                'and quantization="float32" exports the float weights of the whole model.'
            )
        if not module.fake_quantize_enabled:
            raise ValueError(
                f"{name} has fake quantizers that are off: its training has not reached the point where they begin. "
                "Resume the training and export what it ends with."
            )
        bits = module.quantization_scheme.weight_bits
        if module.weight_quantizer.bits != bits:
            raise ValueError(
                f"{name} has weights of {module.weight_quantizer.bits} bits, on the way to the {bits} of its spec. "
                "Resume the training and export what it ends with."
            )


def lower_quantizers_(model: PreTrainedModel, *, target: str = "onnxruntime") -> int:
    """Replaces every fake-quantized layer of a model on the CPU by one that holds integer codes, in place.

    It computes the same and can be traced, but no longer trained. Returns how many linear layers, and convolutions that are
    written as such, were replaced. Without `target="onnxruntime"` only ONNX's own operators are used.
    """
    check_lowerable(model)
    linears = 0
    # A table that encoder and decoder share has several names.
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    for module in quantized_modules(model).values():
        if isinstance(module, (QuantizedLinear, QuantizedConv1D)):
            lowered: nn.Module = _linear(module, target)
            linears += 1
        elif isinstance(module, QuantizedConv1d) and IntegerConv1d.fits(module):
            lowered = IntegerConv1d(module)
            linears += 1
        elif isinstance(module, (QuantizedConv1d, QuantizedConv2d)):
            lowered = FoldedConv(module)
        elif isinstance(module, QuantizedEmbedding):
            lowered = StoredEmbedding(module)
        for name in names[module]:
            model.set_submodule(name, lowered)
    for attention in [module for module in model.modules() if isinstance(module, AttentionQuantizer)]:
        for operand, quantizer in attention.operands.items():
            attention.operands[operand] = ActivationQDQ(quantizer)  # type: ignore[arg-type]
    return linears


def _linear(module: QuantizedLinear | QuantizedConv1D, target: str) -> nn.Module:
    """The layer in the operators that run it best."""
    scheme, bits = module.quantization_scheme, module.weight_quantizer.bits
    is_linear = scheme.weight_mapping == "linear" and bits <= 8
    if is_linear and scheme.group_size is None and _has_bytes(module):
        return IntegerLinear(module)
    # With 8 bits, MatMulNBits takes several times as long as a float layer does (`make bench-kernels`).
    return NBitLinear(module) if is_linear and bits <= 4 and target == "onnxruntime" else FoldedLinear(module)


def _has_bytes(module: QuantizedModule) -> bool:
    """Whether the input is uint8."""
    return ActivationQDQ(module.activation_quantizer).is_integer
