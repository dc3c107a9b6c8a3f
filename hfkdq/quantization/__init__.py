# SPDX-License-Identifier: Apache-2.0
"""Quantization-aware training and post-training quantization, of all bits from one spec."""

from .activations import ActivationQuantizer
from .allocation import BitAllocation
from .attention import AttentionQuantizer
from .batch_norm import fold_batch_norm_
from .callback import QATCallback
from .convert import prepare_qat_, strip_quantizers_
from .layers import QuantizedConv1D, QuantizedConv1d, QuantizedConv2d, QuantizedEmbedding, QuantizedLinear, layer_class
from .merging import merge_adapters
from .naming import means_the_same, quantized_modules
from .post_training import load_quantized, quantize
from .quantized_module import QuantizedModule
from .records import (
    activation_quantizers,
    activation_ranges,
    quantized_spec,
    set_activation_ranges_,
    weight_quantizers,
)
from .sensitivity import suggest_bits
from .several_weights import QuantizedExperts, QuantizedGRU, QuantizedLSTM
from .weights import WeightQuantizer

__all__ = [
    "ActivationQuantizer", "AttentionQuantizer", "BitAllocation", "QATCallback", "QuantizedConv1D", "QuantizedConv1d",
    "QuantizedConv2d", "QuantizedEmbedding", "QuantizedExperts", "QuantizedGRU", "QuantizedLSTM", "QuantizedLinear",
    "QuantizedModule", "WeightQuantizer", "activation_quantizers", "activation_ranges", "fold_batch_norm_",
    "layer_class", "load_quantized", "means_the_same", "merge_adapters", "prepare_qat_", "quantize",
    "quantized_modules", "quantized_spec", "set_activation_ranges_", "strip_quantizers_", "suggest_bits",
    "weight_quantizers",
]  # fmt: skip
