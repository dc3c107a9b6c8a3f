# SPDX-License-Identifier: Apache-2.0
"""Distance between the outputs of a model before and after a change of its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..losses.divergences import RULED_OUT, binary_logits, in_chunks, kl
from ..modeling.forwards import as_output, return_dict_kwargs
from ..modeling.masks import output_mask


class OutputChange:
    """Distance of the outputs of a model from those that it has now. The model, in eval mode, is run on every batch.
    `measure` names what `now` gives: `"KL divergence"` where the model classifies, `"relative squared error"` of
    numbers or states, `"KL divergence + relative squared error"` for detectors. Raises `ValueError`: the model gives
    no number, or one that is not finite."""

    def __init__(self, model: PreTrainedModel, batches: Sequence[Mapping[str, Any]]) -> None:
        self.model, self.batches = model, batches
        # Kept outside of the accelerator, where a vocabulary for every position would not fit.
        self._before = [[(logits, rows.cpu()) for logits, rows in self._run(batch)] for batch in batches]
        self._divisors = [self._divisor([parts[i] for parts in self._before]) for i in range(len(self._before[0]))]
        kinds = ["KL divergence" if logits else "relative squared error" for logits, _ in self._before[0]]
        self.measure = " + ".join(dict.fromkeys(kinds))

    def now(self) -> float:
        """The present distance, 0 where the outputs are the same."""
        totals = [0.0] * len(self._divisors)
        for batch, before in zip(self.batches, self._before, strict=True):
            for i, ((logits, rows), (_, kept)) in enumerate(zip(self._run(batch), before, strict=True)):
                totals[i] += float((in_chunks(_kl, rows, kept) if logits else _squares(rows, kept)).sum())
        return sum(max(total, 0.0) / divisor for total, divisor in zip(totals, self._divisors, strict=True))

    def _divisor(self, parts: Sequence[tuple[bool, Tensor]]) -> float:
        """Divisor of the sum over all batches: the number of rows, or the variance times the number of values."""
        if not all(bool(rows.isfinite().all()) for _, rows in parts):
            raise ValueError(
                f"{type(self.model).__name__} does not stay finite on the data, so there is nothing to compare with. "
                "Look for broken weights, or examples unlike those it was trained on."
            )
        if parts[0][0]:
            return max(sum(len(rows) for _, rows in parts), 1)
        values = torch.cat([rows.flatten() for _, rows in parts]).double()
        # Outputs that are all alike have no variance to measure by.
        return max(float(values.var(unbiased=False)), 1e-12) * max(values.numel(), 1)

    @torch.no_grad()
    def _run(self, batch: Mapping[str, Any]) -> list[tuple[bool, Tensor]]:
        """Compared parts of the output, a row for each position, and whether they are logits."""
        # A decoder may read its labels; elsewhere they would only cost a loss.
        skipped = () if getattr(self.model.config, "is_encoder_decoder", False) else ("labels",)
        inputs = {
            key: value.to(self.model.device) if torch.is_tensor(value) else value
            for key, value in batch.items()
            if key not in skipped
        }
        output = as_output(self.model(**inputs, **return_dict_kwargs(self.model)))
        return _parts(self.model, output, inputs)


def _parts(model: PreTrainedModel, output: Any, batch: Mapping[str, Any]) -> list[tuple[bool, Tensor]]:
    if output.get("start_logits") is not None:
        mask = batch.get("attention_mask")
        spans = torch.cat([output["start_logits"], output["end_logits"]])  # (2 * batch, seq)
        if mask is not None:
            spans = spans.masked_fill(mask.eq(0).repeat(2, 1), RULED_OUT)
        return [(True, spans)]
    logits = output.get("logits")
    if logits is None:
        values = [value for value in output.values() if torch.is_tensor(value) and value.is_floating_point()]
        states = next((value for value in values if value.dim() > 0), None)
        if states is None:
            raise ValueError(
                f"{type(model).__name__} gives no tensor by whose change its weights could be judged: its output has "
                f"{', '.join(output)}."
            )
        return [(False, _rows(model, states, batch))]
    boxes = output.get("pred_boxes")
    found = _class_logits(model, logits, boxes is not None)
    parts = [(found is not None, _rows(model, logits if found is None else found, batch))]
    return parts if boxes is None else [*parts, (False, boxes.flatten(0, 1))]


def _class_logits(model: PreTrainedModel, logits: Tensor, detects: bool) -> Tensor | None:
    """Logits with the classes of one decision along the last axis; `None` where they are plain numbers."""
    config = model.config
    problem = getattr(config, "problem_type", None)
    if problem == "regression" or logits.shape[-1] == 1:
        return None
    # Detectors trained with a focal loss decide about every class by itself.
    if problem == "multi_label_classification" or (detects and logits.shape[-1] == config.num_labels):
        return binary_logits(logits).flatten(0, -2)
    return logits.movedim(1, -1) if logits.dim() == 4 else logits  # images have their classes second


def _rows(model: PreTrainedModel, values: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """`values` as rows, one for each position that is no padding; the last axis stays."""
    mask = output_mask(model, batch, values.shape[:2]) if values.dim() == 3 else None
    return values.flatten(0, -2) if mask is None else values[mask]


def _kl(rows: Tensor, kept: Tensor) -> Tensor:
    """`KL(softmax(kept) || softmax(rows))` of each row."""
    # In float64: between a float model and its 8 bits float32 leaves little but rounding.
    return kl(kept.to(rows.device).double().log_softmax(-1), rows.double().log_softmax(-1))


def _squares(rows: Tensor, kept: Tensor) -> Tensor:
    return (rows.double() - kept.to(rows.device).double()).square()
