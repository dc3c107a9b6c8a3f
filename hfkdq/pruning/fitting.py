# SPDX-License-Identifier: Apache-2.0
"""Finds the sparsity for a target of size, operations or time, by pruning copies of the model."""

from __future__ import annotations

import copy
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from ..bars import progress_bar
from ..modeling.examples import tried_on
from ..modeling.forwards import evaluating
from ..specs import PruningSpec
from .finishing import count_parameters, finish_, mask_without_data, rehearse
from .one_shot import check_prunable, targets_of

_HALVINGS = 10
_CALLS = 15


def fit_sparsity(
    model: PreTrainedModel,
    spec: PruningSpec,
    *,
    parameters: float | None = None,
    flops: float | None = None,
    latency: float | None = None,
    cost: Callable[[PreTrainedModel], float] | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> PruningSpec:
    """The spec with the smallest sparsity that brings a model down to a target.

    Copies of the model are pruned at random to sparsities found by bisection, and counted or timed; the model itself
    stays as it is. Which units go is left to the spec's criterion, so that the result is for [`prune`] and
    [`PruningCallback`] alike.

    Args:
        model (`PreTrainedModel`): the model to prune.
        spec (`PruningSpec`): what to prune; its sparsity is an upper bound.
        parameters (`float`, *optional*): at most this share of the parameters, in (0, 1), or this number of them.
        flops (`float`, *optional*): at most this share of the floating-point operations of a forward pass on `inputs`, or
            this number, as `torch.utils.flop_counter` counts them (a multiplication and an addition are two).
        latency (`float`, *optional*): at most this share of the time of a forward pass on `inputs`, in (0, 1): median of
            15 calls in turn with the unpruned model, in PyTorch and in this process.
        cost (`Callable`, *optional*): at most 1.0 of a measure of your own: from a pruned copy to a number, such as its
            time in ONNX Runtime divided by what you can afford.
        inputs (`dict`, *optional*): a batch, for `flops` and `latency`, and for a model that no made-up batch fits.

    Returns:
        `PruningSpec`: `spec` with the sparsity found.

    Raises:
        ValueError: not exactly one target, one out of range, a structure whose shapes stay, or a target that the largest
            sparsity does not reach.

    Example:
        ```python
        >>> from transformers import BertConfig, BertModel
        >>> from hfkdq import PruningSpec, fit_sparsity
        >>> config = BertConfig(hidden_size=32, num_attention_heads=2, intermediate_size=64, num_hidden_layers=2, vocab_size=50)
        >>> spec = PruningSpec(sparsity=0.9, structure="neuron")
        >>> round(fit_sparsity(BertModel(config), spec, parameters=0.9).sparsity, 2)
        0.43

        ```
    """
    targets = {"parameters": parameters, "flops": flops, "latency": latency, "cost": None if cost is None else 1.0}
    given = {name: value for name, value in targets.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"Give one target of parameters, flops, latency and cost, got {', '.join(given) or 'none'}.")
    ((name, target),) = given.items()
    if not (0 < target < math.inf) or (name == "latency" and target >= 1):
        raise ValueError(f"{name}={target!r} must be a share in (0, 1){'' if name == 'latency' else ' or a number'}.")
    if not spec.removes:
        raise ValueError(
            f"structure={spec.structure!r} with cut={spec.cut!r} leaves the shapes of the model, and so its {name}. Give the "
            "sparsity itself."
        )
    if name in ("flops", "latency") and inputs is None:
        raise ValueError(f"{name} is that of a forward pass: give inputs, a batch of the model.")
    batch = {k: v.to(model.device) if torch.is_tensor(v) else v for k, v in (inputs or {}).items()}
    measures: dict[str, Any] = {
        "parameters": count_parameters,
        "flops": partial(_count_operations, batch=batch),
        "latency": partial(_relative_time, model=model, batch=batch),
        "cost": cost,
    }
    measure: Callable[[PreTrainedModel], float] = measures[name]
    whole = 1.0 if name == "latency" else measure(model)  # which is measured as a share of the model's own
    bound = target * whole if name in ("parameters", "flops", "latency") and target < 1 else target
    spec = dataclasses.replace(spec, sparsity=0.95 if spec.sparsity is None else spec.sparsity)
    with tried_on(inputs, model):
        low, high = 0.0, _largest(model, spec)
        if measure(_pruned(model, spec, high)) > bound:
            raise ValueError(
                f"Even at sparsity {high:.3f} the {name} would be more than {bound:g} (of {whole:g}). Choose a larger target, "
                "or prune another structure besides."
            )
        for _ in progress_bar(range(_HALVINGS), desc=f"Finding the sparsity for {name}"):
            middle = (low + high) / 2
            low, high = (low, middle) if measure(_pruned(model, spec, middle)) <= bound else (middle, high)
    return dataclasses.replace(spec, sparsity=high)


def _largest(model: PreTrainedModel, spec: PruningSpec) -> float:
    """The largest sparsity up to that of the spec at which no target is left empty."""
    targets = targets_of(model, spec)
    fewest = min(target.units for target in targets)
    largest = min(spec.sparsity or 0.0, 1.0 - 1.0 / fewest)
    check_prunable(model, dataclasses.replace(spec, sparsity=largest), targets)
    rehearse(model, dataclasses.replace(spec, sparsity=largest))
    return largest


def _pruned(model: PreTrainedModel, spec: PruningSpec, sparsity: float) -> PreTrainedModel:
    pruned = copy.deepcopy(model)
    spec = dataclasses.replace(spec, sparsity=sparsity, ranking="local", plain_checkpoint=False)
    finish_(pruned, mask_without_data(pruned, spec), 0)
    return pruned


@torch.no_grad()
def _count_operations(model: PreTrainedModel, batch: dict[str, Any]) -> float:
    with FlopCounterMode(display=False) as counter, evaluating(model):
        model(**batch)
    return float(counter.get_total_flops())


@torch.no_grad()
def _relative_time(pruned: PreTrainedModel, model: PreTrainedModel, batch: dict[str, Any]) -> float:
    """Median over calls of the time of one model divided by that of the other, right after it."""
    times: list[list[float]] = [[], []]
    with evaluating(pruned, model):
        for _ in range(_CALLS + 2):
            for taken, each in zip(times, (pruned, model), strict=True):
                started = time.perf_counter()
                each(**batch)
                if each.device.type == "cuda":
                    torch.cuda.synchronize(each.device)
                taken.append(time.perf_counter() - started)
    own, whole = (statistics.median(taken[2:]) for taken in times)  # the first two calls warm up
    return own / whole
