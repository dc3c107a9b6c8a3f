# SPDX-License-Identifier: Apache-2.0
"""Measures the sensitivity of each module to quantization, and suggests bits that fit into a size."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel
from transformers.utils import logging

from ..modeling.batches import Batches, check_batch, make_batches
from ..modeling.forwards import evaluating
from ..modeling.own_modules import as_pretrained_
from ..specs import QuantizationSpec
from .adapters import has_adapters
from .allocation import BitAllocation, choose_bits
from .bit_choices import BitChoices
from .output_change import OutputChange
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
        batch_size (`int`, defaults to 8): examples in a batch, for a `Dataset`.
        data_collator (`Callable`, *optional*): makes a batch of examples, for a `Dataset`.
        processing_class (*optional*): a tokenizer that pads, for a `Dataset` without a `data_collator`.
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
    sample = _sample(make_batches(model, data, batch_size, data_collator, processing_class), max_batches)
    with evaluating(model):
        change = OutputChange(model, sample)
        sensitivity = _scan(choices, change)
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


def _sample(batches: Batches, count: int | None) -> list[Mapping[str, Any]]:
    sample = list(islice(batches, count))
    for number, batch in enumerate(sample, start=1):
        check_batch(batch, number)
    if not sample:
        raise ValueError("The data hold no batch, so nothing shows how far outputs move. Give at least one.")
    return sample


def _scan(choices: BitChoices, change: OutputChange) -> dict[str, dict[int, float]]:
    """The sensitivity of every group of modules at every number of bits."""
    found: dict[str, dict[int, float]] = {name: {} for name in choices.groups}
    jobs = [(name, width) for name in choices.groups for width in choices.schemes[name]]
    for name, width in logging.tqdm(jobs, desc="Measuring sensitivity", unit="choice"):
        with choices.quantized(name, width):
            found[name][width] = change.now()
        if not math.isfinite(found[name][width]):
            raise ValueError(
                f"With {name} at {width} bits the outputs are not finite. Look for broken weights there, or leave the "
                "module in floating point with exclude_modules."
            )
    return found
