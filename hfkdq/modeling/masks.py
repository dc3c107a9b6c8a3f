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
    # A model of several inputs may have the patches of all images in one.
    for value in (batch.get("input_ids"), *batch.values()):
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
            a label and it is no padding itself, and the last one never does.

    Returns:
        `torch.BoolTensor` of shape `(batch, seq)`; `None` where nothing says which positions are padding.
    """
    labels, attended = batch.get("labels"), attended_mask(batch)
    mask = attended
    if isinstance(labels, torch.Tensor) and labels.dim() == 2 and not labels.is_floating_point():
        mask = labels.ne(-100)
    if mask is None or not shifts_labels:
        return mask
    mask = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
    # The first token of a text that is padded on the left is predicted from padding.
    return mask & attended if attended is not None and attended.shape == mask.shape else mask


def frame_lengths(model: Any, adapter: bool = False) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """How many frames a speech model makes of a number of samples, or of the frames that it reads; `None` for a model that keeps its positions.

    Args:
        model (`PreTrainedModel`): a model such as Wav2Vec2 or HuBERT.
        adapter (`bool`, defaults to `False`): after the adapter, where its logits are, rather than before.
    """
    lengths = getattr(model, "_get_feat_extract_output_lengths", None)
    adapts = lengths is not None and "add_adapter" in inspect.signature(lengths).parameters
    if lengths is None or not (adapts or getattr(model, "main_input_name", None) == "input_values"):
        return None
    if adapts:
        return lambda samples: lengths(samples, add_adapter=adapter and model.config.add_adapter)
    return lengths


def frame_mask(batch: Batch, lengths: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Which frames of a batch of audio count, `(batch, frames)`: all where it has no `attention_mask`."""
    values = batch["input_values"] if "input_values" in batch else batch["input_features"]
    mask = attended_mask(batch)
    longest = torch.full((len(values),), values.shape[1], device=values.device)
    frames = lengths(longest if mask is None else mask.sum(-1))
    total = int(lengths(torch.tensor(values.shape[1])))
    return torch.arange(total, device=values.device) < frames.unsqueeze(1)


def valid_count(batch: Batch, mask: torch.Tensor | None) -> Positions:
    """Number of positions that a mask lets count; without one, of examples."""
    return batch_size(batch) if mask is None else mask.sum()


def position_mask(batch: Batch, lengths: Callable[[torch.Tensor], torch.Tensor] | None) -> torch.Tensor | None:
    """Which positions of hidden states count: frames of audio where `lengths` gives their number, else as attended to."""
    if lengths is not None:
        return frame_mask(batch, lengths)
    mask, ids = attended_mask(batch), batch.get("input_ids")
    # Each of several choices is a text of its own.
    return mask.flatten(0, 1) if mask is not None and ids is not None and ids.dim() == mask.dim() == 3 else mask


def refuse_two_texts(batch: Batch, name: str) -> None:
    """Refuses a comparison position by position of a student and a teacher that read other tokens.

    Raises:
        ValueError: the batch has tokens of the teacher's own.
    """
    if "input_ids" in batch and "teacher_input_ids" in batch:
        raise ValueError(
            f"{name} compares position with position, and the batch brings the teacher tokens of its own (teacher_input_ids), "
            "which are others at the same positions. Use objectives that compare examples, such as RKD and "
            "SimilarityPreservingKD, or ULD for the answers of two language models."
        )


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
