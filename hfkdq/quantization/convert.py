# SPDX-License-Identifier: Apache-2.0
"""Putting fake quantizers into a model, and taking them out again."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..facts import drop_fact, unmark_quantized
from ..modeling.own_modules import as_pretrained_
from ..specs import QuantizationScheme, QuantizationSpec, override_matches, unmatched
from ..specs.quantization import is_quantizable
from . import adapters
from .attention import computes_attention, find_attention, swap_attention_in_, swap_attention_out_
from .layers import quantized_class, share_tables_, swap_in_, swap_out_, weight_of
from .naming import head_modules, means_the_same, named_spec, quantized_modules, tell_left_in_float
from .quantized_module import QuantizedModule
from .records import FACT, activation_quantizers, quantized_spec, record_ranges, weight_quantizers

logger = logging.get_logger(__name__)


def prepare_qat_(model: PreTrainedModel, spec: QuantizationSpec) -> PreTrainedModel:
    """Puts fake quantizers into `model`, in place.

    The chosen modules change their class, `nn.Linear` to [`QuantizedLinear`] and so on; parameters and state dict keys
    stay what they were. A table and the head that shares it have one quantizer; of modules that hold all experts of a
    layer the weights are quantized. Subclasses with a forward pass of their own stay in floating point, but for embeddings
    that scale rows or shift indices; a warning says so where it is more than 5 % of the parameters. A weight that weight
    norm computes is quantized as it comes out. What was done is recorded in `model.config.hfkdq`.

    With LoRA adapters of PEFT it is the merged weight that is quantized, so that [`merge_adapters`] changes nothing
    afterwards; modules have the names of the model without adapters. Layers of its base that bitsandbytes has quantized
    stay as they are.

    Args:
        model (`PreTrainedModel` or `PeftModel`): the model to change.
        spec (`QuantizationSpec`): which modules, and how.

    Returns:
        `PreTrainedModel`: the same model. One that was prepared with an equal spec is left as it is.

    Raises:
        TypeError: `spec` is no [`QuantizationSpec`].
        ValueError: the model was prepared with another spec, the spec or one of its patterns matches no module, a group
            size does not divide, a module already holds integers or runs through the hook of a device map, or has an
            adapter that cannot be merged, such as one with dropout. The model is left as it was.

    Example:
        ```python
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from hfkdq import QuantizationSpec
        >>> from hfkdq.quantization import prepare_qat_, quantized_modules
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
        >>> model = prepare_qat_(BertForSequenceClassification(config), QuantizationSpec(target_modules=["query"]))
        >>> list(quantized_modules(model))
        ['bert.encoder.layer.0.attention.self.query']

        ```
    """
    if not isinstance(spec, QuantizationSpec):
        raise TypeError(f"spec must be a QuantizationSpec, got {type(spec).__name__}.")
    adapters.check_adapters(as_pretrained_(model))
    present = quantized_spec(model)
    if present is not None and not means_the_same(model, spec):
        raise ValueError(
            f"{type(model).__name__} already carries the fake quantizers of {present}, not of {spec}. "
            "Use the same spec, or remove them first with strip_quantizers_(model)."
        )
    if present is None:
        chosen = choose_modules(model, spec)
        attention = find_attention(model, spec) if spec.attention else {}
        try:
            adapters.attach_lora_(model, {id(module) for module, _ in chosen.values()})
            for name, (module, scheme) in chosen.items():
                swap_in_(module, name, scheme, spec)
            share_tables_(quantized_modules(model).values())
            for module in attention.values():
                swap_attention_in_(module, spec)
        except BaseException:
            strip_quantizers_(model)
            raise
        record_ranges(model)
        tell_left_in_float(model, spec)
    elif adapters.has_adapters(model):  # they may have come after the fake quantizers, and PEFT freezes what it finds
        adapters.attach_lora_(model, {id(module) for module in quantized_modules(model).values()})
        for quantizer in (*activation_quantizers(model).values(), *weight_quantizers(model).values()):
            quantizer.requires_grad_(True)
    return model


def choose_modules(model: PreTrainedModel, spec: QuantizationSpec) -> dict[str, tuple[nn.Module, QuantizationScheme]]:
    """The modules to quantize and how, by name; refuses all that cannot be quantized before anything is changed."""
    heads = head_modules(model)
    chosen: dict[str, tuple[nn.Module, QuantizationScheme]] = {}
    skipped: dict[str, str] = {}
    adapted = adapters.has_adapters(model)
    for name, module, wrapper in adapters.wrapped_modules(model):
        if not spec.selects(name, module):
            continue
        scheme = spec.scheme(name, module, is_head=id(module) in heads)
        if scheme is None:
            continue
        weight = weight_of(module)
        if not isinstance(weight, Tensor):
            continue
        if adapted and not weight.is_floating_point():
            skipped[name] = f"it holds {weight.dtype} weights already"
            continue
        _check_convertible(name, module, weight)
        if quantized_class(module) is None:
            skipped[name] = f"{type(module).__name__} has a forward pass of its own"
        else:
            adapters.check_adapter(name, wrapper)
            chosen[name] = (module, scheme)
    for name, reason in skipped.items():
        logger.info(f"{name} stays in floating point: {reason}.")
    if not chosen:
        names = [name for name, module in adapters.plain_modules(model) if quantized_class(module)]
        told = (
            "A list holds names or their last parts, a string is a regular expression for the whole name. "
            f"The model has {len(names)} modules that can be, for example: {', '.join(names[:4]) or 'none'}."
        )
        if skipped:
            told = f"Skipped were {'; '.join(f'{name}: {reason}' for name, reason in skipped.items())}."
        raise ValueError(
            f"The spec matches no module of {type(model).__name__} that can be quantized: "
            f"target_modules={spec.target_modules!r}, exclude_modules={spec.exclude_modules!r}. {told}"
        )
    _check_patterns(model, spec)
    return chosen


def _check_patterns(model: PreTrainedModel, spec: QuantizationSpec) -> None:
    """Refuses a single pattern that means no module, as a misspelt one does."""
    modules = [(name, module) for name, module in adapters.plain_modules(model) if quantized_class(module)]
    targets = spec.target_modules if isinstance(spec.target_modules, tuple) else ()
    lost = [f"target_modules: {p!r}" for p in unmatched(targets, [name for name, _ in modules])]
    attends = computes_attention if spec.attention else lambda module: False
    names = [name for name, module in adapters.plain_modules(model) if is_quantizable(module) or attends(module)]
    lost += [f"exclude_modules: {p!r}" for p in unmatched(spec.exclude_modules, names)]
    lost += [f"overrides: {p!r}" for p in spec.overrides if not any(override_matches(p, *entry) for entry in modules)]
    if lost:
        raise ValueError(
            f"Nothing in {type(model).__name__} that can be quantized matches {'; '.join(lost)}. In a list a "
            f"pattern is a name or its last parts, and a string by itself is a regular expression for the whole name; overrides take "
            f"both, and the name of a class. Names are, for example: "
            f"{', '.join(name for name, _ in modules[:4])}."
        )


def _check_convertible(name: str, module: nn.Module, weight: Tensor) -> None:
    if not weight.is_floating_point():
        raise ValueError(
            f"{name} ({type(module).__name__}) holds {weight.dtype} weights: it is quantized already, by "
            "bitsandbytes for example. Load the model in floating point, or exclude the module in the spec."
        )
    if "forward" in vars(module):
        raise ValueError(
            f"The forward pass of {name} is replaced by a hook, as device_map does it, and would bypass the fake "
            "quantizer. Load the model without device_map and move it with model.to(device)."
        )


def strip_quantizers_(model: PreTrainedModel) -> PreTrainedModel:
    """Undoes [`prepare_qat_`], in place: a floating-point model with the weights as they are, and no record."""
    for module in model.modules():
        if isinstance(module, QuantizedModule):
            swap_out_(module)
    adapters.detach_lora_(model)
    swap_attention_out_(model)
    drop_fact(model, FACT)
    unmark_quantized(model.config)
    return model


def leave_in_float_(model: PreTrainedModel, names: Collection[str]) -> PreTrainedModel:
    """Takes the fake quantizers out of some modules of a prepared model, in place, as if its spec had left them out; one of the
    others has to keep its own."""
    spec, modules = quantized_spec(model), quantized_modules(model)
    if spec is None or not modules.keys() - {*names}:
        raise ValueError(f"{type(model).__name__} would have no fake quantizer left. Export it as 'float32'.")
    for name in names:
        swap_out_(modules[name])
    spec = named_spec(model, replace(spec, exclude_modules=[*names]))
    for module in quantized_modules(model).values():
        module.quantization_spec = spec
    record_ranges(model)
    return model
