# SPDX-License-Identifier: Apache-2.0
"""Measures the sensitivity of each module to quantization, and suggests bits that fit into a size."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from ..bars import progress_bar
from ..losses.divergences import RULED_OUT, binary_logits, in_chunks, kl
from ..modeling.batches import Batches, check_batch, make_batches
from ..modeling.forwards import as_output, evaluating, return_dict_kwargs
from ..modeling.masks import output_mask
from ..modeling.own_modules import as_pretrained_
from ..specs import QuantizationSpec
from .adapters import has_adapters
from .allocation import BitAllocation, choose_bits
from .bit_choices import BitChoices
from .records import quantized_spec


def suggest_bits(
    model: PreTrainedModel,
    data: Batches | Dataset,
    *,
    budget: float | int,
    spec: QuantizationSpec | None = None,
    bits: Sequence[int] = (8, 4, 2),
    batch_size: int = 8,
    data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
    processing_class: Any = None,
    max_batches: int | None = 8,
) -> BitAllocation:
    r"""Chooses the bits of every module's weights, so that the outputs move least and all weights fit into a budget.

    The sensitivity of a module at a number of bits is how far the outputs of the model move on `data` when the weights of that
    module alone are quantized to it and everything else stays in floating point: the KL divergence between the
    predictions, mean over the positions that are no padding (Cai et al., "ZeroQ: A Novel Zero Shot Quantization
    Framework", 2020); where the model gives no classes, the mean squared error of its output (`logits` of a regression,
    the first tensor of a model without a head) relative to the variance of that output. The bits \\(b_i\\) minimise
    the sum \\(\sum_i \Omega_i(b_i)\\) under \\(\sum_i bytes_i(b_i) \le budget\\), as in Yao et al., "HAWQ-V3: Dyadic
    Neural Network Quantization" (2021): what one module does is taken to add to what the others do. See [`choose_bits`]
    for how.

    What counts into the budget are all weights (parameters with more than one axis) but those that `spec` names to be left
    in floating point. What else stays there takes 4 bytes each; the others are as stored: `bits / 8` bytes for each
    weight, packed within a tensor; 4 bytes (2 with `storage_dtype` of 16 bits) for each scale, of which there is one a
    channel, group or module; `bits / 8` for each zero point of affine weights; the \\(2^b\\) float32 values of a k-means
    codebook. Weights that several modules share count once. Biases and norms do not count.

    It takes a forward pass for every module, number of bits and batch, in eval mode. The model comes back as it was.

    Args:
        model (`PreTrainedModel`): a trained model in floating point.
        data (iterable of `dict` or `datasets.Dataset`): batches of model inputs, or examples to make them from, as for
            [`quantize`]; labels are not needed. The first `max_batches` are used, so shuffle sorted data.
        budget (`float` or `int`): a `float` in (0, 1] is a share of what the counted weights take in float32, an `int`
            is bytes.
        spec (`QuantizationSpec`, *optional*): everything but the bits. Bits that its `overrides`, `embedding_bits` or
            `head_bits` set stay as they are; its `weight_bits` does not matter otherwise. `QuantizationSpec()` by default.
        bits (sequence of `int`, defaults to `(8, 4, 2)`): the numbers of bits to choose from.
        batch_size, data_collator, processing_class: as of [`quantize`], for a `Dataset`; 8 examples in a batch by default.
        max_batches (`int`, *optional*, defaults to 8): batches to use; `None` for all.

    Returns:
        [`BitAllocation`]: bits, sensitivities and bytes, and the spec for [`quantize`] and [`QATCallback`].

    Raises:
        TypeError: `budget` is neither `float` nor `int`, or a batch is no dictionary.
        ValueError: no data, data or outputs that are not finite, a budget that is too small or larger than needed,
            bits that do not exist or do not go with the spec, or a model that already has fake quantizers.

    Example:
        ```python
        from hfkdq import QATCallback, suggest_bits

        allocation = suggest_bits(model, train.shuffle(seed=0), budget=0.15, processing_class=tokenizer)
        rich.print(allocation.table())
        trainer = Trainer(model, args, train_dataset=train, callbacks=[QATCallback(allocation.spec)])
        ```
    """
    spec = QuantizationSpec() if spec is None else spec
    _check(as_pretrained_(model), bits, max_batches)
    choices = BitChoices.of(model, spec, bits)
    limit = choices.limit(budget)
    batches = make_batches(model, data, batch_size, data_collator, processing_class)
    sample = list(islice(batches, max_batches))
    for number, batch in enumerate(sample, start=1):
        check_batch(batch, number)
    if not sample:
        raise ValueError("The data hold no batch, so nothing shows how far outputs move. Give at least one.")
    with evaluating(model):
        change = OutputChange(model, sample)
        sensitivity: dict[str, dict[int, float]] = {name: {} for name in choices.groups}
        jobs = [(name, width) for name in choices.groups for width in choices.schemes[name]]
        for name, width in progress_bar(jobs, desc="Measuring sensitivity", unit="choice"):
            with choices.quantized(name, width):
                sensitivity[name][width] = change.now()
            if not math.isfinite(sensitivity[name][width]):
                raise ValueError(
                    f"With {name} at {width} bits the outputs are not finite. Look for broken weights there, or leave the "
                    "module in floating point with exclude_modules."
                )
    chosen = choose_bits(choices.sizes, sensitivity, limit)
    widths = {name: chosen[first] for first, names in choices.groups.items() for name in names}
    return BitAllocation(
        bits=widths, sensitivity=sensitivity, sizes=choices.sizes, budget=limit, float_bytes=choices.float_bytes,
        spec=choices.spec_with(widths), measure=change.measure,
    )  # fmt: skip


def _check(model: PreTrainedModel, bits: Sequence[int], max_batches: int | None) -> None:
    if quantized_spec(model) is not None:
        raise ValueError(
            f"{type(model).__name__} already has fake quantizers, and sensitivities are judged by its outputs in floating point. "
            "Remove them first with strip_quantizers_(model)."
        )
    if has_adapters(model):
        raise ValueError(
            f"{type(model).__name__} has adapters, and what is quantized in the end are the merged weights. Merge them "
            "first with merge_adapters(model); the spec that comes out also fits the model with adapters."
        )
    known = QuantizationSpec.WEIGHT_BITS
    wrong = [width for width in bits if isinstance(width, bool) or width not in known]
    if wrong or len(set(bits)) != len(bits) or len(bits) < 2:
        raise ValueError(
            f"bits must be at least two different numbers of bits out of {', '.join(map(str, known))}, got {tuple(bits)}."
        )
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches must be at least 1, or None for all batches; got {max_batches!r}.")


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
                squares = None if logits else (rows.double() - kept.to(rows.device).double()).square()
                totals[i] += float((in_chunks(_kl, rows, kept) if squares is None else squares).sum())
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
        device = self.model.device
        inputs = {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items() if k not in skipped}
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
