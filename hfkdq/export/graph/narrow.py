# SPDX-License-Identifier: Apache-2.0
"""Turns float files into narrower ones with ONNX Runtime's own tools.

Knows files; no model, no torch.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.transformers.float16 import convert_float_to_float16


def quantize_dynamically(path: Path) -> None:
    """Replaces a float32 file by its dynamic int8 version, with the settings of Optimum's `avx512_vnni(is_static=False)`.

    Weights are symmetric int8 per channel; activations, those of attention's products too, get a uint8 range at each
    call.
    """
    with _quiet(), tempfile.TemporaryDirectory(dir=path.parent) as folder:
        target = Path(folder, path.name)
        options = {"WeightSymmetric": True, "ActivationSymmetric": False, "EnableSubgraph": False}
        quantize_dynamic(path, target, per_channel=True, weight_type=QuantType.QInt8, extra_options=options)
        target.replace(path)


def to_float16(path: Path) -> None:
    """Replaces a float32 file by one that stores and computes in float16; what goes in and comes out stays float32."""
    with _quiet():
        onnx.save(convert_float_to_float16(onnx.load(path), keep_io_types=True), path)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides that a file was not preprocessed, which it need not be."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
