# SPDX-License-Identifier: Apache-2.0
"""The types of what a report holds and of what an export records, as far as they are compared and rendered."""

from __future__ import annotations

from typing import TypedDict

from ..schema import FreeText


class FileFacts(TypedDict):
    """Size and hash of a file."""

    bytes: int
    sha256: str


class ModelFacts(TypedDict):
    """What tells one model from another."""

    architecture: str
    model_type: str
    id2label: dict[FreeText, FreeText]
    parameters: int
    shapes: str


class Timing(TypedDict, total=False):
    """How latency was measured."""

    device: FreeText
    threads: int
    rounds: int
    inputs: dict[FreeText, list[int]]


class Export(TypedDict, total=False):
    """What an export records of its files."""

    kind: FreeText
    task: FreeText
    opset: int
    samples: int
    max_abs_diff: float | None
    mean_abs_diff: float | None
    max_abs_logit: float | None
    top1_agreement: float | None
    tolerance: float | None
    quantized_linears: int
    fused_linears: int
    weight_type: FreeText
    files: dict[str, FileFacts]
    model: ModelFacts
