# SPDX-License-Identifier: Apache-2.0
"""Which positions of a batch count, read from the batch alone, before any model has run on it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

Batch = Mapping[str, Any]
Positions = torch.Tensor | int


def batch_size(batch: Batch) -> int:
    """Number of examples in a batch."""
    for value in batch.values():
        if isinstance(value, torch.Tensor) and value.dim() > 0:
            return value.shape[0]
    raise ValueError(f"No tensor in the batch tells its size; it has: {', '.join(batch) or 'nothing'}.")


def attended_mask(batch: Batch) -> torch.Tensor | None:
    """`attention_mask` of the batch, of shape `(batch, seq)`; `None` where there is none and every position counts."""
    mask = batch.get("attention_mask")
    return mask.ne(0) if isinstance(mask, torch.Tensor) else None


def token_mask(batch: Batch, shifts_labels: bool) -> torch.Tensor | None:
    """Which token positions count: those with a label other than -100, else those attended to.

    Args:
        batch (`dict`): with `labels` or `attention_mask` of shape `(batch, seq)`, or neither.
        shifts_labels (`bool`): whether the model predicts the next token: then a position counts if the next one has
            a label, and the last one never does.

    Returns:
        `torch.BoolTensor` of shape `(batch, seq)`; `None` where nothing says which positions are padding.
    """
    labels = batch.get("labels")
    if isinstance(labels, torch.Tensor) and labels.dim() == 2 and not labels.is_floating_point():
        mask: torch.Tensor | None = labels.ne(-100)
    else:
        mask = attended_mask(batch)
    if mask is None or not shifts_labels:
        return mask
    return torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)


def frame_lengths(model: Any, adapter: bool = False) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """How many frames a speech model makes of a number of samples; `None` for a model that keeps its positions.

    Args:
        model (`PreTrainedModel`): a model such as Wav2Vec2 or HuBERT.
        adapter (`bool`, defaults to `False`): after the adapter, where its logits are, rather than before.
    """
    lengths = getattr(model, "_get_feat_extract_output_lengths", None)
    if lengths is None or getattr(model, "main_input_name", None) != "input_values":
        return None
    if "add_adapter" in inspect.signature(lengths).parameters:
        return lambda samples: lengths(samples, add_adapter=adapter and model.config.add_adapter)
    return lengths


def frame_mask(batch: Batch, lengths: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Which frames of a batch of audio count, `(batch, frames)`: all where it has no `attention_mask`."""
    values, mask = batch["input_values"], attended_mask(batch)
    longest = torch.full((len(values),), values.shape[1], device=values.device)
    frames = lengths(longest if mask is None else mask.sum(-1))
    total = int(lengths(torch.tensor(values.shape[1])))
    return torch.arange(total, device=values.device) < frames.unsqueeze(1)


def valid_count(batch: Batch, mask: torch.Tensor | None) -> Positions:
    """Number of positions that a mask lets count; without one, of examples."""
    return batch_size(batch) if mask is None else mask.sum()


def position_mask(batch: Batch, lengths: Callable[[torch.Tensor], torch.Tensor] | None) -> torch.Tensor | None:
    """Which positions of hidden states count: frames of audio where `lengths` gives their number, else as attended to."""
    return attended_mask(batch) if lengths is None else frame_mask(batch, lengths)


def output_mask(model: Any, batch: Batch, shape: torch.Size) -> torch.Tensor | None:
    """Which positions of an output of shape `(batch, seq)` are no padding, where the batch tells."""
    mask: torch.Tensor | None = batch.get("attention_mask")
    if getattr(model.config, "is_encoder_decoder", False):  # where that mask is of the encoder's input
        labels = batch.get("labels")
        mask = batch.get("decoder_attention_mask")
        mask = labels.ne(-100) if mask is None and isinstance(labels, torch.Tensor) else mask
    elif mask is not None and len(shape) == 2 and mask.shape[1] != shape[1]:  # of samples, where the output has frames
        frames = getattr(model, "_get_feature_vector_attention_mask", None)
        mask = None if frames is None else frames(shape[1], mask)
    return mask.ne(0) if mask is not None and mask.shape == shape else None
