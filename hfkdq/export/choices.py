# SPDX-License-Identifier: Apache-2.0
"""Names of what may be chosen for an export. Imports nothing, so that the command line looks at them first."""

from __future__ import annotations

ONNXRUNTIME, STANDARD, OPENVINO = "onnxruntime", "standard", "openvino"
TARGETS = (ONNXRUNTIME, STANDARD, OPENVINO)
FLAT, HUB = "flat", "hub"
LAYOUTS = (FLAT, HUB)
WITHOUT_FILE = "Distill, prune and quantize it without a file: quantize, save_pretrained and load_quantized need none."
"""What to do with a model that cannot be exported."""
NO_POOLING = "none"
# The names of sentence-transformers, and what its files call them, in the order in which it joins several.
POOLINGS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
