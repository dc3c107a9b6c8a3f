# SPDX-License-Identifier: Apache-2.0
"""What a model does, in Optimum's words, read off Transformers' own tables."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from ..modeling.forwards import as_output, evaluating, full_precision
from ..modeling.tasks import TASKS, Task, is_bare, tasks_of
from .protocol import PAST, UnknownArchitecture

OWN = "custom"
"""The task of a model that is in none of the tables of Transformers."""

# Other names that Optimum takes for the same tasks.
_SYNONYMS = {
    **dict.fromkeys(("audio-ctc", "speech2seq-lm"), "automatic-speech-recognition"),
    **dict.fromkeys(("default", "image-feature-extraction", "sentence-similarity"), "feature-extraction"),
    **dict.fromkeys(("seq2seq-lm", "summarization", "translation"), "text2text-generation"),
    **dict.fromkeys(("sequence-classification", "zero-shot-classification"), "text-classification"),
    "causal-lm": "text-generation", "masked-lm": "fill-mask",
}  # fmt: skip


def resolve_task(model: PreTrainedModel, task: str | None) -> str:
    """The name that Optimum gives to what `model` does; `task` is the answer in any spelling that Optimum knows, by
    default it is read off the model's class. Raises `ValueError`: such a model cannot be exported, or not for it."""
    supported = list(dict.fromkeys(_tasks_of(model)))
    model_type, name = model.config.model_type, type(model).__name__
    if not supported:
        known = sorted({task.name for task in TASKS})
        raise UnknownArchitecture(
            f"There is no ONNX export for the architecture {model_type!r} as {name}. "
            f"Load the model with the Auto class of one of these tasks: {', '.join(known)}."
        )
    if task is None:
        return supported[0]
    bare = task.removesuffix(PAST)
    wanted = _SYNONYMS.get(bare, bare) + (PAST if task.endswith(PAST) else "")
    if task in ("summarization", "translation") and wanted + PAST in supported:  # which say nothing of a cache
        wanted += PAST
    if wanted not in supported:
        near = get_close_matches(wanted, supported, 1) or supported[:1]
        raise ValueError(
            f"transformers.exporters cannot export {name} ({model_type!r}) for the task {task!r}; the nearest is "
            f"{near[0]!r}. It can for: {', '.join(supported)}."
        )
    return wanted


def own_task(model: nn.Module, task: str | None) -> str | None:
    """The task of a class of one's own that is one file: that which was asked for, its base's or that of its Auto class.

    `None` for one that Transformers' own exporters are to be asked about, as it generates.
    """
    known = [*tasks_of(model), *(entry for entry in TASKS if _is_registered(model, entry))]
    if any(entry.generates for entry in known):
        return None
    if task is None:
        return known[0].name if known else "feature-extraction" if is_bare(model) else OWN
    wanted = _SYNONYMS.get(task, task)
    names = sorted({entry.name for entry in TASKS if not entry.generates})
    if wanted not in names:
        raise ValueError(
            f"{type(model).__name__}, a class of your own, cannot be exported for the task {task!r}. It can for: "
            f"{', '.join(names)}; or leave task= out."
        )
    return wanted


def _is_registered(model: nn.Module, task: Task) -> bool:
    """Whether a class was registered with the Auto class of a task."""
    registry = getattr(modeling_auto, f"MODEL_FOR_{task.table}_MAPPING", None)
    values = getattr(registry, "_extra_content", {}).values()
    return any(type(model) in (value if isinstance(value, tuple) else (value,)) for value in values)


def keeps_tokens(model: PreTrainedModel) -> bool:
    """Whether a decoder keeps a key and a value for each token, as caches in files do, and not a state (Mamba, RWKV)."""
    ids = torch.ones(1, 2, dtype=torch.long, device=model.device)
    try:
        with torch.no_grad(), evaluating(model), full_precision(model):
            cache = as_output(model(input_ids=ids, use_cache=True)).get("past_key_values")
    except Exception:  # it takes something else, and its export says what
        return not getattr(model, "_is_stateful", False)
    layers = [vars(layer) for layer in getattr(cache, "layers", None) or ()]
    tensors = [{k for k, value in held.items() if isinstance(value, Tensor) and value.ndim > 1} for held in layers]
    return bool(tensors) and all(names == {"keys", "values"} for names in tensors)


def _tasks_of(model: PreTrainedModel) -> Iterator[str]:
    """The tasks that a model of this class can be exported for, the default first."""
    encoder_decoder = model.config.is_encoder_decoder
    for task in tasks_of(model):
        if encoder_decoder and task.name == "fill-mask":
            continue  # BART is in that table as well, but has no mask to fill
        # A BERT that is no decoder sees what comes later, so nothing of it can be kept.
        decodes = encoder_decoder or (getattr(model.config, "is_decoder", None) is not False and keeps_tokens(model))
        if task.generates and decodes:
            yield task.name + PAST
        yield task.name
    if is_bare(model):
        yield "feature-extraction"
