# SPDX-License-Identifier: Apache-2.0
"""Checks before an export."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from ..facts import read_facts
from ..modeling.forwards import base_of
from ..modeling.own_modules import as_pretrained_
from ..quantization import activation_quantizers, activation_ranges, means_the_same, quantized_spec
from ..specs import QuantizationSpec
from .exporters_tasks import own_task
from .inputs import is_own
from .protocol import PAST, Backend, UnknownArchitecture

TARGETS = ("onnxruntime", "standard")
WEIGHT_TYPES = ("auto", "int8", "uint8")


def check_arguments(model: Any, tolerance: float | None, target: str, weight_type: str) -> None:
    """Refuses other objects than models in floating point (`TypeError`, `ValueError`) and impossible settings."""
    if not isinstance(base_of(as_pretrained_(model)), PreTrainedModel):
        raise TypeError(
            f"model must be a PreTrainedModel, got {type(model).__name__}. Unwrap it first: trainer.model."
        )
    if getattr(model, "is_quantized", False) and base_of(model) is model:
        raise ValueError(
            "The model was loaded with integer weights (quantization_config). Load it in floating point to export it."
        )
    if tolerance is not None and not (tolerance > 0 and math.isfinite(tolerance)):
        raise ValueError(f"tolerance must be a positive number (a share of the largest logit), got {tolerance!r}.")
    if target not in TARGETS:
        raise ValueError(f"target={target!r} does not exist. Use one of {', '.join(TARGETS)}.")
    if weight_type not in WEIGHT_TYPES:
        raise ValueError(f"weight_type={weight_type!r} does not exist. Use one of {', '.join(WEIGHT_TYPES)}.")


def check_spec(model: PreTrainedModel, spec: QuantizationSpec, calibration: Any) -> None:
    """Refuses a spec that the model has no ranges for: trained with another or with none, or on no data yet."""
    trained = quantized_spec(model)
    if trained is None and calibration is None and spec.activation_bits is not None:
        raise ValueError(
            "The model was not trained with a QuantizationSpec, so there are no ranges to export. Train it with "
            "QATCallback(spec), or pass calibration= to have the ranges observed on your data."
        )
    if trained is not None and not means_the_same(model, spec):
        raise ValueError(
            f"The model was trained with {trained}; asked for is {spec}. Export it with the spec it was trained with."
        )
    if trained is not None and spec.activation_bits is not None and not activation_ranges(model):
        raise ValueError(
            "The fake quantizers of the model have seen no data, so there are no ranges to export. Train the model, or "
            'export its float weights with quantization="float32".'
        )


@contextmanager
def require_ranges(model: PreTrainedModel) -> Iterator[None]:
    """Refuses, on leaving, activations without a range that a forward pass inside has reached (`ValueError`)."""
    unknown = {name: q for name, q in activation_quantizers(model).items() if not q.initialized}
    met: list[str] = []
    handles = [q.register_forward_pre_hook(lambda *_, name=name: met.append(name)) for name, q in unknown.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if met:
        names = list(dict.fromkeys(met))
        raise ValueError(
            f"{len(names)} quantized activations of the model have no range, as no data reached them: {', '.join(names[:4])}. "
            "Train or calibrate on data that does, or leave these modules in floating point with exclude_modules."
        )


def resolve_task(backend: Backend, model: PreTrainedModel, task: str | None) -> str:
    """The task as the backend resolves it, without a cache where heads were pruned layer by layer."""
    resolved = own_task(model, task) if is_own(model) else None
    try:
        resolved = backend.resolve_task(model, task) if resolved is None else resolved
    except UnknownArchitecture:  # what is one file is traced from a batch, as classes of one's own are
        resolved = own_task(model, task)
        if resolved is None:
            raise
    shapes = read_facts(model).get("shapes", {}).get("tensors", {})
    if not resolved.endswith(PAST) or not any("attn" in name or "attention" in name.lower() for name in shapes):
        return resolved
    if task is None:
        return resolved.removesuffix(PAST)
    raise ValueError(
        f"The layers of {type(model).__name__} were left with different attention heads, which a cache of the task "
        f"{resolved!r} cannot hold. Export it for {resolved.removesuffix(PAST)!r}, which works without."
    )
