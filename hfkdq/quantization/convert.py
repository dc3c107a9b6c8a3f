# SPDX-License-Identifier: Apache-2.0
"""Putting fake quantizers into a model, reading and setting their ranges, and taking them out again.

Knows models and specs; neither trainers nor files.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..facts import read_facts, record_fact
from ..specs import QuantizationSpec
from .fake_quant import ActivationQuantizer, QuantizedEmbedding, QuantizedLinear, make_activation_quantizer

logger = logging.get_logger(__name__)

FACT = "quantization"
QuantizedModule = QuantizedLinear | QuantizedEmbedding


def quantized_modules(model: nn.Module) -> dict[str, QuantizedModule]:
    """The modules of `model` that carry fake quantizers, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (QuantizedLinear, QuantizedEmbedding))
    }


def quantized_spec(model: nn.Module) -> QuantizationSpec | None:
    """The spec that `model` was prepared with, `None` for a model without fake quantizers."""
    return next((module.quantization_spec for module in quantized_modules(model).values()), None)


def prepare_qat_(model: PreTrainedModel, spec: QuantizationSpec) -> PreTrainedModel:
    """Puts fake quantizers into `model`, in place.

    The chosen `nn.Linear` and `nn.Embedding` modules change their class to [`QuantizedLinear`] and
    [`QuantizedEmbedding`]; parameters and state dict keys stay what they were. Subclasses with a forward pass of
    their own and linear layers that share their weight with an embedding stay in floating point. What was done is
    recorded in `model.config.hfkdq`.

    Args:
        model (`PreTrainedModel`): the model to change.
        spec (`QuantizationSpec`): which modules, and how.

    Returns:
        `PreTrainedModel`: the same model. One that was prepared with an equal spec is left as it is.

    Raises:
        TypeError: `spec` is no [`QuantizationSpec`].
        ValueError: the model was prepared with another spec, the spec matches no module, or a module that it matches
            already holds integers or runs through the hook of a device map.

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
    present = quantized_spec(model)
    if present is not None and present != spec:
        raise ValueError(
            f"{type(model).__name__} already carries the fake quantizers of {present}, not of {spec}. "
            "Use the same spec, or remove them first with strip_quantizers_(model)."
        )
    if present is None:
        for module in _choose(model, spec).values():
            _swap(module, spec)
        record_ranges(model)
    return model


def _choose(model: PreTrainedModel, spec: QuantizationSpec) -> dict[str, nn.Linear | nn.Embedding]:
    """The modules to quantize, by name; everything that can be wrong with them is found here."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    chosen: dict[str, nn.Linear | nn.Embedding] = {}
    skipped: dict[str, str] = {}
    for name, module in model.named_modules():
        if not (spec.selects(name, module) and isinstance(module, (nn.Linear, nn.Embedding))):
            continue
        _check_convertible(name, module)
        if type(module) not in (nn.Linear, nn.Embedding):
            skipped[name] = f"{type(module).__name__} has a forward pass of its own"
        elif isinstance(module, nn.Linear) and id(module.weight) in tables:
            skipped[name] = "its weight is also the table of an embedding"
        else:
            chosen[name] = module
    for name, reason in skipped.items():
        logger.info(f"{name} stays in floating point: {reason}.")
    if not chosen:
        raise ValueError(_no_match(model, spec, skipped))
    return chosen


def _check_convertible(name: str, module: nn.Linear | nn.Embedding) -> None:
    if not module.weight.is_floating_point():
        raise ValueError(
            f"{name} ({type(module).__name__}) holds {module.weight.dtype} weights: it is quantized already, by "
            "bitsandbytes for example. Load the model in floating point, or exclude the module in the spec."
        )
    if "forward" in vars(module):
        raise ValueError(
            f"The forward pass of {name} is replaced by a hook, as device_map does it, and would bypass the fake "
            "quantizer. Load the model without device_map and move it with model.to(device)."
        )


def _no_match(model: PreTrainedModel, spec: QuantizationSpec, skipped: dict[str, str]) -> str:
    message = (
        f"The spec matches no module of {type(model).__name__} that can be quantized: "
        f"target_modules={spec.target_modules!r}, exclude_modules={spec.exclude_modules!r}. "
    )
    if skipped:
        return message + "Skipped were " + "; ".join(f"{name}: {reason}" for name, reason in skipped.items()) + "."
    names = [name for name, module in model.named_modules() if type(module) in (nn.Linear, nn.Embedding)]
    return message + (
        "A list holds names or their last parts, a string is a regular expression for the whole name. "
        f"The model has {len(names)} linear layers and embeddings, for example: {', '.join(names[:4]) or 'none'}."
    )


def _swap(module: nn.Linear | nn.Embedding, spec: QuantizationSpec) -> None:
    if isinstance(module, nn.Linear):
        module.register_module("activation_quantizer", make_activation_quantizer(spec, module.weight.device))
        module.__class__ = QuantizedLinear
    else:
        module.__class__ = QuantizedEmbedding
    cast(QuantizedModule, module).quantization_spec = spec
    module.train(module.training)


def strip_quantizers_(model: PreTrainedModel) -> PreTrainedModel:
    """Undoes [`prepare_qat_`], in place: a floating-point model with the weights as they are, and no record.

    Args:
        model (`PreTrainedModel`): a model with or without fake quantizers.

    Returns:
        `PreTrainedModel`: the same model.
    """
    for module in quantized_modules(model).values():
        del module.quantization_spec
        if isinstance(module, QuantizedLinear):
            del module.activation_quantizer
            module.__class__ = nn.Linear  # type: ignore[assignment]
        else:
            module.__class__ = nn.Embedding  # type: ignore[assignment]
    facts = read_facts(model)
    if facts.pop(FACT, None) is not None:
        model.config.hfkdq = facts
        if not facts:
            del model.config.hfkdq
    return model


def activation_quantizers(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """The activation quantizers of `model`, by the name of the linear layer whose input they quantize."""
    return {
        name: module.activation_quantizer
        for name, module in quantized_modules(model).items()
        if isinstance(module, QuantizedLinear) and module.activation_quantizer is not None
    }


def activation_ranges(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Scale and zero point of every quantized input that has seen data.

    Args:
        model (`nn.Module`): a model with fake quantizers.

    Returns:
        `dict`: `{module name: {"scale": float, "zero_point": int}}`.

    Raises:
        RuntimeError: a range is not finite, because an activation was not.
    """
    seen = {name: q.qparams() for name, q in activation_quantizers(model).items() if q.initialized}
    # One transfer for all of them, because this runs after every step.
    values = (
        torch.stack([torch.stack([scale, zero.float()]) for scale, zero in seen.values()]).tolist() if seen else []
    )
    ranges = {
        name: {"scale": scale, "zero_point": int(zero)} for name, (scale, zero) in zip(seen, values, strict=True)
    }
    broken = [name for name, entry in ranges.items() if not math.isfinite(entry["scale"])]
    if broken:
        raise RuntimeError(
            f"The activations that enter {broken[0]} were not finite (in {len(broken)} of {len(ranges)} modules), so "
            "there is no range to quantize them with. Look for a learning rate that is too high or bad input."
        )
    return ranges


def set_activation_ranges_(model: PreTrainedModel, ranges: dict[str, dict[str, Any]]) -> PreTrainedModel:
    """Gives the fake quantizers of `model` the ranges that [`activation_ranges`] reported, in place.

    Args:
        model (`PreTrainedModel`): a model with fake quantizers.
        ranges (`dict`): `{module name: {"scale": float, "zero_point": int}}`; other modules keep theirs.

    Returns:
        `PreTrainedModel`: the same model.

    Raises:
        ValueError: a name without a quantized input, or a range that is no range.
    """
    quantizers = activation_quantizers(model)
    unknown = sorted(set(ranges) - set(quantizers))
    if unknown:
        raise ValueError(
            f"{type(model).__name__} has no quantized input at {', '.join(unknown[:4])} ({len(unknown)} in all). "
            "The ranges belong to another model or another spec."
        )
    for name, entry in ranges.items():
        if not (entry["scale"] > 0 and 0 <= entry["zero_point"] <= 255):
            raise ValueError(
                f"Not a range for {name}: {entry}. The scale must be positive, the zero point in 0 to 255."
            )
    for name, entry in ranges.items():
        quantizers[name].set_range(entry["scale"], entry["zero_point"])
    record_ranges(model)
    return model


def record_ranges(model: PreTrainedModel) -> None:
    """Writes the spec and the present ranges of `model` into `model.config.hfkdq`."""
    spec = quantized_spec(model)
    if spec is not None:
        record_fact(model, FACT, {"spec": spec.to_dict(), "ranges": activation_ranges(model)})


def recorded_quantization(
    model_or_config: PreTrainedModel | PretrainedConfig,
) -> tuple[QuantizationSpec, dict[str, Any]] | None:
    """The spec and the ranges that [`record_ranges`] wrote, `None` if there is no such record."""
    fact = read_facts(model_or_config).get(FACT)
    return None if fact is None else (QuantizationSpec.from_dict(fact["spec"]), fact["ranges"])


def quantizer_states(model: nn.Module) -> dict[str, dict[str, float]]:
    """What every quantized input that has seen data needs to continue exactly, JSON-ready, by module name."""
    seen = {name: quantizer for name, quantizer in activation_quantizers(model).items() if quantizer.initialized}
    tensors = [tensor.float() for quantizer in seen.values() for tensor in quantizer.state_tensors()]
    values = iter(torch.stack(tensors).tolist() if tensors else [])  # one transfer from the device for all
    return {name: {key: next(values) for key in quantizer.state_names} for name, quantizer in seen.items()}


def load_quantizer_states_(model: nn.Module, states: dict[str, dict[str, float]]) -> None:
    """Lets the fake quantizers of `model` continue where [`quantizer_states`] was taken; those not in it start anew."""
    for name, quantizer in activation_quantizers(model).items():
        quantizer.initialized = name in states
        if quantizer.initialized:
            quantizer.load_state(states[name])
