# SPDX-License-Identifier: Apache-2.0
"""Measures a report: metrics through the Trainer, files by their bytes, latency in processes of their own."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from transformers import (
    EvalPrediction,
    FeatureExtractionMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import logging

from ..export.embeddings import pooled_copy
from ..export.graph import multiplies_exactly
from ..export.layout import place_of
from ..export.record import export_file, read_export
from ..export.runner import open_files
from ..export.runtime import onnx_call
from ..facts import read_facts
from ..measuring.evaluation import Evaluation
from ..measuring.latency import TimedEngine, check_counts, time_engines, total_latency
from ..measuring.torch_engine import torch_call
from ..metrics.tasks import metrics_for
from ..modeling.own_modules import as_pretrained_
from ..modeling.tasks import task_of
from ..provenance import weight_files
from .data import Engine, row_name
from .environment import describe_environment
from .files import check_measured, public_facts, public_parity

logger = logging.get_logger(__name__)

_PROCESSORS = {
    PreTrainedTokenizerBase: "AutoTokenizer",
    BaseImageProcessor: "AutoImageProcessor",
    ProcessorMixin: "AutoProcessor",
    FeatureExtractionMixin: "AutoFeatureExtractor",
}


def measure(
    models: Mapping[str, PreTrainedModel],
    onnx: str | Path | Mapping[str, str | Path],
    eval_dataset: Any,
    compute_metrics: Callable[[EvalPrediction], Mapping[str, Any]] | None,
    processing_class: Any,
    data_collator: Any,
    batch_size: int,
    latency_rounds: int,
    threads: int | None,
    preprocess_logits: Callable[[Any, Any], Any] | None = None,
    concat_batches: bool = True,
) -> dict[str, Any]:
    """The measured fields of a report; `models` has the student last. `CompressionReport.measure` describes the rest."""
    threads = torch.get_num_threads() if threads is None else threads
    check_counts(batch_size=(batch_size, 1), latency_rounds=(latency_rounds, 0), threads=(threads, 1))
    _check_models(models)
    student = models["student"]
    if compute_metrics is None:
        compute_metrics = metrics_for(student, processing_class, eval_dataset)
    folders = _onnx_folders(onnx, models)
    exported = {name: check_measured(folder, student) for name, folder in folders.items()}
    pooling = next((facts["pooling"] for facts in exported.values() if "pooling" in facts), None)
    with tempfile.TemporaryDirectory() as temporary:
        evaluation = Evaluation(
            eval_dataset, compute_metrics, processing_class, data_collator, batch_size, f"{temporary}/trainer",
            preprocess_logits, concat_batches,
        )  # fmt: skip
        engines, timed = [], []
        bar = logging.tqdm([*models, *folders], desc="Quality")
        for name in bar:
            bar.set_postfix_str(name)
            if name in models:
                how = evaluation if name == "student" else evaluation.of_teacher(student)
                row = _measure_torch(name, models[name], how, Path(temporary, f"torch-{name}"), pooling)
            else:
                row = _measure_onnx(name, student, folders[name], exported[name], evaluation)
            engines.append(row[0])
            timed.append(row[1])
        if latency_rounds:
            times = iter(
                time_engines([call for calls in timed for call in calls], threads=threads, rounds=latency_rounds)
            )
            latencies = [total_latency([(next(times), 1) for _ in calls]) if calls else None for calls in timed]
            engines = [replace(engine, latency=value) for engine, value in zip(engines, latencies, strict=True)]
        example = evaluation.first_example(student)
    inputs = {name: list(array.shape) for name, array in example.items()}
    timing = {"device": "cpu", "threads": threads, "rounds": latency_rounds, "inputs": inputs}
    return {
        "engines": tuple(engines),
        "architecture": type(student).__name__,
        "samples": len(eval_dataset),
        "task": _task(student),
        "processor": next((auto for cls, auto in _PROCESSORS.items() if isinstance(processing_class, cls)), None),
        "facts": public_facts(read_facts(student)),
        "timing": timing if latency_rounds else {},
        "environment": describe_environment(),
    }


def _measure_torch(
    name: str, model: PreTrainedModel, evaluation: Evaluation, folder: Path, pooling: Any
) -> tuple[Engine, list[TimedEngine]]:
    metrics = evaluation.metrics(name, pooled_copy(model, pooling))
    model.save_pretrained(folder)
    # Learned ranges of fake quantizers are parameters in memory, but not of the checkpoint.
    saved = model.state_dict().keys()
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    total = sum(weight.numel() for weight in weights)
    engine = Engine(
        name=name,
        kind="torch",
        metrics=metrics,
        size=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        parameters=sum(value.numel() for key, value in model.named_parameters() if key in saved),
        sparsity=sum(int((weight == 0).sum()) for weight in weights) / total if total else None,
    )
    if getattr(transformers, type(model).__name__, None) is not type(model):
        logger.warning(f"The {name} is not timed: its class, {type(model).__name__}, is not known to another process.")
        return engine, []
    example = evaluation.first_example(model)
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):  # the first token, as the files are timed on
        example.setdefault("decoder_input_ids", np.zeros((1, 1), np.int64))
    return engine, [TimedEngine(name, torch_call, folder, example)]


def _measure_onnx(
    name: str, student: PreTrainedModel, folder: Path, facts: dict[str, Any], evaluation: Evaluation
) -> tuple[Engine, list[TimedEngine]]:
    place, suffix = place_of(folder, facts)
    files = open_files(place, facts.get("task", ""), suffix)
    if facts.get("weight_type") == "int8" and not multiplies_exactly():
        logger.warning(
            f"{folder} has int8 weights, and ONNX Runtime's product of uint8 and int8 saturates on this processor: what is measured "
            "is worse than on one with VNNI. Export with weight_type='uint8' for this one."
        )
    engine = Engine(
        name=name,
        kind="onnx",
        metrics=evaluation.metrics(name, student, files),
        # Of several precisions in one folder the record says which is meant.
        size=facts["bytes"] if place != folder else sum(part.stat().st_size for part in folder.glob("*.onnx*")),
        parity=public_parity(facts),
        files=facts["files"],
    )
    # Of a model that generates it is the prompt that is timed, as in torch; next tokens are in the record of the export.
    calls = [call for call in files.calls(evaluation.first_example(student)) if call.part != "next token"]
    labels = [name if len(calls) == 1 else f"{name}, {call.part}" for call in calls]
    return engine, [
        TimedEngine(label, onnx_call, call.path, call.inputs) for label, call in zip(labels, calls, strict=True)
    ]


def _check_models(models: Mapping[str, Any]) -> None:
    for name, model in models.items():
        if not isinstance(as_pretrained_(model), PreTrainedModel):
            raise TypeError(f"The {name} must be a PreTrainedModel in memory, got {type(model).__name__}.")
        if getattr(model, "is_quantized", False):
            raise ValueError(
                f"The {name} was loaded with integer weights (quantization_config), which the Trainer does not evaluate. "
                "Load it in floating point to measure it."
            )
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise RuntimeError(
            f"This is one of {distributed.get_world_size()} distributed processes, whose timings would disturb one "
            "another. Measure the saved model in a process of its own."
        )


def _onnx_folders(onnx: str | Path | Mapping[str, str | Path], taken: Mapping[str, Any]) -> dict[str, Path]:
    named = {str(name): Path(path) for name, path in onnx.items()} if isinstance(onnx, Mapping) else {"": Path(onnx)}
    for name, folder in named.items():
        files = any(path.suffix == ".onnx" for path in weight_files(folder))
        wanted = {"model.onnx": files, export_file(folder).name: export_file(folder).is_file()}
        missing = [what for what, is_there in wanted.items() if not is_there]
        if missing:
            raise ValueError(f"{str(folder)!r} has no {' and no '.join(missing)}. `export_onnx` writes such folders.")
        if name in taken:
            raise ValueError(f"An ONNX row cannot be called {name!r}; that is the row of a model in memory.")
    if not named:
        raise ValueError("onnx names no folder. Pass one that `export_onnx` wrote, or a mapping of names to folders.")
    if list(named) == [""]:
        return {row_name(read_export(named[""])): named[""]}
    return named


def _task(model: PreTrainedModel) -> str | None:
    """The tag of the pipeline that runs such a model."""
    task = task_of(type(model).__name__)
    return task.name if task is not None and task.auto is not None else None


def hub_id(model: PreTrainedModel) -> str | None:
    """The Hub id in the model's configuration, unless what stands there is or was a local folder."""
    config = model.config
    name = str(getattr(config, "_name_or_path", ""))
    looks_like_one = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) and "/checkpoint-" not in name
    # What was read from a file has a version, and a commit if the file came from the Hub.
    is_local = config.transformers_version is not None and not getattr(config, "_commit_hash", None)
    return name if looks_like_one and not is_local and not Path(name).exists() else None
