# SPDX-License-Identifier: Apache-2.0
"""Compares an ONNX file with the torch model it came from, on real or random batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..measuring.evaluation import Runner
from ..modeling.batches import check_columns
from ..modeling.forwards import return_dict_kwargs
from ..modeling.masks import Batch
from .inputs import Tensors, is_label, model_inputs
from .rope import rope_by_length

Collator = Callable[[list[Any]], Batch]
# Enough to see every code path and a few hundred logits; more would only cost time.
MAX_BATCHES = 8
# Decoding token by token takes a call for each.
MAX_ROWS, MAX_TOKENS = 2, 32
COMPARE_BATCH_SIZE = 8


@dataclass(frozen=True)
class Parity:
    """How far an ONNX file is from the torch model, over all outputs and all positions that are not padding.

    `top1_agreement` is the share of positions where both have the largest logit at the same place, `None` without classes;
    `batches` has for each batch the shapes of its inputs and its largest difference, `by_output` for each output its largest
    difference and its largest value.
    """

    samples: int
    max_abs_diff: float
    mean_abs_diff: float
    max_abs_logit: float
    top1_agreement: float | None
    batches: list[dict[str, Any]]
    by_output: dict[str, dict[str, float]]


def sample_batches(batches: Iterator[Batch], model: PreTrainedModel, name: str = "calibration") -> list[Tensors]:
    """What the model takes of the first batches of an iterator, as many as a comparison needs.

    `TypeError` if one of them is no batch, `ValueError` if there is none, or it has nothing for the model.
    """
    samples = list(islice(batches, MAX_BATCHES))
    if not samples:
        raise ValueError(f"{name} is empty: there is nothing to compare the exported file on. Give it some batches.")
    wrong = next((batch for batch in samples if not isinstance(batch, Mapping)), None)
    if wrong is not None:
        raise TypeError(
            f"{name} must be a data set with a length or an iterable of batches (dictionaries of tensors), "
            f"got an iterable of {type(wrong).__name__}."
        )
    for batch in samples:
        check_columns(batch, batch, model)
    return [model_inputs(model, batch) for batch in samples]


def beginning(batch: Mapping[str, Tensor]) -> Tensors:
    """The first tokens of the first texts of a batch: enough to see a cache at work."""
    texts = "decoder_input_ids" if "decoder_input_ids" in batch else "input_ids"
    length = batch[texts].shape[1] if texts in batch else 0

    def cut(name: str, value: Tensor) -> Tensor:
        rows = value[:MAX_ROWS]
        is_text = name.startswith("decoder_") == (texts != "input_ids") and rows.ndim == 2 and rows.shape[1] == length
        return rows[:, :MAX_TOKENS] if is_text else rows

    return {name: cut(name, value) for name, value in batch.items() if not is_label(name)}


@torch.no_grad()
def run_torch(model: PreTrainedModel, batches: Iterable[Batch]) -> list[Tensors]:
    """The outputs of a model, in eval mode on the CPU, on each batch by name; labels are left out.

    `TypeError` if they have no names.
    """
    with rope_by_length(model):
        found = [model(**model_inputs(model, batch), **return_dict_kwargs(model)) for batch in batches]
    unnamed = next((one for one in found if not isinstance(one, Mapping)), None)
    if unnamed is not None:
        raise TypeError(
            f"{type(model).__name__} returns a {type(unnamed).__name__}, so the outputs of a file would have no names. Let its "
            'forward pass return a dictionary, such as {"logits": logits}.'
        )
    return [{name: value for name, value in one.items() if isinstance(value, Tensor)} for one in found]


def compare(runner: Runner, batches: Iterable[Batch], expected: Iterable[Mapping[str, Tensor]]) -> Parity:
    """Runs the exported files on batches and measures, in float64, how far they are from what `run_torch` gave.

    `RuntimeError` if one of them gives NaN or infinity, or the file has an output that torch has not, or of another shape.
    """
    samples, total, count, agree, places = 0, 0.0, 0, 0, 0
    by_output: dict[str, dict[str, float]] = {}
    rows: list[dict[str, Any]] = []
    for batch, wanted in zip(batches, expected, strict=True):
        inputs = {name: torch.as_tensor(value).cpu() for name, value in batch.items()}
        outputs = in_same_order(runner(inputs), wanted)
        samples += len(next(iter(inputs.values())))
        largest = 0.0
        # Positions of an encoder-decoder are those of the decoder.
        mask = batch.get("decoder_attention_mask" if "decoder_input_ids" in batch else "attention_mask")
        for name, array in outputs.items():
            want, got = _aligned(name, wanted, array, mask)
            difference = (want - got).abs()
            largest = max(largest, float(difference.max()))
            own = by_output.setdefault(name, {"max_abs_diff": 0.0, "max_abs": 0.0})
            own["max_abs_diff"] = max(own["max_abs_diff"], float(difference.max()))
            own["max_abs"] = max(own["max_abs"], float(want.abs().max()))
            total, count = total + float(difference.sum()), count + difference.numel()
            if name == "logits" and want.shape[-1] > 1:
                agree += int((want.argmax(-1) == got.argmax(-1)).sum())
                places += want[..., 0].numel()
        shapes = {name: list(value.shape) for name, value in inputs.items()}
        rows.append({"inputs": shapes, "max_abs_diff": largest})
    return Parity(
        samples=samples, max_abs_diff=max(row["max_abs_diff"] for row in rows), mean_abs_diff=total / count,
        max_abs_logit=max(own["max_abs"] for own in by_output.values()),
        top1_agreement=agree / places if places else None, batches=rows, by_output=by_output,
    )  # fmt: skip


def in_same_order(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The outputs of a detector with its queries in the order of others, as their order is free; other outputs as they are."""
    names = [name for name in ("logits", "pred_boxes") if name in got and name in wanted]
    if len(names) < 2 or any(got[name].shape != wanted[name].shape for name in names):
        return dict(got)
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:  # without it detectors are not trained either
        return dict(got)
    theirs, ours = (torch.cat([one[name].double() for name in names], -1) for one in (wanted, got))
    # The sum of squares that PyTorch takes for many queries is off by 3e-4, more than queries of a young detector differ by.
    distances = torch.cdist(theirs, ours, compute_mode="donot_use_mm_for_euclid_dist").nan_to_num(nan=1e9)
    order = torch.stack([torch.as_tensor(linear_sum_assignment(one)[1]) for one in distances.numpy()])
    rows = torch.arange(len(order))[:, None]
    return {name: value[rows, order] if name in names else value for name, value in got.items()}


def _aligned(name: str, expected: Mapping[str, Tensor], got: Tensor, mask: Any) -> tuple[Tensor, Tensor]:
    """An output of both as float64, without the positions that are padding."""
    if name not in expected:
        raise RuntimeError(f"The exported file has an output {name!r}; the torch model gives {', '.join(expected)}.")
    want = expected[name]
    if want.shape != got.shape:
        raise RuntimeError(
            f"Output {name!r} has shape {tuple(got.shape)} in the exported file, {tuple(want.shape)} in torch."
        )
    if mask is not None and want.ndim > 2 and want.shape[:2] == mask.shape:
        valid = torch.as_tensor(mask).cpu().bool()
        want, got = want[valid], got[valid]
    for owner, tensor in (("The torch model", want), ("The exported file", got)):
        if not tensor.isfinite().all():
            raise RuntimeError(f"{owner} gives NaN or infinity in {name!r}. Nothing was exported.")
    return want.double(), got.double()
