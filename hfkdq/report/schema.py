# SPDX-License-Identifier: Apache-2.0
"""The types of what a report holds and of what an export records, as far as they are compared and rendered.

Knows names of fields; how values are held against them is known below.
"""

from __future__ import annotations

from typing import Any, TypedDict

from ..schema import FreeText


class PruningSettings(TypedDict, total=False):
    """The settings of a pruning that a card tells."""

    structure: FreeText
    criterion: FreeText | None
    pattern: FreeText | None
    cut: FreeText


class QuantizationSettings(TypedDict, total=False):
    """The settings of a quantization that a card tells."""

    weight_bits: int
    activation_bits: int | None
    group_size: int | None
    embedding_bits: int | None
    head_bits: int | None
    overrides: dict[FreeText, Any] | None
    exclude_modules: FreeText | list[FreeText] | None


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


class Pruning(TypedDict, total=False):
    """What a card tells of a pruning."""

    spec: PruningSettings
    achieved_sparsity: float
    parameters_before: int
    parameters_after: int
    earlier: list[Pruning]


class Distillation(TypedDict, total=False):
    """What a card tells of a distillation."""

    teacher: FreeText
    objectives: list[dict[FreeText, Any]]
    steps: int


class Student(TypedDict, total=False):
    """What a card tells of copied layers."""

    teacher_layers: int
    layers: list[int]


class Quantization(TypedDict, total=False):
    """What a card tells of a quantization."""

    spec: QuantizationSettings


class Facts(TypedDict, total=False):
    """The facts that a card is made from; others are kept as they are."""

    student: Student
    distillation: Distillation
    pruning: Pruning
    quantization: Quantization


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
