# SPDX-License-Identifier: Apache-2.0
"""Ranges, learned scales and codebooks of a model, and their record in its configuration."""

from __future__ import annotations

import base64
import copy
import hashlib
import math
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..facts import mark_quantized, read_facts, record_fact, refreshes_facts
from ..protocols import FakeQuantized
from ..schema import brief
from ..specs import QuantizationSpec
from .activations import ActivationQuantizer
from .attention import attention_quantizers
from .layers import SmoothedModule, weight_quantizers_of
from .naming import beyond_former, describe_left, named_spec, quantized_modules, spec_of_record
from .quantized_module import QuantizedModule
from .weights import WeightQuantizer

logger = logging.get_logger(__name__)
FACT = "quantization"
_AGAIN = "Save the model anew where it was made; without the section hfkdq in config.json its weights load as they are, to be quantized again."


def quantized_spec(model: nn.Module) -> QuantizationSpec | None:
    """The spec that `model` was prepared with, `None` for a model without fake quantizers."""
    return next((module.quantization_spec for module in quantized_modules(model).values()), None)


def activation_quantizers(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """The activation quantizers of `model`.

    By the name of the module whose input they quantize; those of attention are named `module:query`, `module:key`,
    `module:probabilities` and `module:value`.
    """
    inputs = {name: module.activation_quantizer for name, module in quantized_modules(model).items()}
    found = {name: quantizer for name, quantizer in inputs.items() if quantizer is not None}
    return {**found, **attention_quantizers(model)}


def weight_quantizers(model: nn.Module) -> dict[str, WeightQuantizer]:
    """The weight quantizers of `model`, by the name of the parameter that they quantize."""
    layers = {name: weight_quantizers_of(module) for name, module in quantized_modules(model).items()}
    return {f"{name}.{key}": quantizer for name, own in layers.items() for key, (quantizer, _) in own.items()}


def activation_ranges(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Ranges of all quantized inputs that have seen data: `{module name: {"scale": float, "zero_point": int}}`.

    Raises:
        RuntimeError: a range is not finite, because an activation was not.
    """
    seen = {name: q.qparams() for name, q in activation_quantizers(model).items() if q.initialized}
    values = _numbers([value for pair in seen.values() for value in pair])
    ranges = {name: {"scale": next(values), "zero_point": int(next(values))} for name in seen}
    broken = [name for name, entry in ranges.items() if not math.isfinite(entry["scale"])]
    if broken:
        raise RuntimeError(
            f"The activations that enter {broken[0]} were not finite (in {len(broken)} of {len(ranges)} modules), so "
            "there is no range to quantize them with. Look for a learning rate that is too high or bad input."
        )
    return ranges


def _numbers(scalars: list[Tensor]) -> Iterator[float]:
    """Tensors without axes as numbers, in one transfer from the device."""
    return iter(torch.stack([scalar.float() for scalar in scalars]).tolist() if scalars else [])


def set_activation_ranges_(model: PreTrainedModel, ranges: dict[str, dict[str, Any]]) -> PreTrainedModel:
    """Sets ranges of fake quantizers, as [`activation_ranges`] gives them, in place; other modules keep theirs.

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
        largest = quantizers[name].maximum_code
        if not (0 < entry["scale"] < math.inf and 0 <= entry["zero_point"] <= largest):
            raise ValueError(f"Not a range for {name}: {entry}. The scale is above 0, the zero point 0 to {largest}.")
    for name, entry in ranges.items():
        quantizers[name].set_range(entry["scale"], entry["zero_point"])
    record_ranges(model)
    return model


def weight_states(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Learned scales, codebooks and smoothing factors, JSON-ready.

    `{parameter name: {kind: {"shape": list, "float32": base64 of the little-endian values}}}`, where `kind` is `"scale"`,
    `"codebook"` or `"smoothing"`.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, module in quantized_modules(model).items():
        tensors = {f"{name}.{key}": quantizer for key, (quantizer, _) in weight_quantizers_of(module).items()}
        for key, quantizer in tensors.items():
            kinds = {kind: getattr(quantizer, kind, None) for kind in ("scale", "codebook")}
            if isinstance(module, SmoothedModule):
                kinds["smoothing"] = module.smoothing.factors
            present = {kind: _encode(tensor.detach()) for kind, tensor in kinds.items() if tensor is not None}
            found.update({key: present} if present else {})
    return found


def load_weight_states_(model: nn.Module, states: dict[str, dict[str, Any]]) -> None:
    """Restores the state of weight quantizers from [`weight_states`], in place. Raises `ValueError`: a name or a shape
    that the model has not."""
    modules = {f"{name}.weight": module for name, module in quantized_modules(model).items()}
    own = weight_quantizers(model)
    for name, entry in states.items():
        for key, encoded in entry.items():
            values = _decode(encoded)
            module = modules.get(name)
            if key == "smoothing" and isinstance(module, SmoothedModule):
                module.smoothing.factors = values.to(module.weight.device)
                continue
            target = getattr(own.get(name), key, None)
            if not isinstance(target, Tensor) or target.shape != values.shape:
                raise ValueError(
                    f"{type(model).__name__} has no {key} of shape {tuple(values.shape)} for {name}. The record belongs "
                    "to another model or another spec."
                )
            with torch.no_grad():
                target.copy_(values)


def _encode(values: Tensor) -> dict[str, Any]:
    data = values.float().cpu().numpy().astype("<f4").tobytes()
    return {"shape": list(values.shape), "float32": base64.b64encode(data).decode()}


def _decode(encoded: dict[str, Any]) -> Tensor:
    try:
        values = np.frombuffer(base64.b64decode(encoded["float32"], validate=True), dtype="<f4").astype(np.float32)
        tensor = torch.from_numpy(values.copy()).reshape(encoded["shape"])
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"Recorded values are damaged: {brief(error)}. {_AGAIN}") from error
    if not torch.isfinite(tensor).all():
        raise ValueError(f"Recorded values are not finite. {_AGAIN}")
    return tensor


def weights_digest(model: nn.Module) -> dict[str, str] | None:
    """A hash of all weights, whatever their names, and their precisions; `None` where they are not all at hand."""
    tensors = [t for t in model.state_dict().values() if torch.is_tensor(t) and t.is_floating_point()]
    if any(type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta or not tensor.numel() for tensor in tensors):
        return None
    rows: list[Any] = [tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy() for tensor in tensors]
    parts = {hashlib.blake2b(row).digest() for row in rows}
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
    return {"dtype": "_".join(dtypes), "blake2b": hashlib.blake2b(b"".join(sorted(parts)), digest_size=16).hexdigest()}


def warn_of_other_weights(model: PreTrainedModel, record: Mapping[str, Any]) -> None:
    """Warns where the ranges in a record were found with other weights than those of `model`."""
    then = record.get("digest")
    now = weights_digest(model) if then else None
    if then and now and now != then and now["dtype"] == then["dtype"]:
        logger.warning(
            f"The weights of {type(model).__name__} have changed since the ranges of its activations were found, which may no "
            "longer fit them. Find them anew: strip_quantizers_(model), then quantize(model, spec, calibration); or train "
            "with QATCallback."
        )


@refreshes_facts
def record_ranges(model: PreTrainedModel, live: bool = False, digest: bool = True) -> None:
    """Writes the spec and the present state of the quantizers of `model` into `model.config.hfkdq`. `ranges` has scale
    and zero point of every activation, `weights` what [`weight_states`] gives. Where training has not reached the spec
    yet, `weight_bits` has the bits that differ from it, and `enabled` is `False` while the fake quantizers are off. A
    `live` record is that of the moment at which it is read or saved, as in a training; others have the `digest` of the
    weights that they belong to."""
    spec = quantized_spec(model)
    if spec is not None and not (live and isinstance(getattr(model.config, "hfkdq", {}).get(FACT), _LiveRecord)):
        found = _LiveRecord(model, spec) if live else _state_of(model, spec)
        belongs = weights_digest(model) if found["ranges"] and digest and not live else None
        record_fact(model, FACT, {**found, "digest": belongs} if belongs else found)
        if getattr(model.config, "quantization_config", None) is None:  # such as that of bitsandbytes
            mark_quantized(model.config)


class _LiveRecord(dict[str, Any]):
    """A record that is made anew when it is copied, as saving a configuration does. So no step of a training has to
    write it, which moves every scale from the device."""

    def __init__(self, model: PreTrainedModel, spec: QuantizationSpec) -> None:
        super().__init__(_state_of(model, spec))
        self._model = weakref.ref(model)

    def _now(self) -> dict[str, Any]:
        model = self._model()
        spec = None if model is None else quantized_spec(model)
        return dict(self) if model is None or spec is None else _state_of(model, spec)

    def __deepcopy__(self, memo: Any) -> dict[str, Any]:
        return copy.deepcopy(self._now(), memo)

    def __reduce__(self) -> Any:
        return dict, (self._now(),)


def _state_of(model: PreTrainedModel, spec: QuantizationSpec) -> dict[str, Any]:
    left, on = describe_left(model), all(m.fake_quantize_enabled for m in quantized_modules(model).values())
    always = {"spec": named_spec(model, spec).to_dict(), "ranges": activation_ranges(model)}
    more = {
        "unobserved": [name for name, q in activation_quantizers(model).items() if not q.initialized],
        "left_in_float": left if left["modules"] or beyond_former(model) else {},
        "weights": weight_states(model),
        "weight_bits": {n: q.bits for n, q in weight_quantizers(model).items() if q.bits != q.scheme.weight_bits},
    }
    return {**always, **{name: value for name, value in more.items() if value}, **({} if on else {"enabled": False})}


def recorded_quantization(model: PreTrainedModel | PretrainedConfig) -> tuple[QuantizationSpec, dict[str, Any]] | None:
    """The spec and the whole record that [`record_ranges`] wrote, `None` if there is no such record. Raises
    `ValueError`: the record is damaged."""
    fact = read_facts(model).get(FACT)
    if fact is None:
        return None
    missing = [name for name in ("spec", "ranges") if name not in fact]
    if missing:
        raise ValueError(f"The record of quantization lacks {' and '.join(missing)}. {_AGAIN}")
    return spec_of_record(fact["spec"]), fact


def restore_record_(model: PreTrainedModel, record: dict[str, Any]) -> PreTrainedModel:
    """Brings a prepared model into the state that [`record_ranges`] wrote, in place. Raises `ValueError`: it belongs
    to another model, or lacks ranges."""
    modules = quantized_modules(model)
    for name, bits in record.get("weight_bits", {}).items():
        module = modules.get(name.rpartition(".")[0])
        if module is None or bits not in QuantizationSpec.WEIGHT_BITS:
            raise ValueError(f"The record has weights of {bits} bits for {name}, which has none such. {_AGAIN}")
        set_weight_bits_(module, bits)
    recorded = record.get("weights", {})
    pairs = [(name, kind) for name, entry in weight_states(model).items() for kind in entry]
    lost = [f"{name} ({kind})" for name, kind in pairs if kind not in recorded.get(name, {})]
    if lost:
        raise ValueError(f"The record lacks values of {len(lost)} weights, such as {', '.join(lost[:4])}. {_AGAIN}")
    load_weight_states_(model, recorded)
    set_enabled_(model, record.get("enabled", True))
    missing = set(activation_quantizers(model)) - set(record["ranges"]) - set(record.get("unobserved", ()))
    # Before training begins there are none, and earlier releases did not say so.
    if missing and (record["ranges"] or "unobserved" in record):
        raise ValueError(
            f"The record lacks the ranges of {len(missing)} of {len(activation_quantizers(model))} quantized activations, such as "
            f"{', '.join(sorted(missing)[:4])}. {_AGAIN}"
        )
    return set_activation_ranges_(model, record["ranges"])


def set_weight_bits_(module: QuantizedModule, bits: int) -> None:
    """Changes the bits of the weights of a module."""
    for quantizer, weight in weight_quantizers_of(module).values():
        if quantizer.bits != bits:
            quantizer.set_bits(bits, weight)


def set_enabled_(model: nn.Module, enabled: bool) -> None:
    """Turns all fake quantizers of `model` on or off; off, it computes in floating point."""
    for module in model.modules():
        if isinstance(module, FakeQuantized):
            module.fake_quantize_enabled = enabled


def quantizer_states(model: nn.Module) -> dict[str, dict[str, float]]:
    """Exact states of all quantized inputs that have seen data, JSON-ready, by module name."""
    seen = {name: quantizer for name, quantizer in activation_quantizers(model).items() if quantizer.initialized}
    values = _numbers([tensor for quantizer in seen.values() for tensor in quantizer.state_tensors()])
    return {name: {key: next(values) for key in quantizer.state_names} for name, quantizer in seen.items()}


def load_quantizer_states_(model: nn.Module, states: dict[str, dict[str, float]]) -> None:
    """Restores [`quantizer_states`]; fake quantizers that are not in it start anew."""
    for name, quantizer in activation_quantizers(model).items():
        quantizer.initialized = name in states
        if quantizer.initialized:
            quantizer.load_state(states[name])
