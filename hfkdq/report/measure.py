# SPDX-License-Identifier: Apache-2.0
"""Measures a report: metrics through the Trainer, files by their bytes, latency in processes of their own."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from transformers import EvalPrediction, PreTrainedModel
from transformers.utils import logging

from ..bars import progress_bar
from ..export.embeddings import pooled_copy
from ..export.graph import multiplies_exactly, stored_bytes
from ..export.record import export_file, read_export, runtime_of
from ..export.runner import GeneratingFiles, SingleFile, open_recorded
from ..export.runtime import onnx_call
from ..facts import read_facts
from ..measuring.evaluation import Evaluation
from ..measuring.intervals import RESAMPLES, Sampled, change, leaves_of, sample
from ..measuring.latency import TimedEngine, check_counts, time_engines, total_latency
from ..measuring.torch_engine import torch_call
from ..metrics.tasks import metrics_for
from ..modeling.own_modules import as_pretrained_
from ..modeling.tasks import CLASSIFICATION, decodes, is_listed, task_of
from ..provenance import RUN, describe_files, weight_files
from .data import Engine, named_precisions, row_name
from .environment import describe_environment
from .files import check_measured, public_facts, public_parity
from .layers import describe_layers, describe_stored
from .mistakes import ScoredRows, find_mistakes, score_rows
from .sample import loader_of, sample_of

logger = logging.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A model, or a file that runs in its place, and the rows that it is measured on.

    Args:
        name (`str`): name of its row.
        model ([`PreTrainedModel`]): the model; beside a file, the one that says which inputs and labels there are.
        eval_dataset (`datasets.Dataset`): the rows as the model reads them.
        path (`str` or `Path`, *optional*): a folder that `export_onnx` wrote, or any ONNX file or `.xml` of OpenVINO; the model itself is measured
            without one.
        data_collator (`Callable`, *optional*): as for `Trainer`, with the same default.
        processing_class (*optional*): tokenizer or processor, as for `Trainer`.
    """

    name: str
    model: PreTrainedModel
    eval_dataset: Any
    path: str | Path | None = None
    data_collator: Any = None
    processing_class: Any = None


@dataclass(frozen=True)
class _Row:
    """What is measured in a row: a model, or files in its place, with what their export recorded."""

    name: str
    model: PreTrainedModel
    evaluation: Evaluation
    path: Path | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    pooling: Any = None


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
    resamples: int | None = None,
    examples: int = 0,
    raw_rows: Any = None,
) -> dict[str, Any]:
    """The measured fields of a report; `models` has the student last. `CompressionReport.measure` describes the rest."""
    settings = _Settings(latency_rounds, threads, resamples, examples, batch_size)
    _check_models(models)
    student = models["student"]
    if compute_metrics is None:
        compute_metrics = metrics_for(student, processing_class, eval_dataset)
    folders = _onnx_folders(onnx, models)
    shown = [rows for rows in (raw_rows, eval_dataset) if rows is not None]
    exported = {name: check_measured(folder, student) for name, folder in folders.items()}
    pooling = next((facts["pooling"] for facts in exported.values() if "pooling" in facts), None)
    with tempfile.TemporaryDirectory() as temporary:
        evaluation = Evaluation(
            eval_dataset, compute_metrics, processing_class, data_collator, batch_size, f"{temporary}/trainer",
            preprocess_logits, concat_batches,
        )  # fmt: skip
        rows = [
            _Row(name, model, evaluation if name == "student" else evaluation.of_teacher(student), pooling=pooling)
            for name, model in models.items()
        ]
        rows += [
            _Row(each, student, evaluation, folder, facts)
            for name, folder in folders.items()
            for each, facts in named_precisions(name, exported[name])
        ]
        return _measure_rows(rows, student, settings, Path(temporary), shown)


def compare(
    candidates: Sequence[Candidate],
    compute_metrics: Callable[[EvalPrediction], Mapping[str, Any]] | None,
    batch_size: int,
    latency_rounds: int,
    threads: int | None,
    resamples: int | None,
    examples: int,
    raw_rows: Any = None,
) -> dict[str, Any]:
    """The measured fields of a report on candidates of any kind. `CompressionReport.compare` describes the rest."""
    settings = _Settings(latency_rounds, threads, resamples, examples, batch_size)
    names = [candidate.name for candidate in candidates]
    if not names:
        raise ValueError("There is no candidate to measure.")
    for name in names:
        if not name or not name.isprintable():
            raise ValueError(f"A candidate is called {name!r}. A name is a line of text that can be printed.")
        if names.count(name) > 1:
            raise ValueError(f"Two candidates are called {name!r}. Give each a name of its own.")
    _check_models({candidate.name: candidate.model for candidate in candidates})
    _check_one_task(candidates)
    first: list[Any] = []  # what metrics without labels are held against
    with tempfile.TemporaryDirectory() as temporary:
        rows = []
        recorded = [{} if one.path is None else _recorded(Path(one.path), one.model) for one in candidates]
        pooling = next((facts["pooling"] for facts in recorded if "pooling" in facts), None)
        for one, facts in zip(candidates, recorded, strict=True):
            path = None if one.path is None else Path(one.path)
            metrics = compute_metrics or metrics_for(one.model, one.processing_class, one.eval_dataset)
            evaluation = Evaluation(
                one.eval_dataset, metrics, one.processing_class, one.data_collator, batch_size, f"{temporary}/trainer",
                _first_predictions=first,
            )  # fmt: skip
            rows.append(_Row(one.name, one.model, evaluation, path, facts, pooling if path is None else None))
        shown = [given for given in (raw_rows, candidates[0].eval_dataset) if given is not None]
        return _measure_rows(rows, rows[-1].model, settings, Path(temporary), shown)


@dataclass(frozen=True)
class _Settings:
    """How often things are measured."""

    latency_rounds: int
    threads: int | None
    resamples: int | None
    examples: int
    batch_size: int

    def __post_init__(self) -> None:
        threads = torch.get_num_threads() if self.threads is None else self.threads
        object.__setattr__(self, "threads", threads)
        check_counts(
            batch_size=(self.batch_size, 1), latency_rounds=(self.latency_rounds, 0), threads=(threads, 1),
            resamples=(0 if self.resamples is None else self.resamples, 0), examples=(self.examples, 0),
        )  # fmt: skip

    def resamples_of(self, evaluation: Evaluation) -> int:
        """How often a metric is computed for its interval: a function of the user's own, which may keep what it was given, is
        called no more than it must."""
        if self.resamples is not None:
            return self.resamples
        is_ours = type(evaluation.compute_metrics).__module__.startswith("hfkdq.")
        is_ours |= str(getattr(evaluation.compute_metrics, "__module__", "")).startswith("hfkdq.")
        return RESAMPLES if is_ours else 0


def _measure_rows(
    rows: Sequence[_Row], student: PreTrainedModel, settings: _Settings, temporary: Path, shown: Sequence[Any]
) -> dict[str, Any]:
    engines: list[Engine] = []
    timed: list[list[TimedEngine]] = []
    sampled: list[Sampled] = []
    scored: list[ScoredRows] = []
    for row in rows:
        _check_opens(row)
    bar = progress_bar(rows, desc="Quality")
    for number, row in enumerate(bar):
        bar.set_postfix_str(row.name)
        files = None if row.path is None else open_recorded(row.path, row.facts)
        scores, prediction = row.evaluation.run(row.name, pooled_copy(row.model, row.pooling), files)
        _check_numbers(row.name, prediction.predictions)
        if files is None or row.path is None:
            engine, calls = _describe_torch(row, scores.metrics, temporary / f"torch-{number}")
        else:
            engine, calls = _describe_onnx(row, row.path, scores.metrics, files)
        metrics, resamples = row.evaluation.task, settings.resamples_of(row.evaluation)
        sampled.append(sample(metrics, prediction, scores.metrics, resamples, not metrics.concat_batches))
        same_rows = len(row.evaluation.dataset) == len(rows[0].evaluation.dataset)
        changes = change(sampled[0], sampled[-1]) if number and same_rows else {}
        engines.append(replace(engine, intervals=sampled[-1].intervals, changes=changes))
        timed.append(calls)
        # Predictions, which may be large, are not kept.
        if settings.examples and len(rows) > 1:
            scored.append(score_rows(row.name, metrics, prediction, row.model))
    if settings.latency_rounds and settings.threads is not None:
        engines = _with_latencies(engines, timed, settings.threads, settings.latency_rounds)
    last = rows[-1].evaluation
    inputs = {name: list(array.shape) for name, array in last.first_example(student).items()}
    timing = {"device": "cpu", "threads": settings.threads, "rounds": settings.latency_rounds, "inputs": inputs}
    processor, task = last.processing_class, task_of(type(student).__name__)
    return {
        "engines": tuple(engines),
        "architecture": type(student).__name__,
        "samples": len(last.dataset),
        "task": None if task is None or task.auto is None else task.name,
        "processor": loader_of(processor),
        "facts": public_facts(read_facts(student)),
        "timing": timing if settings.latency_rounds else {},
        "environment": describe_environment(),
        "mistakes": find_mistakes(scored, last.task.metric, student, shown, processor, settings.examples),
        "sample": sample_of(rows[-1].path, rows[-1].facts, rows[-1].model, processor, shown),
    }


def _with_latencies(engines: list[Engine], timed: list[list[TimedEngine]], threads: int, rounds: int) -> list[Engine]:
    times = iter(time_engines([call for own in timed for call in own], threads=threads, rounds=rounds))
    latencies = [total_latency([(next(times), 1) for _ in own]) if own else None for own in timed]
    return [replace(engine, latency=value) for engine, value in zip(engines, latencies, strict=True)]


def _check_opens(row: _Row) -> None:
    """Refuses, before anything is measured, files that do not load, and a pooling that the model cannot have."""
    try:
        pooled_copy(row.model, row.pooling)
        if row.path is not None:
            _check_classes(row.path, open_recorded(row.path, row.facts), row.model)
    except (ValueError, RuntimeError) as error:
        raise type(error)(f"{row.name}: {error}") from error


def _check_classes(path: Path, files: SingleFile | GeneratingFiles, model: PreTrainedModel) -> None:
    shape = files.output_shapes.get("logits", []) if isinstance(files, SingleFile) else []
    classes, known = (shape[-1] if shape else None), getattr(model.config, "num_labels", None)
    classifies = is_listed(type(model).__name__, *CLASSIFICATION, "TOKEN_CLASSIFICATION")
    if classifies and isinstance(classes, int) and classes != known:
        raise ValueError(
            f"{path} has logits of {classes} classes, and {type(model).__name__} has {known}: it was made of another model. Measure it "
            "beside its own checkpoint."
        )


def _check_numbers(name: str, predictions: Any) -> None:
    """Refuses predictions that are no numbers: the likeliest of classes is then the first, which looks like a measurement."""
    arrays = [array for array in leaves_of(predictions) if isinstance(array, np.ndarray) and array.dtype.kind == "f"]
    if any(np.isnan(array).any() for array in arrays):
        raise ValueError(
            f"{name} computes outputs that are no numbers (NaN), so nothing can be measured. Its training diverged, or its numbers do "
            "not fit into the precision of the file: look at its weights, or export it in another precision."
        )


def _recorded(path: Path, model: PreTrainedModel) -> dict[str, Any]:
    """What the export of a folder recorded, held against its files and the model; what is known of any other file."""
    if path.is_dir():
        return check_measured(path, model)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file or folder {path}.")
    beside = path.with_suffix(".bin").name if path.suffix == ".xml" else path.name
    files = describe_files(path.parent).items()
    return {"files": {name: facts for name, facts in files if name.startswith((path.name, beside))}}


def _describe_torch(row: _Row, metrics: dict[str, float], folder: Path) -> tuple[Engine, list[TimedEngine]]:
    name, model = row.name, row.model
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
        layers=describe_layers(model),
    )
    if getattr(transformers, type(model).__name__, None) is not type(model):
        logger.warning(f"The {name} is not timed: its class, {type(model).__name__}, is not known to another process.")
        return engine, []
    example = row.evaluation.first_example(model)
    if decodes(model):  # the first token, as the files are timed on
        example.setdefault("decoder_input_ids", np.zeros((1, 1), np.int64))
    return engine, [TimedEngine(name, torch_call, folder, example)]


def _describe_onnx(
    row: _Row, path: Path, metrics: dict[str, float], files: SingleFile | GeneratingFiles
) -> tuple[Engine, list[TimedEngine]]:
    if row.facts.get("weight_type") == "int8" and not multiplies_exactly():
        logger.warning(
            f"{path} has int8 weights, and ONNX Runtime's product of uint8 and int8 saturates on this processor: what is measured "
            "is worse than on one with VNNI. Export with weight_type='uint8' for this one."
        )
    engine = Engine(
        name=row.name, kind=runtime_of(files.paths[0]), metrics=metrics, size=stored_bytes(files.paths),
        parity=public_parity(row.facts) if "kind" in row.facts else None, files=row.facts["files"],
        layers=describe_stored(files.paths, row.model),
    )  # fmt: skip
    # Of a model that generates it is the prompt that is timed, as in torch; next tokens are in the record of the export.
    calls = [call for call in files.calls(row.evaluation.first_example(row.model)) if call.part != "next token"]
    labels = ((row.name if len(calls) == 1 else f"{row.name}, {call.part}", call) for call in calls)
    return engine, [TimedEngine(label, onnx_call, call.path, call.inputs) for label, call in labels]


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


def _check_one_task(candidates: Sequence[Candidate]) -> None:
    """Refuses models of different tasks, whose metrics say nothing of one another."""
    tasks = [(one.name, task.name) for one in candidates if (task := task_of(type(one.model).__name__)) is not None]
    other = next((pair for pair in tasks if pair[1] != tasks[0][1]), None)
    if other is not None:
        raise ValueError(
            f"{tasks[0][0]} is for {tasks[0][1]}, and {other[0]} for {other[1]}: their metrics are not those of one task. Measure them in "
            "a report for each task."
        )


def _onnx_folders(onnx: str | Path | Mapping[str, str | Path], taken: Mapping[str, Any]) -> dict[str, Path]:
    named = {str(name): Path(path) for name, path in onnx.items()} if isinstance(onnx, Mapping) else {"": Path(onnx)}
    for name, folder in named.items():
        files = any(path.suffix in RUN for path in weight_files(folder))
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


def hub_id(model: PreTrainedModel) -> str | None:
    """The Hub id in the model's configuration, unless what stands there is or was a local folder."""
    config = model.config
    name = str(getattr(config, "_name_or_path", ""))
    looks_like_one = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) and "/checkpoint-" not in name
    # What was read from a file has a version, and a commit if the file came from the Hub.
    is_local = config.transformers_version is not None and not getattr(config, "_commit_hash", None)
    return name if looks_like_one and not is_local and not Path(name).exists() else None
