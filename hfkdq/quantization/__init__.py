# SPDX-License-Identifier: Apache-2.0
"""Quantization-aware training and post-training quantization: int8 weights, uint8 activations.

Knows specs, models and the callback protocol; never the exported file.
"""

from .callback import QATCallback
from .convert import (
    activation_ranges,
    prepare_qat_,
    quantized_modules,
    quantized_spec,
    set_activation_ranges_,
    strip_quantizers_,
)
from .fake_quant import ActivationQuantizer, QuantizedEmbedding, QuantizedLinear
from .post_training import load_quantized, quantize

__all__ = [
    "ActivationQuantizer",
    "QATCallback",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "activation_ranges",
    "load_quantized",
    "prepare_qat_",
    "quantize",
    "quantized_modules",
    "quantized_spec",
    "set_activation_ranges_",
    "strip_quantizers_",
]
