# SPDX-License-Identifier: Apache-2.0
"""Holds reports against the files and the model that they are about."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel
from transformers.utils import logging

from ..provenance import describe_model, find_difference, weight_files
from ..schema import check, read_file
from .schema import Export

if TYPE_CHECKING:
    from .compression import CompressionReport, Engine

logger = logging.get_logger(__name__)

EXPORT_REPORT = "report.json"
_AGAIN = "Export the model again with export_onnx"
_DIFFERENCES = {
    "architecture": "is of the class",
    "model_type": "is of the family",
    "id2label": "has the labels",
    "parameters": "has so many parameters:",
    "shapes": "has parameters of the names and shapes with the hash",
}


def read_export(folder: Path) -> dict[str, Any]:
    """What the export into `folder` recorded.

    Raises:
        ValueError: its `report.json` is damaged; one line names it.
    """
    path = folder / EXPORT_REPORT
    facts = read_file(path)
    try:
        check(facts, Export, "it")
    except ValueError as error:
        raise ValueError(f"{path} is not what export_onnx writes: {error}. {_AGAIN}.") from None
    return facts


def check_measured(folder: Path, student: PreTrainedModel) -> dict[str, Any]:
    """What the export into `folder` recorded, if its files are still those and `student` is the model.

    Raises:
        ValueError: they are not, or nothing of the kind was recorded.
    """
    facts, path = read_export(folder), folder / EXPORT_REPORT
    if "files" not in facts or "model" not in facts:
        raise ValueError(
            f"{path} does not say which files and which model it is about; a version of hfkdq before that wrote it. "
            f"{_AGAIN} to measure it."
        )
    difference = find_difference(folder, facts["files"])
    if difference is not None:
        raise ValueError(f"{folder} does not hold what was exported: {difference}. {_AGAIN}, or undo the change.")
    own = describe_model(student)
    for name, words in _DIFFERENCES.items():
        if own[name] != facts["model"][name]:
            raise ValueError(
                f"{folder} was exported from another model than the student: it {words} {facts['model'][name]}, the "
                f"student's is {own[name]}. Pass the model that was exported, or export the student."
            )
    return facts


def check_export(folder: Path) -> None:
    """Refuses a folder whose files are not those that its `report.json` records; one that records none is let be."""
    facts = read_file(folder / EXPORT_REPORT)
    if "engines" in facts:
        return  # a report of a measurement that was saved under this name
    facts = read_export(folder)
    if "files" not in facts:
        logger.warning(f"{folder / EXPORT_REPORT} does not say which files it is about, so that was not checked.")
        return
    difference = find_difference(folder, facts["files"])
    if difference is not None:
        raise ValueError(
            f"{folder} does not hold what its {EXPORT_REPORT} is about: {difference}. {_AGAIN}, or undo the change."
        )


def last_file(report: CompressionReport) -> Engine | None:
    """The row that the card is about: the last one of an ONNX file."""
    return next((engine for engine in reversed(report.engines) if engine.kind == "onnx"), None)


def check_engine(report: CompressionReport, folder: Path) -> None:
    """Refuses a folder that does not hold the files of the report's last ONNX row.

    Raises:
        ValueError: it does not.
    """
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


def check_beside(report: CompressionReport, path: Path) -> None:
    """As [`check_engine`], for the folder that a report lies in or beside, if it has files of the names recorded.

    Raises:
        ValueError: there are such files, and none are those of the report.
    """
    engine = last_file(report)
    if engine is None or not engine.files:
        return
    folder = path.absolute().parent
    places = [folder, *sorted(below for below in folder.iterdir() if below.is_dir())]
    places = [place for place in places if set(engine.files) & {file.name for file in place.glob("*.onnx*")}]
    differences = [find_difference(place, engine.files) for place in places]
    if differences and None not in differences:
        raise ValueError(
            f"{path} is about other files than those beside it: in {places[0]}, {differences[0]}. Measure again, or "
            "name the folder that was measured."
        )
