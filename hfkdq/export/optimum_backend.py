# SPDX-License-Identifier: Apache-2.0
"""Writes ONNX files with Optimum: traced from torch, or dynamically quantized.

Knows Optimum and the file; what to export, where to, and whether it came out right is decided elsewhere.
"""

from __future__ import annotations

import logging
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from optimum.exporters.onnx import onnx_export_from_model
from optimum.exporters.tasks import TasksManager
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from .runner import SingleFile

__all__ = [
    "OPSET",
    "PACKAGES",
    "dummy_batches",
    "finish",
    "open_files",
    "resolve_task",
    "trace",
]

# The first opset with everything the exported models need as single operators; Optimum's own default.
OPSET = 18
PACKAGES = ("transformers", "torch", "optimum-onnx", "onnx", "onnxruntime")


def resolve_task(model: PreTrainedModel, task: str | None) -> str:
    """The name that Optimum gives to what `model` does.

    Args:
        model (`PreTrainedModel`): the model.
        task (`str`, *optional*): the answer, in any spelling that Optimum knows; read off the model's class by default.

    Raises:
        ValueError: Optimum cannot export such a model, or not for this task, or not as a single file.
    """
    model_type = model.config.model_type
    try:
        supported = TasksManager.get_supported_tasks_for_model_type(model_type, "onnx", library_name="transformers")
    except KeyError as error:
        raise ValueError(f"Optimum has no ONNX export for the architecture {model_type!r}.") from error
    try:
        task = TasksManager.map_from_synonym(task) if task else TasksManager.infer_task_from_model(model)
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"Optimum cannot tell the task of {type(model).__name__}. Pass one as task=: {', '.join(supported)}."
        ) from error
    single = [name for name in supported if not name.endswith("-with-past")]
    if task not in single:
        raise ValueError(
            f"Optimum cannot export {model_type!r} for the task {task!r} as one file. It can for: {', '.join(single)}."
        )
    if model.config.is_encoder_decoder and task != "object-detection":  # the decoder of DETR runs once, in one file
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder, which Optimum splits into several files. "
            "This release exports models that fit in one: encoders, and decoders without a cache."
        )
    return task


def dummy_batches(model: PreTrainedModel, task: str) -> list[dict[str, Tensor]]:
    """Random inputs of two sizes that `model` accepts, the same at every call; texts are padded on the right."""
    with _quiet_and_seeded():
        constructor = TasksManager.get_exporter_config_constructor(
            "onnx", model=model, task=task, library_name="transformers"
        )
        config = constructor(model.config)
        length = _sequence_length(model)
        sizes = ({"batch_size": 8, "sequence_length": length}, {"batch_size": 3, "sequence_length": length // 2})
        return [config.generate_dummy_inputs(framework="pt", **size) for size in sizes]


def trace(model: PreTrainedModel, folder: Path, task: str, *, fold_constants: bool) -> list[Path]:
    """Writes `model` as `folder/model.onnx`.

    Args:
        model (`PreTrainedModel`): a float32 model on the CPU. Optimum changes its configuration.
        folder (`Path`): an existing folder.
        task (`str`): as `resolve_task` gave it.
        fold_constants (`bool`): whether what depends on weights alone is computed now; it would undo integer weights.

    Returns:
        `Path`: the file.
    """
    # Optimum looks for tokenizers where the model came from, which may be a Hub id; here it finds none.
    model.config._name_or_path = str(folder)
    with _quiet_and_seeded():
        onnx_export_from_model(
            model,
            folder,
            task=task,
            opset=OPSET,
            do_validation=False,
            do_constant_folding=fold_constants,
            sequence_length=_sequence_length(model),
        )
    return [folder / "model.onnx"]


def finish(folder: Path, config: PretrainedConfig, task: str) -> None:
    """Completes the folder after its files were rewritten."""


def open_files(folder: Path, task: str) -> SingleFile:
    """Runs the files as the model they came from."""
    return SingleFile(folder / "model.onnx")


def _sequence_length(model: PreTrainedModel) -> int:
    """A length that fits into the position table, with room for models that start counting at an offset."""
    positions = getattr(model.config, "max_position_embeddings", None)
    return min(16, positions // 2) if isinstance(positions, int) else 16


@contextmanager
def _quiet_and_seeded() -> Iterator[None]:
    """Hides the tracer's and Optimum's notes, fixes the random numbers they draw, and puts both back."""
    disabled, python_state, numpy_state = logging.root.manager.disable, random.getstate(), np.random.get_state()
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        try:
            yield
        finally:
            logging.disable(disabled)
            random.setstate(python_state)
            np.random.set_state(numpy_state)
