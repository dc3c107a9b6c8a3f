# SPDX-License-Identifier: Apache-2.0
"""hfkdq: distil, prune and quantize Transformers models, and export what was trained to ONNX."""

__version__ = "0.1.0"
