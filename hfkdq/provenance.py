# SPDX-License-Identifier: Apache-2.0
"""What ties a report to its files and to its model: sizes and hashes, class, labels and shapes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .files import sha256_of

ONNX_FOLDER = "onnx"
"""Where repositories on the Hub have their ONNX files."""
RUN = (".onnx", ".xml")
"""The ends of the files that are run, by ONNX Runtime and by OpenVINO."""
_PATTERNS = ("*.onnx*", "openvino_*.xml", "openvino_*.bin", "*.safetensors", f"{ONNX_FOLDER}/*.onnx*")


def weight_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The ONNX files, their external data, OpenVINO's files and the safetensors files of `folder`: in itself and in its folder `onnx`,
    unless that has a checkpoint of its own."""
    found = {path for pattern in _PATTERNS for path in Path(folder).glob(pattern) if path.is_file()}
    if Path(folder, ONNX_FOLDER, "config.json").exists():
        found = {path for path in found if path.parent == Path(folder)}
    return sorted(path for path in found if not path.name.startswith("."))


def describe_files(folder: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file with weights in `folder`, by its path there."""
    files = {path.relative_to(folder).as_posix(): path for path in weight_files(folder)}
    return {name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for name, path in files.items()}


def find_difference(folder: str | os.PathLike[str], recorded: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The first way in which the files with weights in `folder` are not those that [`describe_files`] `recorded`, in words
    such as `"model.onnx has changed"`; `None` if they are the same."""
    here = {path.relative_to(folder).as_posix(): path for path in weight_files(folder)}
    for name, facts in sorted(recorded.items()):
        if name not in here:
            return f"{name} is missing"
        size = here[name].stat().st_size
        if size != facts["bytes"]:
            return f"{name} has changed: it has {size} bytes, recorded are {facts['bytes']}"
        if sha256_of(here[name]) != facts["sha256"]:
            return f"{name} has changed: its SHA-256 is not the one recorded"
    extra = sorted(set(here) - set(recorded))
    return f"{extra[0]} is not one of the files that were recorded" if extra else None


def describe_model(model: PreTrainedModel) -> dict[str, Any]:
    """Class, family, labels, number of parameters, and a SHA-256 of their names and shapes, as a checkpoint has them."""
    shapes = _shapes(model)
    text = json.dumps(sorted((name, list(parameter.shape)) for name, parameter in shapes.items()))
    labels = getattr(model.config, "id2label", None) or {}
    return {
        "architecture": type(model).__name__,
        "model_type": str(getattr(model.config, "model_type", "")),
        "id2label": {str(number): str(label) for number, label in labels.items()},
        "parameters": sum(parameter.numel() for parameter in shapes.values()),
        "shapes": hashlib.sha256(text.encode()).hexdigest(),
    }


def _shapes(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Parameters by their names in a checkpoint, without those of adapters and of fake quantizers."""
    saved = model.state_dict().keys()
    plain = {n: p for n, p in model.named_parameters() if n in saved and ".lora_" not in n}
    return {name.replace(".base_layer.", "."): parameter for name, parameter in plain.items()}
