# SPDX-License-Identifier: Apache-2.0
"""Writes ONNX files with `transformers.exporters`, Transformers 5's own, under the names that Optimum gives."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.exporters.base import EXPORT_MANIFEST_FILE, EXPORT_SCHEMA_VERSION

from .exporters_generation import Part, generation_parts, part_axes
from .exporters_tasks import dummy_batches, output_names, resolve_task
from .exporters_tracing import METADATA, OPSET, trace_file
from .protocol import PAST
from .runner import SINGLE

__all__ = ["OPSET", "PACKAGES", "dummy_batches", "finish", "resolve_task", "trace"]

PACKAGES: tuple[str, ...] = ("transformers", "torch", "onnx", "onnxscript", "onnxruntime")
_TEXT = {0: "batch_size", 1: "sequence_length"}
_CHOICES = {0: "batch_size", 1: "num_choices", 2: "sequence_length"}


def trace(model: PreTrainedModel, folder: Path, task: str, *, fold_constants: bool) -> list[Path]:
    """Writes `model` as ONNX files, see [`Backend`]. Its attention becomes the eager one.

    `RuntimeError` if the tracer fixed an axis that has to vary.
    """
    model.set_attn_implementation("eager")
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    batch = dummy_batches(model, task)[0]
    files = []
    for part in _parts(model, batch, task):
        axes = partial(_axes, task=task, any_size=_takes_any_size(model, task))
        if _generates(model, task):
            axes = partial(part_axes, part=part.name)
        path = folder / f"{part.name}.onnx"
        files.append(trace_file(part, path, axes=axes, fold_constants=fold_constants))
    return files


def _generates(model: PreTrainedModel, task: str) -> bool:
    """Whether the files are parts of a model that generates, and not the model as it is called."""
    text = task.removesuffix(PAST) in ("text2text-generation", "automatic-speech-recognition")
    return task.endswith(PAST) or (text and model.config.is_encoder_decoder)


def _parts(model: PreTrainedModel, batch: dict[str, Tensor], task: str) -> list[Part]:
    """The parts to trace, a file each."""
    if _generates(model, task):
        return generation_parts(model, batch, task)
    call, fields = model.forward, output_names(task)

    def forward(**inputs: Tensor) -> Any:
        result = call(**inputs)
        return type(result)(**{name: result[name] for name in fields if result.get(name) is not None})

    return [Part(SINGLE, model, forward, batch)]


def _axes(name: str, task: str, any_size: bool) -> Mapping[int, str]:
    """The axes that vary of an input or output."""
    if name == "pixel_values" and any_size:
        return {0: "batch_size", 2: "height", 3: "width"}
    if name == "decoder_input_ids":
        return {0: "batch_size", 1: "decoder_sequence_length"}
    if name in ("input_ids", "attention_mask", "token_type_ids", "position_ids", "input_values"):
        return _CHOICES if task == "multiple-choice" else _TEXT
    return {0: "batch_size", 1: "num_choices"} if task == "multiple-choice" else {0: "batch_size"}


def _takes_any_size(model: PreTrainedModel, task: str) -> bool:
    """Whether images may have any height and width: convolutions do not mind, tables of positions do."""
    return task == "object-detection" or not any("Attention" in type(module).__name__ for module in model.modules())


def finish(folder: Path, config: PretrainedConfig, task: str) -> None:
    """Writes the manifest with which `transformers.exporters.ExportedModel.from_pretrained` loads the folder."""
    components = {}
    for path in sorted(folder.glob("*.onnx")):
        metadata = json.loads(ir.load(path).metadata_props[METADATA])
        components[path.stem] = {"file": path.name, "metadata": metadata}
        path.with_name(f"{path.name}.data").touch()  # which has to be there; weights of less than 2 GB are in the file
    manifest = {"schema_version": EXPORT_SCHEMA_VERSION, "export_format": "onnx", "components": components}
    (folder / EXPORT_MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n")
