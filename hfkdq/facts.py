# SPDX-License-Identifier: Apache-2.0
"""What was done to a model, written once into `model.config.hfkdq`, where it survives saving and loading.

What is read is held against the types below first, as a checkpoint may come from anybody.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Annotated, Any, TypedDict, TypeVar

from transformers import PretrainedConfig, PreTrainedModel

from .schema import Count, FreeText, Name, check, check_depth

_MOST_TEXT = 2**27
_Recorder = TypeVar("_Recorder", bound=Callable[..., None])


def _is_base64(value: Any, where: str) -> None:
    if not isinstance(value, str) or len(value) > _MOST_TEXT or not value.isascii():
        raise ValueError(f"{where} is no base64 text")


class PruningSettings(TypedDict, total=False):
    """What a card tells of `PruningSpec.to_dict`."""

    structure: FreeText
    criterion: FreeText | None
    pattern: FreeText | None
    cut: FreeText


class QuantizationSettings(TypedDict, total=False):
    """What a card tells of `QuantizationSpec.to_dict`."""

    weight_bits: int
    activation_bits: int | None
    group_size: int | None
    embedding_bits: int | None
    head_bits: int | None
    overrides: dict[FreeText, Any] | None
    exclude_modules: FreeText | list[FreeText] | None


class Student(TypedDict, total=False):
    """Which layers of a teacher a student has; those of decoders apart."""

    teacher_layers: Count
    layers: list[Count]
    teacher_decoder_layers: Count
    decoder_layers: list[Count]


class Distillation(TypedDict, total=False):
    """What a student was trained with."""

    objectives: list[dict[FreeText, Any]]
    steps: Count
    teacher: FreeText


class Pruning(TypedDict, total=False):
    """A pruning: `spec` as `PruningSpec.to_dict` has it."""

    spec: PruningSettings
    achieved_sparsity: float
    parameters_before: Count
    parameters_after: Count
    earlier: list[Pruning]


class UnfinishedPruning(TypedDict, total=False):
    """How far a pruning is that goes on."""

    structure: str
    sparsity: float


class Range(TypedDict):
    """Scale and zero point of an activation."""

    scale: float
    zero_point: Count


class Values(TypedDict):
    """Numbers in float32, little-endian, in base64."""

    shape: list[Count]
    float32: Annotated[Any, _is_base64]


class Quantization(TypedDict, total=False):
    """A quantization: `spec` as `QuantizationSpec.to_dict` has it, with names for patterns; what quantizers know.

    `unobserved` names the activations that have no range as no data has reached them.
    """

    spec: QuantizationSettings
    ranges: dict[Name, Range]
    unobserved: list[Name]
    weights: dict[Name, dict[str, Values]]
    weight_bits: dict[Name, Count]
    enabled: bool


class Shapes(TypedDict):
    """Shapes of tensors, and integers that modules keep, that the configuration does not describe."""

    tensors: dict[Name, list[Count]]
    counts: dict[Name, dict[str, Count]]


class Sharing(TypedDict, total=False):
    """Groups of layers that share their weights."""

    layers: list[list[Count]]


class Facts(TypedDict, total=False):
    """All topics; others are kept as they are."""

    student: Student
    distillation: Distillation
    pruning: Pruning
    unfinished_pruning: UnfinishedPruning
    quantization: Quantization
    shapes: Shapes
    sharing: Sharing


def read_facts(model_or_config: PreTrainedModel | PretrainedConfig) -> dict[str, Any]:
    """A copy of all recorded facts, by topic (`"student"`, `"distillation"`, `"pruning"`, `"quantization"`, ...).

    Raises:
        ValueError: what stands there is damaged; it says where.
    """
    config = getattr(model_or_config, "config", model_or_config)
    facts = getattr(config, "hfkdq", None)
    if facts is None:
        return {}
    try:
        check(facts, dict[str, Any], "hfkdq")
        check_depth(facts)
        facts = copy.deepcopy(facts)
        check(facts, Facts, "hfkdq")
    except ValueError as error:
        raise ValueError(
            f"What the configuration ({type(config).__name__}) records of compression is damaged: {error}. Save the model "
            "anew where it was made; without the section hfkdq in config.json its weights load as they are."
        ) from error
    return facts  # type: ignore[no-any-return]


def record_fact(model: PreTrainedModel, topic: str, fact: dict[str, Any]) -> None:
    """Writes JSON-ready `fact` under `topic` into the model's configuration, in place of what stood there."""
    read_facts(model)  # refuses what is damaged
    model.config.hfkdq = {**getattr(model.config, "hfkdq", {}), topic: fact}


def drop_fact(model: PreTrainedModel, topic: str) -> None:
    """Takes a topic out again, and the record with it if nothing else is in it."""
    facts = read_facts(model)
    if facts.pop(topic, None) is not None:
        model.config.hfkdq = facts
        if not facts:
            del model.config.hfkdq


_REFRESHERS: list[Callable[[Any], None]] = []


def refreshes_facts(record: _Recorder) -> _Recorder:
    """Decorates a function that records a topic of a model again; it does nothing for models without that topic."""
    _REFRESHERS.append(record)
    return record


def refresh_facts(model: PreTrainedModel) -> None:
    """Records anew what depends on the shapes of a model, after pruning has changed them."""
    for record in _REFRESHERS:
        record(model)
