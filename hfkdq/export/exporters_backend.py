# SPDX-License-Identifier: Apache-2.0
"""Writes ONNX files with `transformers.exporters`, Transformers 5's own, under the names that Optimum gives."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.exporters.base import EXPORT_MANIFEST_FILE, EXPORT_SCHEMA_VERSION

from .choices import WITHOUT_FILE
from .dummies import dummy_batches
from .exporters_generation import Part, generation_parts, part_axes
from .exporters_tasks import resolve_task
from .exporters_tracing import METADATA, OPSET, trace_file
from .inputs import FUTURE, axes_of, file_outputs, generates, takes_any_size, to_trace
from .lowering import lower_recurrent_
from .runner import SINGLE

__all__ = ["MERGES", "OPSET", "PACKAGES", "dummy_batches", "finish", "resolve_task", "trace"]

MERGES = False
PACKAGES: tuple[str, ...] = ("transformers", "torch", "onnx", "onnxscript", "onnxruntime")


def trace(
    model: PreTrainedModel, folder: Path, task: str, batches: Sequence[Mapping[str, Tensor]] | None = None, *,
    fold_constants: bool,
) -> list[Path]:  # fmt: skip
    """Writes `model` as ONNX files, see [`Backend`]. Its attention becomes the eager one.

    `RuntimeError` if the tracer fixed an axis that has to vary.
    """
    lower_recurrent_(model)
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")
    if hasattr(getattr(model, "config", None), "use_cache"):
        model.config.use_cache = False
    samples = [dict(batch) for batch in batches or dummy_batches(model, task)]
    if FUTURE in samples[0]:
        raise RuntimeError(
            f"The decoder of {type(model).__name__} reads {FUTURE}, which the exporter of Transformers 5 takes for labels. The one "
            f"that goes with Transformers 4 may write it. {WITHOUT_FILE}"
        )
    axes = partial(axes_of, batches=samples, task=task, any_size=takes_any_size(model, task))
    files = []
    for part in _parts(model, to_trace(samples), task):
        own = partial(part_axes, part=part.name) if generates(model, task) else axes
        path = folder / f"{part.name}.onnx"
        files.append(trace_file(part, path, axes=own, fold_constants=fold_constants))
    return files


def _parts(model: PreTrainedModel, batch: dict[str, Tensor], task: str) -> list[Part]:
    """The parts to trace, a file each."""
    if generates(model, task):
        return generation_parts(model, batch, task)
    call = model.forward

    def forward(**inputs: Tensor) -> Any:
        result = call(**inputs)
        found = file_outputs(model, result, task)
        return type(result)(**found)  # whose class the file names

    return [Part(SINGLE, model, forward, batch)]


def finish(folder: Path, config: PretrainedConfig, task: str) -> None:
    """Writes the manifest with which `transformers.exporters.ExportedModel.from_pretrained` loads the folder."""
    components = {}
    for path in sorted(folder.glob("*.onnx")):
        metadata = json.loads(ir.load(path).metadata_props[METADATA])
        components[path.stem] = {"file": path.name, "metadata": metadata}
        path.with_name(f"{path.name}.data").touch()  # which has to be there; weights of less than 2 GB are in the file
    manifest = {"schema_version": EXPORT_SCHEMA_VERSION, "export_format": "onnx", "components": components}
    (folder / EXPORT_MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n")
