# SPDX-License-Identifier: Apache-2.0
"""Loads a checkpoint for a precision: with or without the fake quantizers that it records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoProcessor, AutoTokenizer, PreTrainedModel

from ..export.precisions import AUTO, FLOAT, PRECISIONS, TRAINED
from ..modeling import check_json, load_checkpoint, load_config
from ..quantization import load_quantized, quantized_spec
from ..quantization.records import recorded_quantization
from ..specs import QuantizationSpec

_PROCESSOR_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "preprocessor_config.json", "processor_config.json",
)  # fmt: skip


def load_model(checkpoint: str, name: str | None, calibrated: bool) -> tuple[PreTrainedModel, QuantizationSpec | str]:
    """The model, with fake quantizers if the precision of this name needs them, and `quantization=` of `export_onnx`.

    By default the name is `"trained"` if the checkpoint has a record, else `"float32"`. `ValueError` for `"trained"` without
    one, and where ranges are needed and there are no calibration data.
    """
    recorded = recorded_quantization(load_config(checkpoint))
    spec = None if recorded is None else recorded[0]
    if name is None:
        name = FLOAT if spec is None else TRAINED
    if name == TRAINED and spec is None:
        raise ValueError(
            f"{checkpoint} records no quantization: it was not trained with QATCallback, or was saved without its "
            "fake quantizers. For int8 without training pass --quantization int8 --calibration-data DATA."
        )
    precision = PRECISIONS.get(name)
    # The very integers that were asked for are there already.
    if spec is not None and (precision is None or precision.spec == spec) and name != "none":
        return load_quantized(checkpoint, dtype="auto"), name if name == AUTO else spec
    if precision is not None and precision.needs_calibration and not calibrated:
        others = ", ".join(other for other, entry in PRECISIONS.items() if not entry.needs_calibration)
        raise ValueError(
            f"--quantization {name} needs --calibration-data, to find the ranges of activations on. Without data there "
            f"are {others}."
        )
    return load_checkpoint(checkpoint), FLOAT if name == "none" else name


def load_for(
    checkpoint: str, names: Sequence[str | None], calibrated: bool
) -> tuple[PreTrainedModel, list[QuantizationSpec | str]]:
    """As [`load_model`] for several precisions: one model, with fake quantizers if a precision needs them."""
    model, wanted = None, []
    for name in names:
        found, quantization = load_model(checkpoint, name, calibrated)
        wanted.append(quantization)
        model = found if model is None or quantized_spec(model) is None else model
    assert model is not None  # noqa: S101  (there is one name at the least)
    return model, wanted


def load_processor(checkpoint: str) -> Any:
    """The checkpoint's tokenizer or processor, `None` if it has none; `ValueError` if its files are damaged."""
    folder = Path(checkpoint)
    if folder.is_dir():
        check_json(folder, _PROCESSOR_FILES)
    reason = ""
    # Of a speech model that classifies there is a feature extractor alone, which AutoProcessor does not look for.
    for loader in (AutoProcessor, AutoTokenizer, AutoFeatureExtractor, AutoImageProcessor):
        try:
            return loader.from_pretrained(checkpoint, trust_remote_code=False)
        except Exception as error:  # tokenizers raises nothing more special
            reason = reason or f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    found = [name for name in _PROCESSOR_FILES if (folder / name).is_file()]
    if found:
        raise ValueError(
            f"{folder} has {', '.join(found[:4])}, and no tokenizer or processor loads from there ({reason}). Save it again, "
            "download it again, or take these files away to export without one."
        )
    return None
