# SPDX-License-Identifier: Apache-2.0
"""Holds reports against the files and the model that they are about."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging

from ..export.record import EXPORT_AGAIN, export_file, read_export
from ..facts import Facts
from ..measuring.latency import Latency
from ..provenance import describe_model, find_difference, weight_files
from ..schema import build, check, read_file
from .data import Engine, ReportData, Sample, kind_of, named_precisions, row_name
from .environment import publishable

logger = logging.get_logger(__name__)

_DIFFERENCES = {
    "architecture": "is of the class",
    "model_type": "is of the family",
    "id2label": "has the labels",
    "parameters": "has so many parameters:",
    "shapes": "has parameters of the names and shapes with the hash",
}


def check_measured(folder: Path, student: PreTrainedModel) -> dict[str, Any]:
    """The record of the export into `folder`, if its files are still those and `student` is the model."""
    facts, path = read_export(folder), export_file(folder)
    if "files" not in facts or "model" not in facts:
        raise ValueError(
            f"{path} does not say which files and which model it is about; a version of hfkdq before that wrote it. "
            f"{EXPORT_AGAIN} to measure it."
        )
    _refuse_changes(folder, facts, "was exported")
    own = describe_model(student)
    for name, words in _DIFFERENCES.items():
        if own[name] != facts["model"][name]:
            raise ValueError(
                f"{folder} was exported from another model than the student: it {words} {facts['model'][name]}, the "
                f"student's is {own[name]}. Pass the model that was exported, or export the student."
            )
    return facts


def check_export(folder: Path) -> None:
    """Refuses a folder whose files are not those that its export recorded; one that records none is let be."""
    path = export_file(folder)
    if "engines" in read_file(path):
        return  # a report of a measurement that was saved under the former name
    facts = read_export(folder)
    if "files" not in facts:
        logger.warning(f"{path} does not say which files it is about, so that was not checked.")
        return
    _refuse_changes(folder, facts, f"its {path.name} is about")


def _refuse_changes(folder: Path, facts: Mapping[str, Any], what: str) -> None:
    if (difference := find_difference(folder, facts["files"])) is not None:
        raise ValueError(f"{folder} does not hold what {what}: {difference}. {EXPORT_AGAIN}, or undo the change.")


def last_file(report: ReportData) -> Engine | None:
    """The row that the card is about: the last one of a file."""
    return next((engine for engine in reversed(report.engines) if engine.kind != "torch"), None)


def check_engine(report: ReportData, folder: Path) -> None:
    """Refuses a folder that does not hold the files of the report's last row of a file (`ValueError`)."""
    engine = last_file(report)
    if engine is None:
        return
    if not engine.files:
        logger.warning(f"The report does not say which files {engine.name!r} is, so {folder} was not checked for it.")
        return
    places = [folder] if weight_files(folder) else [path for path in sorted(folder.iterdir()) if path.is_dir()]
    differences = [find_difference(place, engine.files) for place in places]
    if None not in differences:
        told = differences[0] if differences else "there are no such files"
        raise ValueError(
            f"{folder} is not what the report measured as {engine.name!r}: {told}. Measure the folder again with "
            "CompressionReport.measure, or name the one that was measured."
        )


def check_beside(report: ReportData, path: Path) -> str:
    """As [`check_engine`], for the folder that a report lies in or beside, if it has files of the names recorded. Where those are,
    seen from the report."""
    engine = last_file(report)
    if engine is None or not engine.files:
        return "."
    folder = path.absolute().parent
    names = [name for name in engine.files if not name.endswith(".safetensors")]
    places = [folder, *sorted(below for below in folder.iterdir() if below.is_dir())]
    places = [place for place in places if any((place / name).is_file() for name in names)]
    differences = [find_difference(place, engine.files) for place in places]
    if differences and None not in differences:
        raise ValueError(
            f"{path} is about other files than those beside it: in {places[0]}, {differences[0]}. Measure again, or "
            "name the folder that was measured."
        )
    return places[differences.index(None)].relative_to(folder).as_posix() if places else "."


def public_parity(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The record of an export without private values and without what a report has elsewhere."""
    others = (
        "metrics", "latency", "choice", "batches", "by_output", "incremental_decode", "step_by_step", "files", "model",
        "precisions",
        "processor", "sample",
    )  # fmt: skip
    return dict(publishable({name: value for name, value in facts.items() if name not in others}))


def public_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of a model without private values and without the numbers of its quantizers."""
    public = dict(facts)
    if isinstance(public.get("quantization"), dict):
        numbers = ("ranges", "weights", "weight_bits")
        public["quantization"] = {name: value for name, value in public["quantization"].items() if name not in numbers}
    return dict(publishable(public))


def fields_of_export(folder: Path) -> dict[str, Any]:
    """The fields of a report that the record of the export into `folder` and its configuration have."""
    facts, path = read_export(folder), export_file(folder)
    missing = sorted({"kind", "bytes", "files", "model", "task"} - facts.keys())
    if missing:
        raise ValueError(
            f"{path} is no record of an export that a card can be made of: it lacks {', '.join(missing)}. {EXPORT_AGAIN}, or "
            "name the report.json that CompressionReport.save wrote."
        )
    config = folder / "config.json"
    recorded = read_file(config).get("hfkdq", {}) if config.is_file() else {}
    check(recorded, Facts, f"hfkdq in {config}")
    size = sum(entry["bytes"] for name, entry in facts["files"].items() if name.endswith(".safetensors"))
    student = Engine(
        name="student", kind="torch", metrics=facts.get("metrics", {}).get("torch", {}), size=size,
        parameters=facts["model"]["parameters"],
    )  # fmt: skip
    files = [_file_row(name, own) for name, own in named_precisions(row_name(facts), facts)]
    latency = facts.get("latency", {})
    return {
        "engines": (*([student] if size else []), *files),
        "architecture": facts["model"]["architecture"],
        "samples": facts.get("metrics", {}).get("examples", 0),
        "task": facts["task"].removesuffix("-with-past"),
        "facts": public_facts(recorded),
        "timing": {key: latency[key] for key in ("device", "threads", "rounds", "inputs") if _is_timed(latency)},
        "environment": dict(facts.get("versions", {})),
        "processor": facts.get("processor"),
        "sample": Sample(**facts["sample"]) if "sample" in facts else None,
    }


def _file_row(name: str, facts: Mapping[str, Any]) -> Engine:
    latency = facts.get("latency", {})
    return Engine(
        name=name, kind=kind_of(facts), metrics=facts.get("metrics", {}).get("onnx", {}), size=facts["bytes"],
        latency=build(Latency, latency["onnx"], "latency.onnx") if _is_timed(latency) else None,
        parity=public_parity(facts), files=facts["files"],
    )  # fmt: skip


def _is_timed(latency: Mapping[str, Any]) -> bool:
    return {"threads", "rounds", "inputs", "onnx"} <= latency.keys()
