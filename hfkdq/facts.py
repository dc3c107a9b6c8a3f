# SPDX-License-Identifier: Apache-2.0
"""The facts of what was done to a model: their types, their record in `model.config.hfkdq`, and their descriptions. A
checkpoint may come from anybody, so a record is checked against the types below when it is read."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypedDict, TypeVar

from transformers import PretrainedConfig, PreTrainedModel

from .protocols import QUANT_METHOD
from .schema import Count, FreeText, Name, check, check_depth
from .specs import PruningSpec, QuantizationSpec
from .specs.base import as_text

NOTABLE = 0.05
"""Share of the parameters in floating point, or not pruned, above which it is told."""
AUXILIARY = "hfkdq_"
"""What the names of modules begin with that a model has while it is trained, and never in its files."""
_Recorder = TypeVar("_Recorder", bound=Callable[..., None])


def _is_base64(value: Any, where: str) -> None:
    if not isinstance(value, str) or len(value) > 2**27 or not value.isascii():
        raise ValueError(f"{where} is no base64 text")


class PruningSettings(TypedDict, total=False):
    """`PruningSpec.to_dict`, as far as its description goes by the type of a value."""

    structure: FreeText
    criterion: FreeText | None
    target_modules: FreeText | list[FreeText] | None
    exclude_modules: FreeText | list[FreeText] | None
    pattern: FreeText | None
    cut: FreeText


class QuantizationSettings(TypedDict, total=False):
    """`QuantizationSpec.to_dict`, as far as its description goes by the type of a value."""

    weight_bits: int
    activation_bits: int | None
    group_size: int | None
    embedding_bits: int | None
    head_bits: int | None
    range_estimator: FreeText
    weight_mapping: FreeText
    activation_mapping: FreeText
    storage_dtype: FreeText
    overrides: dict[FreeText, Any] | None
    exclude_modules: FreeText | list[FreeText] | None


class Student(TypedDict, total=False):
    """The layers of a teacher that a student has; those of decoders apart."""

    teacher_layers: Count
    layers: list[Count]
    teacher_decoder_layers: Count
    decoder_layers: list[Count]


class Distillation(TypedDict, total=False):
    """A training: its objectives, and its teacher if it had one."""

    objectives: list[dict[FreeText, Any]]
    steps: Count
    teacher: FreeText


class Pruning(TypedDict, total=False):
    """A pruning: `spec` as `PruningSpec.to_dict` has it; `left_unpruned` is what it was meant for and did not reach."""

    spec: PruningSettings
    achieved_sparsity: float
    parameters_before: Count
    parameters_after: Count
    left_unpruned: Left
    earlier: list[Pruning]


class UnfinishedPruning(TypedDict, total=False):
    """The progress of a pruning that goes on."""

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


class Left(TypedDict):
    """Share of the parameters in weights that are not quantized, or not pruned, and the largest of their modules."""

    share: float
    modules: list[Name]


class Digest(TypedDict):
    """A hash of all weights, and their precisions."""

    dtype: Name
    blake2b: Name


class Quantization(TypedDict, total=False):
    """A quantization: `spec` as `QuantizationSpec.to_dict` has it, with names for patterns; what quantizers know.
    `unobserved` names the activations that have no range as no data has reached them. Records of earlier releases,
    which left tied heads, scaled embeddings and experts of three axes in floating point, lack `left_in_float`."""

    spec: QuantizationSettings
    ranges: dict[Name, Range]
    unobserved: list[Name]
    left_in_float: Left
    digest: Digest
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


class Clustering(TypedDict, total=False):
    """Layers whose weights take few values: at most how many, in how many layers, and the squared error by the variance."""

    clusters: Count
    modules: Count
    relative_error: float


class Vocabulary(TypedDict, total=False):
    """A vocabulary that was cut to a corpus."""

    tokens_before: Count
    tokens_after: Count
    rows_before: Count
    rows_after: Count
    parameters_before: Count
    parameters_after: Count
    min_count: Count
    max_size: Count


class Facts(TypedDict, total=False):
    """All topics, in the order in which a card tells them; others are kept, and told, as they are."""

    student: Student
    sharing: Sharing
    distillation: Distillation
    vocabulary: Vocabulary
    pruning: Pruning
    unfinished_pruning: UnfinishedPruning
    clustering: Clustering
    quantization: Quantization
    shapes: Shapes


def read_facts(model_or_config: PreTrainedModel | PretrainedConfig) -> dict[str, Any]:
    """A copy of all recorded facts, by topic (`"student"`, `"distillation"`, `"pruning"`, `"quantization"`, ...).
    Raises `ValueError`: what stands there is damaged; it says where."""
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
            f"What the configuration of the model records of compression is damaged: {error}. Save the model "
            "anew where it was made; without the section hfkdq in config.json its weights load as they are."
        ) from error
    return facts


def record_fact(model: PreTrainedModel, topic: str, fact: dict[str, Any]) -> None:
    """Writes JSON-ready `fact` under `topic` into the model's configuration, in place of what stood there."""
    model.config.hfkdq = {**read_facts(model), topic: fact}


def drop_fact(model: PreTrainedModel, topic: str) -> None:
    """Takes a topic out again, and the record with it if nothing else is in it."""
    facts = read_facts(model)
    if facts.pop(topic, None) is not None:
        model.config.hfkdq = facts
        if not facts:
            del model.config.hfkdq


def mark_quantized(config: PretrainedConfig) -> None:
    """Says in a configuration, in the place where Transformers looks, that hfkdq records a quantization in it."""
    config.quantization_config = {"quant_method": QUANT_METHOD}


def unmark_quantized(config: PretrainedConfig) -> None:
    """Takes out what [`mark_quantized`] wrote."""
    if getattr(config, "quantization_config", None) == {"quant_method": QUANT_METHOD}:
        del config.quantization_config


_REFRESHERS: list[Callable[[Any], None]] = []


def three_digits(value: float) -> str:
    """A positive number with three digits, or all of them before the point."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"


def short_count(value: int) -> str:
    """A number of parameters, such as `22.7M`."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{three_digits(value / unit)}{name}"
    return str(value)


def describe_facts(facts: Mapping[str, Any], code: Callable[..., str] = as_text) -> list[str]:
    """A sentence for every recorded step that [`read_facts`] gave, in the order of [`Facts`]; its first word names the
    step: `"Layers: 3 of the teacher's 6 layers, copied from it (numbers 2, 4, 6, counted from 1)."`. A topic or a key that
    no sentence is made for is told as it is recorded. `code` writes values, given side by side, as code; in Markdown for
    example."""
    sentences = []
    for topic in sorted(facts, key=[*_TOPICS, *facts].index):
        types, describe = _TOPICS.get(topic, (None, None))
        for fact in [*facts[topic].get("earlier", ()), facts[topic]] if topic == "pruning" else [facts[topic]]:
            sentence = describe(fact, code) if describe is not None else ""
            if sentence:
                rest = [code(key, "=", _short(fact[key])) for key in fact if key not in types.__annotations__]
                sentences.append("; ".join([sentence, *([", ".join(rest)] if rest else [])]) + ".")
            elif fact or describe is None:
                sentences.append(f"Recorded as {code(topic)}: {code(_short(fact))}.")
    return sentences


def _short(value: Any) -> Any:
    text = str(value)
    return value if len(text) <= 200 else f"{text[:200]}..."


def _describe_student(fact: Mapping[str, Any], code: Callable[..., str]) -> str:
    if not fact.get("layers") or "teacher_layers" not in fact:
        return ""

    names = {"layers": "layers", "decoder_layers": "decoder layers"}
    stacks = [
        (fact[key], fact[f"teacher_{key}"], name)
        for key, name in names.items()
        if {key, f"teacher_{key}"} <= fact.keys()
    ]
    cut = [
        f"{len(layers)} of the teacher's {total} {name}, copied from it (numbers {', '.join(map(str, layers))}, counted from 1)"
        for layers, total, name in stacks
        if len(layers) < total
    ]
    return f"Layers: {'; '.join(cut) or 'all of the teacher, copied from it'}"


def _describe_distillation(fact: Mapping[str, Any], code: Callable[..., str]) -> str:
    objectives = ", ".join(code(*objective_call(objective)) for objective in fact.get("objectives", []))
    if not objectives:
        return ""
    verb = f"Distillation from a {code(fact['teacher'])}" if "teacher" in fact else "Training"
    steps = f", {fact['steps']:,} optimizer steps" if "steps" in fact else ""
    return f"{verb}{steps}: {objectives}"


def objective_call(objective: Mapping[str, Any]) -> list[Any]:
    """The parts of the call that makes an objective, from what its `describe` gave: `["LogitKD", "(", "weight", ...]`."""
    parts = [objective.get("name", "objective"), "("]
    for key, value in objective.items():
        inner = objective_call(value) if isinstance(value, dict) and "name" in value else [value]
        parts += [key, "=", *inner, ", "] if key != "name" else []
    return [*parts[:-1], ")"] if len(parts) > 2 else [*parts, ")"]


def _parameters(fact: Mapping[str, Any]) -> str:
    before, after = fact.get("parameters_before", 0), fact.get("parameters_after", 0)
    return f". Parameters: {short_count(before)} before, {short_count(after)} after" if before > after > 0 else ""


def left_of(found: Mapping[str, int], whole: int) -> dict[str, Any]:
    """The fact [`Left`] of numbers of weights by module, of `whole` parameters: the largest eight modules are named."""
    return {"share": sum(found.values()) / max(1, whole), "modules": sorted(found, key=found.__getitem__)[:-9:-1]}


def told_left(left: Mapping[str, int], modules: Mapping[str, Any]) -> str:
    """The largest four of them, with their classes and numbers, and how many more there are."""
    largest = sorted(left, key=left.__getitem__, reverse=True)
    told = ", ".join(f"{name} ({type(modules[name]).__name__}, {left[name]:,})" for name in largest[:4])
    return f"{told} and {len(largest) - 4} more" if len(largest) > 4 else told


def _describe_left(left: Mapping[str, Any], what: str, code: Callable[..., str]) -> str:
    if left.get("share", 0.0) <= NOTABLE:
        return ""
    most = ", ".join(map(code, left["modules"][:3]))
    return f"; {left['share']:.0%} of the parameters {what}, most of them in {most}"


def _describe_pruning(fact: Mapping[str, Any], code: Callable[..., str]) -> str:
    if "achieved_sparsity" not in fact:
        return ""
    how = PruningSpec.describe(fact.get("spec", {}), code)
    how += _describe_left(fact.get("left_unpruned", {}), "are left as they were", code)
    return f"Pruning: {fact['achieved_sparsity']:.1%} {how}{_parameters(fact)}"


def _describe_vocabulary(fact: Mapping[str, Any], code: Callable[..., str]) -> str:
    if not {"tokens_before", "tokens_after"} <= fact.keys():
        return ""
    text = f"Vocabulary: {fact['tokens_after']:,} of {fact['tokens_before']:,} tokens are left"
    limits = ", ".join(code(key, "=", fact[key]) for key in ("min_count", "max_size") if key in fact)
    return f"{text}{f' ({limits})' if limits else ''}{_parameters(fact)}"


def _describe_sharing(fact: Mapping[str, Any], code: Callable[..., str]) -> str:
    groups = [", ".join(map(str, group)) for group in fact.get("layers", [])]
    return f"Sharing: the layers {' and the layers '.join(groups)} have the same weights" if groups else ""


def _describe_clustering(fact: Mapping[str, Any], code: Callable[..., str]) -> str:
    if not {"clusters", "modules"} <= fact.keys():
        return ""
    error = f"; squared error {fact['relative_error']:.2%} of the variance" if "relative_error" in fact else ""
    return (
        f"Clustering: the weights of {fact['modules']:,} layers take at most {fact['clusters']:,} values each{error}"
    )


def _describe_quantization(fact: Mapping[str, Any], code: Callable[..., str]) -> str:
    spec = fact.get("spec", {})
    if "weight_bits" not in spec:
        return ""
    alone = " of weights alone" if "activation_bits" in spec and spec["activation_bits"] is None else ""
    text = f"Quantization{alone}: {QuantizationSpec.describe(spec, code)}"
    text += _describe_left(fact.get("left_in_float", {}), "stay in floating point", code)
    if fact.get("unobserved"):
        text += f"; {len(fact['unobserved']):,} activations that no data reached have no range"
    if fact.get("weight_bits"):
        text += f"; {len(fact['weight_bits']):,} weights are still wider, as training has not ended"
    return f"{text}; off until training reaches it" if fact.get("enabled") is False else text


def _describe_shapes(fact: Mapping[str, Any], code: Callable[..., str]) -> str:
    count = len(fact["tensors"])
    return f"Shapes: {count:,} tensors have shapes that the configuration cannot say" if count else ""


# The type and the description of each topic.
_TOPICS: dict[str, tuple[Any, Callable[[Mapping[str, Any], Callable[..., str]], str]]] = {
    "student": (Student, _describe_student),
    "sharing": (Sharing, _describe_sharing),
    "distillation": (Distillation, _describe_distillation),
    "vocabulary": (Vocabulary, _describe_vocabulary),
    "pruning": (Pruning, _describe_pruning),
    "unfinished_pruning": (UnfinishedPruning, lambda fact, code: ""),
    "clustering": (Clustering, _describe_clustering),
    "quantization": (Quantization, _describe_quantization),
    "shapes": (Shapes, _describe_shapes),
}


def refreshes_facts(record: _Recorder) -> _Recorder:
    """Decorates a function that records a topic of a model again; it does nothing for models without that topic."""
    _REFRESHERS.append(record)
    return record


def refresh_facts(model: PreTrainedModel) -> None:
    """Records anew what depends on the shapes of a model, after pruning has changed them."""
    for record in _REFRESHERS:
        record(model)
