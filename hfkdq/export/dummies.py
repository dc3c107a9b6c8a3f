# SPDX-License-Identifier: Apache-2.0
"""Random inputs that fit a model, read off its configuration and Transformers' own tables."""

from __future__ import annotations

import inspect
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

from .protocol import PAST

# In the others an encoder-decoder shifts the inputs itself.
_DECODED = ("text2text-generation", "automatic-speech-recognition", "feature-extraction")
_MAIN = ("input_ids", "pixel_values", "input_values", "input_features")


def dummy_batches(model: PreTrainedModel, task: str) -> list[dict[str, Tensor]]:
    """Random inputs of two sizes that `model` accepts, the same at every call; texts are padded on the right."""
    generator = torch.Generator().manual_seed(0)
    return [_dummy_batch(model, task, generator, *size) for size in ((8, 1.0), (3, 0.5))]


def dummy_batch(model: PreTrainedModel, task: str, size: int, length: int) -> dict[str, Tensor]:
    """Random inputs of `size` examples without padding, texts of `length` tokens, the same at every call."""
    batch = _dummy_batch(model, task, torch.Generator().manual_seed(0), size, 1.0, length)
    return {name: torch.ones_like(value) if name == "attention_mask" else value for name, value in batch.items()}


def _dummy_batch(
    model: PreTrainedModel, task: str, generator: torch.Generator, size: int, share: float, length: int | None = None
) -> dict[str, Tensor]:
    """One batch of `size` examples, `share` as long as the longest, or of texts of `length`."""
    main = getattr(model, "main_input_name", None)
    if main not in _MAIN:
        raise ValueError(
            f"There are no made-up inputs for {type(model).__name__}, which takes {main}. Pass a batch of what it takes as "
            "inputs=, or calibration=."
        )
    if main == "pixel_values":
        return {main: torch.randn(size, *_image_shape(model.config), generator=generator)}
    if main == "input_values" and hasattr(model.config, "frequency_stride"):  # patches of a spectrum
        return {main: torch.randn(size, model.config.max_length, model.config.num_mel_bins, generator=generator)}
    if main == "input_values":
        return {main: torch.randn(size, int(16000 * share), generator=generator)}
    if main == "input_features" and hasattr(
        model.config, "feature_projection_input_dim"
    ):  # frames one after the other
        frames = max(8, int(64 * share)) if length is None else length
        return {main: torch.randn(size, frames, model.config.feature_projection_input_dim, generator=generator)}
    length = max(2, int(sequence_length(model) * share)) if length is None else length
    if main == "input_features":
        config = model.config
        frames = 2 * getattr(config, "max_source_positions", 1500)
        bins = getattr(config, "num_mel_bins", 80)
        batch = {main: torch.randn(size, bins, frames, generator=generator)}
    else:
        shape = (size, 4, length) if task == "multiple-choice" else (size, length)
        batch = _texts(model, shape, generator)
        vision = getattr(model.config, "vision_config", None)
        if vision is not None and not hasattr(model.config, "image_token_id"):  # an encoder of each, as in CLIP
            batch["pixel_values"] = torch.randn(size, *_image_shape(vision), generator=generator)
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
    if "token_type_ids" in tokenizer_outputs(model):
        batch["token_type_ids"] = torch.zeros_like(ids)
    return {name: value for name, value in batch.items() if name in accepted}


def _token_ids(model: PreTrainedModel, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    vocabulary = model.config.get_text_config().vocab_size
    # Position tables of RoBERTa's kind count what is not padding, so random ids avoid that token.
    ids = torch.randint(0, vocabulary - 1, shape, generator=generator)
    pad = getattr(model.config, "pad_token_id", None)
    return ids + (ids >= pad) if pad is not None else ids


def tokenizer_outputs(model: nn.Module) -> list[str]:
    """The inputs that the tokenizer of this architecture makes."""
    with suppress(KeyError):
        entry: Any = TOKENIZER_MAPPING[type(getattr(model, "config", None))]  # type: ignore[index]
        for one in entry if isinstance(entry, tuple) else (entry,):
            with suppress(ImportError):  # a class whose packages are not installed says nothing
                if one is not None:
                    return list(one.model_input_names)
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
