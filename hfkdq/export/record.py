# SPDX-License-Identifier: Apache-2.0
"""`export_facts.json`: the record that an export leaves beside its files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypedDict

from ..facts import QuantizationSettings
from ..provenance import ONNX_FOLDER
from ..schema import Count, FreeText, check, read_file
from .choices import HUB, OPENVINO, POOLINGS

EXPORT_FACTS = "export_facts.json"
MANIFEST = "export.json"
"""With which `transformers.exporters` loads a folder."""
# Of earlier releases; reports of measurements have this name too.
FORMER_NAME = "report.json"
MADE_UP = "made-up inputs"
"""What files were compared on where there were no data."""
EXPORT_AGAIN = "Export the model again with export_onnx"


class FileFacts(TypedDict):
    """Size and hash of a file."""

    bytes: Count
    sha256: str


class ModelFacts(TypedDict):
    """The identity of a model."""

    architecture: str
    model_type: str
    id2label: dict[FreeText, FreeText]
    parameters: int
    shapes: str


class Milliseconds(TypedDict, total=False):
    """The latency of a file."""

    median_ms: float
    min_ms: float
    calls: int


class Timing(TypedDict, total=False):
    """The settings of a latency measurement."""

    device: FreeText
    threads: int
    rounds: int
    inputs: dict[FreeText, list[int]]


class ExportLatency(Timing, total=False):
    """The timing of the files."""

    onnx: Milliseconds


class ExportMetrics(TypedDict, total=False):
    """The metrics of the model and of its files."""

    examples: int
    torch: dict[FreeText, float]
    onnx: dict[FreeText, float]


def _is_suffix(value: str, where: str) -> None:
    if not re.fullmatch(r"(_\w{1,50})?", value):
        raise ValueError(f"{where} is no end of the names of files")


def _are_poolings(value: list[str], where: str) -> None:
    if not value or not set(value) <= POOLINGS.keys():
        raise ValueError(f"{where} is {value!r:.60}, expected one or several of {', '.join(POOLINGS)}")


class PoolingFacts(TypedDict):
    """How a file makes embeddings."""

    modes: Annotated[list[FreeText], _are_poolings]
    normalize: bool


class SampleFacts(TypedDict):
    """What the call of the card printed."""

    runner: FreeText
    printed: FreeText


class ChoiceFacts(TypedDict, total=False):
    """What a file that keeps the best of many does not compute with integers for its sake."""

    left_in_float: list[FreeText]


class Export(TypedDict, total=False):
    """The fields of `export_facts.json` that are read."""

    kind: FreeText
    bytes: Count
    task: FreeText
    target: FreeText
    opset: int
    samples: int
    max_abs_diff: float | None
    mean_abs_diff: float | None
    max_abs_logit: float | None
    top1_agreement: float | None
    tolerance: float | None
    compared_on: FreeText
    pooling: PoolingFacts
    layout: FreeText
    suffix: Annotated[str, _is_suffix]
    quantized_linears: int
    fused_linears: int
    top_k: ChoiceFacts
    fixed_axes: dict[FreeText, int]
    weight_type: FreeText
    spec: QuantizationSettings | None
    precisions: dict[FreeText, Export]
    files: dict[str, FileFacts]
    model: ModelFacts
    metrics: ExportMetrics
    latency: ExportLatency
    processor: FreeText
    sample: SampleFacts
    versions: dict[FreeText, FreeText]


def export_file(folder: Path) -> Path:
    """The file in `folder` with what its export recorded, which may not be there; of an earlier release if there is one."""
    former = folder / FORMER_NAME
    return former if former.is_file() and not (folder / EXPORT_FACTS).is_file() else folder / EXPORT_FACTS


def read_export(folder: Path) -> dict[str, Any]:
    """The record of the export into `folder`; `ValueError`, in one line that names the file, if it is damaged."""
    path = export_file(folder)
    facts = read_file(path)
    try:
        check(facts, Export, "it")
    except ValueError as error:
        raise ValueError(f"{path} is not what export_onnx writes: {error}. {EXPORT_AGAIN}.") from None
    return facts


def each_precision(facts: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The record of each precision in a folder; that which the whole record is about comes last."""
    common = {name: facts[name] for name in ("files", "model", "versions", "layout") if name in facts}
    others = [own for own in facts.get("precisions", {}).values() if own.get("suffix") != facts.get("suffix")]
    return [*({**common, **own} for own in others), facts]


def runtime_of(path: Path) -> str:
    """The kind of a file: `"openvino"` or `"onnx"`."""
    return OPENVINO if path.suffix == ".xml" else "onnx"


def place_of(folder: Path, facts: Mapping[str, Any]) -> tuple[Path, str]:
    """Where the files lie that a record is about first of all, and what their names end in."""
    return (folder / ONNX_FOLDER, facts.get("suffix", "")) if facts.get("layout") == HUB else (folder, "")
