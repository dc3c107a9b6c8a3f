# SPDX-License-Identifier: Apache-2.0
"""Checks before an export."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from ..facts import read_facts
from ..modeling.forwards import base_of, evaluating, full_precision, hooked
from ..modeling.own_modules import as_pretrained_
from ..modeling.placement import refuse_sharded
from ..modeling.tasks import tasks_of
from ..quantization import activation_quantizers, activation_ranges, means_the_same, quantized_spec
from ..specs import QuantizationSpec
from .choices import FLAT, OPENVINO, TARGETS, WITHOUT_FILE
from .exporters_tasks import keeps_tokens, own_task
from .inputs import generates, is_own
from .openvino_runtime import require_openvino
from .protocol import PAST, Backend, UnknownArchitecture

TEXT_GENERATION = "text-generation"
_LONG = 600
"""Tokens: more than two of the pieces that such models compute a text by, which are 256 at most."""
WEIGHT_TYPES = ("auto", "int8", "uint8")


def check_arguments(model: Any, tolerance: float | None, target: str, weight_type: str, layout: str) -> None:
    """Refuses other objects than models in floating point (`TypeError`, `ValueError`) and impossible settings."""
    if not isinstance(base_of(as_pretrained_(model)), PreTrainedModel):
        raise TypeError(
            f"model must be a PreTrainedModel, got {type(model).__name__}. Unwrap it first: trainer.model."
        )
    refuse_sharded(model)
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
    if target != OPENVINO:
        return
    if weight_type == "uint8":
        raise ValueError(
            'weight_type="uint8" is for products of ONNX Runtime; OpenVINO multiplies int8 weights. Leave it out with '
            'target="openvino".'
        )
    if layout != FLAT:
        raise ValueError(
            f'layout={layout!r} has ONNX files; target="openvino" writes a folder for each precision. Leave the layout out.'
        )
    require_openvino()


def check_openvino(model: PreTrainedModel, task: str) -> None:
    """Refuses what is several files, or has a cache, in OpenVINO's own format."""
    if generates(model, task):
        raise ValueError(
            f'target="openvino" writes models of one file without a cache, and {type(model).__name__} generates (task {task!r}). Export it '
            'with target="onnxruntime", or the checkpoint with optimum-intel (`optimum-cli export openvino`); a decoder without its cache '
            'is one file too: task="text-generation".'
        )


def check_spec(model: PreTrainedModel, spec: QuantizationSpec, calibration: Any) -> None:
    """Refuses a spec that the model has no ranges for: trained with another or with none, or on no data yet."""
    trained = quantized_spec(model)
    if trained is None and calibration is None and spec.activation_bits is not None:
        raise ValueError(
            "The model was not trained with a QuantizationSpec, so there are no ranges to export. Train it with "
            "QATCallback(spec), or pass calibration= to have the ranges observed on your data."
        )
    if trained is not None and not means_the_same(model, spec):
        told = f"The model was trained with {trained}; asked for is {spec}"
        raise ValueError(f"{told}. Export it with the spec it was trained with.")
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
    with hooked(handles):
        yield
    if met:
        names = list(dict.fromkeys(met))
        raise ValueError(
            f"{len(names)} quantized activations of the model have no range, as no data reached them: {', '.join(names[:4])}. "
            "Train or calibrate on data that does, or leave these modules in floating point with exclude_modules."
        )


def resolve_task(backend: Backend, model: PreTrainedModel, task: str | None) -> str:
    """The task as the backend resolves it, without a cache where heads were pruned layer by layer."""
    resolved = own_task(model, task) if is_own(model) else None
    unknown = False
    try:
        resolved = backend.resolve_task(model, task) if resolved is None else resolved
    except UnknownArchitecture:  # what is one file is traced from a batch, as classes of one's own are
        resolved = own_task(model, task) or _without_cache(model, task)
        if resolved is None:
            raise
        unknown = True
    if resolved == TEXT_GENERATION and (unknown or not keeps_tokens(model)):
        _check_any_length(model)
    shapes = read_facts(model).get("shapes", {}).get("tensors", {})
    if not resolved.endswith(PAST) or not any("attn" in name or "attention" in name.lower() for name in shapes):
        return resolved
    if task is None:
        return resolved.removesuffix(PAST)
    raise ValueError(
        f"The layers of {type(model).__name__} were left with different attention heads, which a cache of the task "
        f"{resolved!r} cannot hold. Export it for {resolved.removesuffix(PAST)!r}, which works without."
    )


def _without_cache(model: PreTrainedModel, task: str | None) -> str | None:
    """The task of a decoder that an exporter does not know; `None` for other models and for a task with a cache."""
    names = [known.name for known in tasks_of(model)]
    asked = task in (None, TEXT_GENERATION, "causal-lm")
    return TEXT_GENERATION if asked and names and names[0] == TEXT_GENERATION else None


class _Calls(TorchDispatchMode):
    """Counts operations, up to a number."""

    def __init__(self, most: float = math.inf) -> None:
        super().__init__()
        self.count, self.most = 0, most

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count > self.most:
            raise _TooMany
        return func(*args, **(kwargs or {}))


class _TooMany(Exception):
    pass


def _check_any_length(model: PreTrainedModel) -> None:
    """Refuses a decoder that computes a text in a loop, of which a file would have as many turns as the traced text took."""
    short, count = 16, 0
    longest = getattr(model.config, "max_position_embeddings", None) or _LONG
    try:
        with torch.no_grad(), evaluating(model), full_precision(model):
            for length in (short, min(longest, _LONG)):
                ids = (torch.arange(length, device=model.device) % model.config.get_text_config().vocab_size)[None]
                with _Calls(count or math.inf) as calls:
                    model(input_ids=ids, use_cache=False)
                count = calls.count
        return
    except _TooMany:
        told = f"{short} tokens take {count} operations, {min(longest, _LONG)} take more"
    except Exception:  # it takes something else, and its export says what
        return
    raise ValueError(
        f"{type(model).__name__} computes a text in a loop over its tokens or the experts that they go to, of which an ONNX file "
        f"would have as many turns as one text takes: {told}. {WITHOUT_FILE}"
    )
