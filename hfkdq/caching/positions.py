# SPDX-License-Identifier: Apache-2.0
"""Positions of a batch that are not padding, and checksums of the inputs of each row."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping
from typing import Any

import torch
import transformers
from torch import nn

from ..modeling.forwards import TEACHER_PREFIX
from ..modeling.masks import Batch, frame_lengths, frame_mask, token_mask
from ..objectives.model_signature import ModelSignature
from .info import collator_name

MASKS = ("attention_mask", "decoder_attention_mask", "pixel_mask")
"""Columns that tell which positions of a batch are padding."""


def name_in(batch: Mapping[str, Any], name: str) -> str:
    """The column that the teacher reads as `name`."""
    return TEACHER_PREFIX + name if TEACHER_PREFIX + name in batch else name


def _mask(batch: Batch, name: str) -> torch.Tensor | None:
    mask = batch.get(name_in(batch, name))
    return mask.ne(0) if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None


def own_positions(batch: Batch, kind: str, outline: ModelSignature) -> torch.Tensor | None:
    """Non-padding positions of a batch, `(batch, positions)`, of the kind of `CachedOutput.positions`. `outline`, of
    the teacher, tells how many frames it makes of samples. `None` where nothing tells what is padding."""
    attended = _mask(batch, "attention_mask")
    if kind == "attended":
        return attended
    if kind == "decoded":
        columns = {"labels": batch.get("labels"), "attention_mask": _mask(batch, "decoder_attention_mask")}
        return token_mask(columns, shifts_labels=False)
    lengths = frame_lengths(_config_only_model(outline), adapter=kind == "adapted_frames")
    if lengths is None:
        raise ValueError(f"{outline.model_class} does not tell how many frames it makes of a number of samples.")
    return frame_mask({"input_values": batch[name_in(batch, "input_values")], "attention_mask": attended}, lengths)


def _config_only_model(outline: ModelSignature) -> Any:
    """A model with a class and a configuration alone, no weights: enough to ask it for lengths."""
    cls = getattr(transformers, outline.model_class)
    model = cls.__new__(cls)
    nn.Module.__init__(model)
    model.config = outline.config
    return model


def checked_inputs(batch: Batch, columns: Collection[str], decodes_labels: bool) -> tuple[str, ...]:
    """Names of the inputs that row checks are over: those that the teacher reads, without the masks, which only cut
    them. `columns` are those that its forward pass takes; `decodes_labels` says whether its decoder reads the
    labels."""
    labels = decodes_labels and isinstance(batch.get("labels"), torch.Tensor)
    made_of_labels = {"decoder_input_ids", "decoder_attention_mask"} if labels else set[str]()
    names = [name_in(batch, name) for name in sorted(set(columns) - made_of_labels) if not name.endswith("mask")]
    found = [name for name in names if isinstance(batch.get(name), torch.Tensor) and batch[name].dim() > 0]
    return (*found, "labels") if labels else tuple(found)


def row_checks(batch: Batch, names: tuple[str, ...], rows: int, collator: Any) -> list[int]:
    """One number per row: how many positions its inputs `names` have, times 2^32, and their CRC-32. Raises
    `ValueError`: the batch, which `collator` made of so many rows, lacks an input or has another number of rows."""
    missing = [name for name in names if name not in batch]
    if missing:
        raise ValueError(
            f"The teacher read {', '.join(missing)}, which this batch lacks, so nothing tells whether its cached outputs "
            "belong to these rows. Keep the columns that the outputs were cached with, and the same collator."
        )
    inputs = [(batch[name], _cut_of(batch, name)) for name in names]
    if len(inputs[0][0]) != rows:
        raise ValueError(
            f"{collator_name(collator)} made {len(inputs[0][0])} rows of {rows}; cached teacher outputs need a collator that "
            "keeps rows apart."
        )
    return [_row_check([_row_of(values, cut, row) for values, cut in inputs]) for row in range(rows)]


def _row_of(values: torch.Tensor, cut: torch.Tensor | None, row: int) -> torch.Tensor:
    if cut is None:
        return values[row]
    return values[row][..., cut[row]] if cut.dim() == 3 else values[row][cut[row]]


def _row_check(inputs: list[torch.Tensor]) -> int:
    crc = 0
    for own in inputs:
        own = own.float() if own.is_floating_point() else own.long()
        crc = zlib.crc32(own.contiguous().cpu().numpy().tobytes(), crc)
    return max(len(own) if own.dim() else 1 for own in inputs) << 32 | crc


def _cut_of(batch: Batch, name: str) -> torch.Tensor | None:
    """The mask that cuts the padding off an input; `None` where it is taken whole."""
    values = batch[name]
    if name == "labels":
        return values.ne(-100)
    plain = name.removeprefix(TEACHER_PREFIX)
    pixels = batch.get(name_in(batch, "pixel_mask"))
    if plain == "pixel_values" and isinstance(pixels, torch.Tensor) and pixels.shape[1:] == values.shape[-2:]:
        return pixels.ne(0)
    mask = _mask(batch, "decoder_attention_mask" if plain.startswith("decoder_") else "attention_mask")
    return mask if mask is not None and mask.shape == values.shape[:2] else None


def told_positions(check: int) -> int:
    """The number of positions in the check of a row."""
    return check >> 32
