# SPDX-License-Identifier: Apache-2.0
"""Resolves the patterns of a spec to the names of modules in one model, and tells those left in floating point."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers.utils import logging

from ..facts import AUXILIARY, NOTABLE, left_of, told_left
from ..modeling.forwards import base_of, body_of
from ..schema import Name, brief, check
from ..specs import QuantizationScheme, QuantizationSpec, module_matches, override_matches
from ..specs.quantization import is_quantizable
from .adapters import plain_modules
from .attention import AttentionQuantizer, computes_attention
from .layers import CLASSES, layer_class, quantized_class, weight_of
from .quantized_module import QuantizedModule

_NO_PATTERNS: dict[str, Any] = {"target_modules": None, "exclude_modules": None, "overrides": {}}
_named: WeakKeyDictionary[nn.Module, tuple[Any, QuantizationSpec]] = WeakKeyDictionary()


def head_modules(model: nn.Module) -> set[int]:
    """Identities of the linear layers of the head: outside the pretrained base model, and output embeddings."""
    model = base_of(model)
    inside = {id(module) for module in body_of(model)[1].modules()}
    heads = {id(module) for module in model.modules() if isinstance(module, nn.Linear) and id(module) not in inside}
    try:
        output: Any = model.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        output = None
    return heads | ({id(output)} if output is not None else set())


def spec_of_record(data: dict[str, Any]) -> QuantizationSpec:
    """The spec in a record, whose patterns are names. Raises `ValueError`: it is none, or has a pattern that is no
    name. A regular expression of somebody else may never end."""
    try:
        spec = QuantizationSpec.from_dict(data)
    except (TypeError, ValueError) as error:  # whose message may hold all that stands there
        raise ValueError(f"The recorded spec is none: {brief(error)}") from error
    named = [each for each in (spec.target_modules, spec.exclude_modules) if each is not None]
    patterns = [name for each in named for name in ([each] if isinstance(each, str) else each)] + list(spec.overrides)
    try:
        check(patterns, list[Name], "its patterns")
    except ValueError as error:
        raise ValueError(
            f"The recorded spec does not name modules: {error}. Load the weights with from_pretrained and quantize them "
            "again, or let who made the checkpoint save it with this release."
        ) from error
    return spec


def beyond_former(model: nn.Module) -> list[str]:
    """The modules that can be quantized, or are, and that earlier releases left in floating point."""
    tables = {id(module.weight) for _, module in plain_modules(model) if isinstance(module, nn.Embedding)}

    def is_new(module: nn.Module) -> bool:
        plain = type(module).plain_class if isinstance(module, QuantizedModule) else layer_class(module)
        return plain not in CLASSES or (isinstance(module, nn.Linear) and id(module.weight) in tables)

    return [name for name, module in _eligible(model).items() if is_new(module)]


def spec_of_former(model: nn.Module, spec: QuantizationSpec, record: Mapping[str, Any]) -> QuantizationSpec:
    """The recorded spec of a checkpoint; one of an earlier release leaves out what that release could not quantize."""
    new = [] if "left_in_float" in record else beyond_former(model)
    return replace(spec, exclude_modules=[*(spec.exclude_modules or ()), *new]) if new else spec


def named_spec(model: nn.Module, spec: QuantizationSpec) -> QuantizationSpec:
    """The spec of a prepared model with the names of its modules in place of patterns; itself if it has none. Raises
    `ValueError`: names are parts of one another, so that no list of them means these modules."""
    if spec.target_modules is None and spec.exclude_modules is None and not spec.overrides:
        return spec
    schemes = _schemes(model)
    key = (spec, list(schemes.items()))
    if model in _named and _named[model][0] == key:
        return _named[model][1]
    modules, heads = _eligible(model), head_modules(model)
    targets = None if spec.target_modules is None else list(schemes)
    excluded = [] if targets is not None else [name for name in modules if name not in schemes]
    excluded += _unquantized_attention(model) if spec.attention else []
    overrides: dict[str, Any] = {}
    for _ in range(3):  # what a name means besides itself is named too
        named = replace(spec, target_modules=targets, exclude_modules=excluded or None, overrides=overrides)
        wrong = {name for name, module in modules.items() if _meant(named, name, module, heads) != schemes.get(name)}
        if not wrong:
            _named[model] = (key, named)
            return named
        excluded = [*excluded, *sorted(wrong - schemes.keys())]
        overrides = {**overrides, **{name: _changes(spec, schemes[name]) for name in schemes if name in wrong}}
    raise ValueError(
        f"The modules {', '.join(sorted(wrong)[:4])} of {type(model).__name__} cannot be recorded by name, as their names are "
        "parts of one another. Rename one of them."
    )


def means_the_same(model: nn.Module, spec: QuantizationSpec) -> bool:
    """Whether a prepared model is what `spec` would make of it, whatever words it uses for the modules."""
    schemes = _schemes(model)
    present = next((module.quantization_spec for module in quantized_modules(model).values()), None)
    if present is None or replace(spec, **_NO_PATTERNS) != replace(present, **_NO_PATTERNS):
        return False
    if spec == present:
        return True
    heads = head_modules(model)
    if any(_meant(spec, name, module, heads) != schemes.get(name) for name, module in _eligible(model).items()):
        return False
    attention = {name for name, module in plain_modules(model) if computes_attention(module)}
    left_out = {name for name in attention if module_matches(name, spec.exclude_modules)}
    return not spec.attention or left_out == set(_unquantized_attention(model))


def quantized_modules(model: nn.Module) -> dict[str, QuantizedModule]:
    """The modules of `model` that carry fake quantizers, by name; with PEFT, the name without adapters."""
    return {name: module for name, module in plain_modules(model) if isinstance(module, QuantizedModule)}


def _changes(spec: QuantizationSpec, scheme: QuantizationScheme) -> dict[str, Any]:
    """The override that makes `scheme` of the settings of a spec, and of those of its embeddings and head."""
    settings = asdict(scheme)
    is_one_for_all = spec.embedding_bits is None and spec.head_bits is None and spec.weight_bits == 8
    return {name: value for name, value in settings.items() if not is_one_for_all or value != getattr(spec, name)}


def _meant(spec: QuantizationSpec, name: str, module: nn.Module, heads: set[int]) -> QuantizationScheme | None:
    return spec.scheme(name, module, is_head=id(module) in heads) if spec.selects(name, module) else None


def _eligible(model: nn.Module) -> dict[str, nn.Module]:

    def is_free(module: nn.Module) -> bool:
        weight = weight_of(module)
        return quantized_class(module) is not None and isinstance(weight, Tensor) and weight.is_floating_point()

    modules = {name: module for name, module in plain_modules(model) if is_quantizable(module)}
    return {name: module for name, module in modules.items() if isinstance(module, QuantizedModule) or is_free(module)}


def _schemes(model: nn.Module) -> dict[str, QuantizationScheme]:
    return {name: module.quantization_scheme for name, module in quantized_modules(model).items()}


def _unquantized_attention(model: nn.Module) -> list[str]:
    """The modules of attention without quantizers for their products."""
    attention = {name: module for name, module in plain_modules(model) if computes_attention(module)}
    kinds = {name: module._modules.get("attention_quantizer") for name, module in attention.items()}
    return sorted(name for name, own in kinds.items() if not isinstance(own, AttentionQuantizer))


logger = logging.get_logger(__name__)


def left_in_float(model: nn.Module, chosen: Collection[nn.Module] = ()) -> dict[str, int]:
    """How many weights, parameters with more than one axis, are in floating point, by the name of their module.
    `chosen` are modules that are going to be quantized; those that are count without."""
    quantized = [*quantized_modules(model).values(), *chosen]
    inside = {id(parameter) for module in quantized for parameter in module.parameters()}
    found: dict[str, int] = {}
    for name, module in plain_modules(model):
        if name.startswith(AUXILIARY):
            continue
        own = {} if isinstance(module, QuantizedModule) else dict(module.named_parameters(recurse=False))
        free = [p for p in own.values() if p.dim() > 1 and p.is_floating_point() and id(p) not in inside]
        inside |= set(map(id, free))  # what modules share counts once
        if free:
            found[name] = sum(parameter.numel() for parameter in free)
    return found


def left_out_unasked(model: nn.Module, spec: QuantizationSpec, chosen: Collection[nn.Module] = ()) -> dict[str, int]:
    """`left_in_float` without what the spec itself leaves out by name."""
    if spec.target_modules is not None:
        return {}
    off = [pattern for pattern, changes in spec.overrides.items() if changes is None]
    modules = dict(plain_modules(model))
    left = left_in_float(model, chosen)
    asked = {name for name in left if any(override_matches(each, name, modules[name]) for each in off)}
    return {n: left[n] for n in left if n not in asked and not module_matches(n, spec.exclude_modules)}


def describe_left(model: nn.Module) -> dict[str, Any]:
    """`{"share": of all parameters, "modules": the largest eight by name}`, JSON-ready."""
    return left_of(left_in_float(model), _size(model))


def _size(model: nn.Module) -> int:
    return max(1, sum(p.numel() for name, p in model.named_parameters() if not name.startswith(AUXILIARY)))


def tell_left_in_float(model: nn.Module, spec: QuantizationSpec) -> None:
    """Warns where a spec leaves a notable part of a prepared model in floating point without being asked to."""
    found = left_out_unasked(model, spec)
    share = sum(found.values()) / _size(model)
    if share <= NOTABLE:
        return
    logger.warning_once(  # type: ignore[attr-defined]
        f"{share:.0%} of the parameters of {type(model).__name__} stay in floating point, as hfkdq has no fake quantizers "
        f"for their modules: {told_left(found, dict(plain_modules(model)))}. Name them in "
        "exclude_modules if that is meant."
    )
