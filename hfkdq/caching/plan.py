# SPDX-License-Identifier: Apache-2.0
"""Plans which outputs of a teacher are cached and cuts them out of its output: positions, checksums of inputs."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import transformers
from torch import nn

from ..losses.divergences import coarse_log_probabilities
from ..modeling.forwards import TEACHER_PREFIX
from ..modeling.masks import Batch, frame_lengths, frame_mask, token_mask
from ..objectives.finding import find_head
from ..objectives.heads import DecoderHead, FrameHead, Head, SpanHead
from ..objectives.model_signature import ModelSignature, signature_of
from .info import CachedOutput, collator_name

LARGE = 1024
"""From more classes than this per position on, only the likeliest are cached by default."""
_TOP, _CHUNK = 64, 2**24


@dataclass(frozen=True)
class Plan:
    """The outputs that are kept of a teacher, and how they are cut out of what it returns."""

    outputs: tuple[CachedOutput, ...]
    layers: tuple[int, ...]  # hidden states
    top_k: int | None  # likeliest classes; `None` for all logits
    temperature: float  # of their probabilities
    outline: ModelSignature
    decodes_labels: bool  # whether the teacher reads the labels in its decoder

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"logits", *(["hidden_states"] if self.layers else [])})

    def cut(self, out: Any, batch: Mapping[str, Any], features: Sequence[Any]) -> dict[str, list[np.ndarray]]:
        """By column, the values of each row of a batch without its padding, in float32 or int32. Raises `ValueError`:
        outputs at other positions than the mask has, or padding that nothing tells of."""
        found: dict[str, list[np.ndarray]] = {}
        for output in self.outputs:
            if output.column in found:
                continue
            kind, _, number = output.name.rpartition("_")
            name = "logits" if output.name.startswith("top_") else output.name
            values = out["hidden_states"][int(number)] if kind == "hidden_state" else out[name]
            mask = self._mask(output, values, batch, features)
            own = values if mask is None else values[mask]
            columns = self._top(own) if output.name.startswith("top_") else {output.column: own.float()}
            for column, kept in columns.items():
                rows = kept.cpu() if mask is None else torch.split(kept.cpu(), mask.sum(1).tolist())
                found[column] = [row.numpy() for row in rows]
        return found

    def _top(self, logits: torch.Tensor) -> dict[str, torch.Tensor]:
        assert self.top_k is not None  # noqa: S101 - for mypy
        shape, indices, log_probabilities = logits.shape[:-1], [], []
        for rows in torch.split(logits.reshape(-1, logits.shape[-1]), max(_CHUNK // logits.shape[-1], 1)):
            top = rows.float().topk(self.top_k, dim=-1).indices
            indices.append(top)
            log_probabilities.append(coarse_log_probabilities(rows, top, self.temperature))
        return {
            "teacher_top_log_probabilities": torch.cat(log_probabilities).reshape(*shape, -1),
            "teacher_top_indices": torch.cat(indices).reshape(*shape, -1).int(),
        }

    def _mask(
        self, output: CachedOutput, values: torch.Tensor, batch: Mapping[str, Any], features: Sequence[Any]
    ) -> torch.Tensor | None:
        if output.positions is None:
            return None
        mask = own_positions(batch, output.positions, self.outline)
        if mask is not None and mask.shape != values.shape[:2]:
            raise ValueError(
                f"{self.outline.model_class} gives {output.name} of shape {tuple(values.shape)} for a batch whose positions "
                f"({output.positions}) have the shape {tuple(mask.shape)}, so padding cannot be cut off. Virtual tokens, "
                "for example of prompt tuning, add positions; train with the teacher itself."
            )
        name = name_in(batch, "input_ids" if "input_ids" in batch else "input_values")
        if output.positions != "decoded" and name_in(batch, "attention_mask") not in batch and name in batch:
            width = batch[name].shape[1]
            if any(isinstance(row, Mapping) and name in row and len(row[name]) != width for row in features):
                raise ValueError(
                    f"Rows of different lengths were padded, and no attention_mask tells where, so {output.name} has values "
                    "for padding too. Let the tokenizer or feature extractor return it: return_attention_mask=True."
                )
        return mask


def make_plan(
    teacher: Any, top_k: int | Literal["auto"] | None, temperature: float, hidden_states: Sequence[int],
    dtype: Literal["float16", "int8"],
) -> Plan:  # fmt: skip
    """Decides what is cached; arguments as of `cache_teacher_outputs`. Raises `ValueError`: a head that is not known,
    a layer out of range, or a `top_k` that makes no sense for the head."""
    outline, outputs = signature_of(teacher), []
    # A base model, without a head, has hidden states alone.
    predicts = any(outline.shape(name) is not None for name in ("logits", "start_logits"))
    if not predicts and not hidden_states:
        raise ValueError(f"{outline.model_class} returns no logits: nothing to cache but hidden_states=[...].")
    head = find_head(teacher, teacher) if predicts else None
    count = None if head is None else _top_k(head, outline, top_k)
    for name in () if head is None else head.outputs:
        shape, positions = outline.shape(name) or (), _positions(head)
        if count is None:
            outputs.append(CachedOutput(name, positions, shape[2:], dtype))
        else:
            outputs.append(CachedOutput("top_log_probabilities", positions, (count + 1,) * (len(shape) > 2), dtype))
            outputs.append(CachedOutput("top_indices", positions, (count,) * (len(shape) > 2), "int32"))
    if hidden_states:
        states = outline.states()
        bad = [layer for layer in hidden_states if not 0 <= layer < len(states)]
        if bad:
            raise ValueError(f"hidden_states={list(hidden_states)}: {outline.model_class} has 0 to {len(states) - 1}.")
        frames = frame_lengths(teacher) is not None
        for layer in sorted(set(hidden_states)):
            kind = "frames" if frames else "attended" if len(states[layer]) == 3 else None
            outputs.append(CachedOutput(f"hidden_state_{layer}", kind, states[layer][2:], dtype))  # type: ignore[arg-type]
    layers = tuple(sorted(set(hidden_states)))
    return Plan(tuple(outputs), layers, count, temperature, outline, isinstance(head, DecoderHead))


def _positions(head: Head | None) -> Any:
    if isinstance(head, FrameHead):
        return "attended" if head.lengths is None else "adapted_frames"
    if isinstance(head, DecoderHead):
        return "decoded"
    return "attended" if head is not None and (head.per_position or isinstance(head, SpanHead)) else None


def _top_k(head: Head, outline: ModelSignature, top_k: int | Literal["auto"] | None) -> int | None:
    classes = (outline.shape(head.outputs[0]) or (0,))[-1]
    if top_k == "auto":
        return _TOP if head.per_position and classes > LARGE else None
    if top_k is None:
        return None
    if head.refused - {"dkd"} or not head.softmax:
        raise ValueError(
            f"top_k={top_k} keeps the likeliest of classes that exclude one another, which {outline.model_class} does not "
            "predict. Leave top_k out."
        )
    if top_k >= classes:
        raise ValueError(f"top_k={top_k} of {classes} classes leaves none out. Give top_k=None to cache all logits.")
    return top_k


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
