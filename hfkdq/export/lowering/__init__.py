# SPDX-License-Identifier: Apache-2.0
"""Turns fake quantizers into modules that hold integer codes and trace to ONNX operators."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ...quantization import (
    AttentionQuantizer,
    QuantizedConv1D,
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedEmbedding,
    QuantizedExperts,
    QuantizedGRU,
    QuantizedLinear,
    QuantizedLSTM,
    quantized_modules,
)
from .activations import ActivationQDQ
from .layers import FoldedConv, FoldedLinear, IntegerConv, IntegerConv1d, IntegerLinear, NBitLinear, StoredEmbedding
from .read_weights import leave_read_weights_
from .several_weights import Recurrent, StoredExperts, lower_recurrent_

__all__ = ["check_lowerable", "leave_read_weights_", "lower_quantizers_", "lower_recurrent_"]


def check_lowerable(model: PreTrainedModel) -> None:
    """Refuses states with a projection, and fake quantizers that are off yet or wider yet than their spec."""
    for name, module in quantized_modules(model).items():
        if getattr(module, "proj_size", 0):
            raise ValueError(
                f"{name} projects its states (proj_size={module.proj_size}), which ONNX's LSTM does not. "
                f"load_quantized runs it in torch; exclude_modules={[name]} leaves it in floating point, "
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


def lower_quantizers_(
    model: PreTrainedModel, *, target: str = "onnxruntime", unsigned: bool = False, integer_convolutions: bool = False
) -> int:
    """Replaces every fake-quantized layer of a model on the CPU by one that holds integer codes, in place.

    It computes the same and can be traced, but no longer trained. Returns how many linear layers, and convolutions that are
    written as such, were replaced. Without `target="onnxruntime"` only ONNX's own operators are used; `unsigned` writes
    tables that a head shares as uint8; `integer_convolutions` keeps weights of convolutions codes while the file runs.
    """
    check_lowerable(model)
    linears = 0
    # A table that encoder and decoder share has several names.
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    modules = quantized_modules(model).values()
    shared = {m.weight_quantizer for m in modules if isinstance(m, QuantizedLinear)}
    tables = {m: StoredEmbedding.of(m, unsigned and m.weight_quantizer in shared)
              for m in modules if isinstance(m, QuantizedEmbedding)}  # fmt: skip
    by_quantizer = {module.weight_quantizer: table.stored for module, table in tables.items()}
    for module in modules:
        if isinstance(module, (QuantizedLinear, QuantizedConv1D)):
            lowered: nn.Module = _linear(module, target, by_quantizer.get(module.weight_quantizer))
            linears += 1
        elif isinstance(module, QuantizedConv1d) and IntegerConv1d.fits(module):
            lowered = IntegerConv1d(module)
            linears += 1
        elif isinstance(module, (QuantizedConv1d, QuantizedConv2d)):
            lowered = IntegerConv(module) if integer_convolutions and IntegerConv.fits(module) else FoldedConv(module)
        elif isinstance(module, QuantizedEmbedding):
            lowered = tables[module]
        elif isinstance(module, (QuantizedLSTM, QuantizedGRU)):
            lowered = Recurrent(module)
        elif isinstance(module, QuantizedExperts):
            lowered = StoredExperts.of(module)
        for name in names[module]:
            model.set_submodule(name, lowered)
    for attention in [module for module in model.modules() if isinstance(module, AttentionQuantizer)]:
        for operand, quantizer in attention.operands.items():
            attention.operands[operand] = ActivationQDQ(quantizer)  # type: ignore[arg-type]
    return linears


def _linear(module: QuantizedLinear | QuantizedConv1D, target: str, table: Any) -> nn.Module:
    """The layer in the operators that run it best; `table` is the stored weight of the embedding that it shares."""
    scheme, bits = module.quantization_scheme, module.weight_quantizer.bits
    is_linear = scheme.weight_mapping == "linear" and bits <= 8
    if is_linear and scheme.group_size is None and ActivationQDQ(module.activation_quantizer).is_integer:
        return IntegerLinear(module, table)
    # With 8 bits, MatMulNBits takes several times as long as a float layer does (`make bench-kernels`).
    from ..runtime import multiplies_blocks  # loads ONNX Runtime, which nothing else here needs

    in_blocks = is_linear and bits <= 4 and target == "onnxruntime" and multiplies_blocks(2 if bits <= 2 else 4)
    return NBitLinear(module) if in_blocks else FoldedLinear(module, table)
