# SPDX-License-Identifier: Apache-2.0
"""What a model does, in Optimum's words, and random inputs that fit it, read off Transformers' own tables."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import suppress
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

from ..modeling.tasks import TASKS, is_bare, tasks_of
from .protocol import PAST

# In the others an encoder-decoder shifts the inputs itself.
_DECODED = ("text2text-generation", "automatic-speech-recognition", "feature-extraction")
# Other names that Optimum takes for the same tasks.
_SYNONYMS = {
    "audio-ctc": "automatic-speech-recognition",
    "causal-lm": "text-generation",
    "default": "feature-extraction",
    "image-feature-extraction": "feature-extraction",
    "masked-lm": "fill-mask",
    "sentence-similarity": "feature-extraction",
    "seq2seq-lm": "text2text-generation",
    "sequence-classification": "text-classification",
    "speech2seq-lm": "automatic-speech-recognition",
    "summarization": "text2text-generation",
    "translation": "text2text-generation",
    "zero-shot-classification": "text-classification",
}


def resolve_task(model: PreTrainedModel, task: str | None) -> str:
    """The name that Optimum gives to what `model` does.

    Args:
        model (`PreTrainedModel`): the model.
        task (`str`, *optional*): the answer, in any spelling that Optimum knows; read off the model's class by default.

    Raises:
        ValueError: such a model cannot be exported, or not for this task.
    """
    supported = list(dict.fromkeys(_tasks_of(model)))
    model_type, name = model.config.model_type, type(model).__name__
    if not supported:
        known = sorted({task.name for task in TASKS})
        raise ValueError(
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


def output_names(task: str) -> tuple[str, ...]:
    """The outputs of a model that its file has, as Optimum chooses them."""
    return next(known.outputs for known in TASKS if known.name == task.removesuffix(PAST))


def dummy_batches(model: PreTrainedModel, task: str) -> list[dict[str, Tensor]]:
    """Random inputs of two sizes that `model` accepts, the same at every call; texts are padded on the right."""
    generator = torch.Generator().manual_seed(0)
    return [_dummy_batch(model, task, generator, *size) for size in ((8, 1.0), (3, 0.5))]


def _tasks_of(model: PreTrainedModel) -> Iterator[str]:
    """The tasks that a model of this class can be exported for, the default first."""
    encoder_decoder = model.config.is_encoder_decoder
    for task in tasks_of(model):
        if encoder_decoder and task.name == "fill-mask":
            continue  # BART is in that table as well, but has no mask to fill
        # A BERT that is no decoder sees what comes later, so nothing of it can be kept.
        if task.generates and (encoder_decoder or getattr(model.config, "is_decoder", None) is not False):
            yield task.name + PAST
        yield task.name
    if is_bare(model):
        yield "feature-extraction"


def _dummy_batch(
    model: PreTrainedModel, task: str, generator: torch.Generator, size: int, share: float
) -> dict[str, Tensor]:
    """One batch of `size` examples, `share` as long as the longest."""
    main = model.main_input_name
    if main == "pixel_values":
        return {main: torch.randn(size, *_image_shape(model.config), generator=generator)}
    if main == "input_values" and hasattr(model.config, "frequency_stride"):  # patches of a spectrum
        return {main: torch.randn(size, model.config.max_length, model.config.num_mel_bins, generator=generator)}
    if main == "input_values":
        return {main: torch.randn(size, int(16000 * share), generator=generator)}
    length = max(2, int(sequence_length(model) * share))
    if main == "input_features":
        config = model.config
        frames = 2 * getattr(config, "max_source_positions", 1500)
        bins = getattr(config, "num_mel_bins", 80)
        batch = {main: torch.randn(size, bins, frames, generator=generator)}
    else:
        shape = (size, 4, length) if task == "multiple-choice" else (size, length)
        batch = _texts(model, shape, generator)
    takes = "decoder_input_ids" in inspect.signature(model.forward).parameters
    if takes and model.config.is_encoder_decoder and task.removesuffix(PAST) in _DECODED:
        positions = getattr(model.config, "max_target_positions", length)
        batch["decoder_input_ids"] = _token_ids(model, (size, max(4, min(positions, length) // 2)), generator)
    return batch


def _texts(model: PreTrainedModel, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Tensor]:
    """Token ids and what else the model's own tokenizer would give, the last text of them shorter than the others."""
    ids = _token_ids(model, shape, generator)
    mask = torch.ones_like(ids)
    mask[-1, ..., (shape[-1] + 1) // 2 :] = 0
    pad = getattr(model.config, "pad_token_id", None) or 0
    batch = {"input_ids": torch.where(mask.bool(), ids, pad), "attention_mask": mask}
    accepted = inspect.signature(model.forward).parameters
    if "token_type_ids" in accepted and "token_type_ids" in _tokenizer_outputs(model):
        batch["token_type_ids"] = torch.zeros_like(ids)
    return batch


def _token_ids(model: PreTrainedModel, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    vocabulary = model.config.get_text_config().vocab_size
    # Position tables of RoBERTa's kind count what is not padding, so random ids avoid that token.
    ids = torch.randint(0, vocabulary - 1, shape, generator=generator)
    pad = getattr(model.config, "pad_token_id", None)
    return ids + (ids >= pad) if pad is not None else ids


def _tokenizer_outputs(model: PreTrainedModel) -> list[str]:
    """The inputs that the tokenizer of this architecture makes."""
    with suppress(KeyError):
        entry: Any = TOKENIZER_MAPPING[type(model.config)]
        classes = [one for one in (entry if isinstance(entry, tuple) else (entry,)) if one is not None]
        if classes:
            return list(classes[0].model_input_names)
    return ["input_ids", "attention_mask", "token_type_ids"]


def _image_shape(config: Any) -> tuple[int, int, int]:
    """Channels, height and width."""
    size = getattr(config, "image_size", None) or 64
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    return getattr(config, "num_channels", 3), height, width


def sequence_length(model: PreTrainedModel) -> int:
    """A length that fits into the position table, with room for models that start counting at an offset."""
    positions = getattr(model.config, "max_position_embeddings", None)
    return min(16, positions // 2) if isinstance(positions, int) else 16
