# SPDX-License-Identifier: Apache-2.0
"""What a layer computes because of its number, kept when it gets another one."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .heads import ATTENTION_INPUTS

NUMBERS = ("layer_idx", "layer_id", "seed")
"""Under which names modules keep the number of their layer."""


class PerLayer(list[int]):
    """Remainders that a period of layers would leave, written out: what `number % period` is for each layer.

    A configuration of ModernBERT in Transformers 4 has a period alone. Where the layers that are left have none, this stands
    in its place; in `config.json` it is a list, with which plain `from_pretrained` fails.
    """

    def __rmod__(self, number: int) -> int:
        return self[number]


@torch.no_grad()
def refit_(layer: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Folds into the weights of `layer` what it computed as `old`, under its former number, and would not as `new`.

    `new` is a layer that was built under the new number; `layer` may be the one or the other. The scale of attention (GPT-2,
    ImageGPT) goes into the queries, the lambda of DiffLlama into its vectors and its output layer.
    """
    places, former = dict(layer.named_modules()), dict(old.named_modules())
    for name, built in new.named_modules():
        if name not in former or name not in places:
            continue
        module = places[name]
        before, after = _numbers_of(former[name]), _numbers_of(built)
        if before.get("scaling") != after.get("scaling"):
            _scale_queries_(module, before["scaling"] / after["scaling"])
        if before.get("lambda_init") != after.get("lambda_init"):
            _shift_lambda_(module, before["lambda_init"], after["lambda_init"])
        own = vars(built)
        number = [
            own[key] for key in NUMBERS if key in own
        ]  # under another name where BigBird changed the class as it ran
        own = dict.fromkeys(NUMBERS, *number[:1]) | own
        for key in ("scaling", "lambda_init", *NUMBERS):
            if key in vars(module) and key in own:
                setattr(module, key, own[key])


def _numbers_of(module: nn.Module) -> dict[str, Any]:
    """The numbers of an attention that may follow from the number of its layer."""
    found = {key: vars(module)[key] for key in ("scaling", "lambda_init") if isinstance(vars(module).get(key), float)}
    # Transformers 4 divides while it runs, and with eager attention alone.
    divides = getattr(module, "scale_attn_by_inverse_layer_idx", False) and "scaling" not in found
    if divides and (module.config._attn_implementation == "eager" or module.reorder_and_upcast_attn):  # type: ignore[union-attr]
        found["scaling"] = 1.0 / (module.layer_idx + 1)  # type: ignore[operator]
    return found


def _scale_queries_(module: nn.Module, factor: float) -> None:
    names = ("q_attn", *ATTENTION_INPUTS["query"], "c_attn")
    found = next(child for name in names if isinstance(child := getattr(module, name, None), (nn.Linear, Conv1D)))
    width = getattr(module, "split_size", None) if found is getattr(module, "c_attn", None) else None
    for values in (found.weight, found.bias):
        if values is not None:
            values[..., :width] *= factor


def _shift_lambda_(module: Any, old: float, new: float) -> None:
    """`exp(q1 k1) - exp(q2 k2) + init` stays what it was, and so does what `1 - init` scales."""
    added, q, k = (old - new, module.lambda_q1, module.lambda_k1)
    if added < 0:
        added, q, k = (new - old, module.lambda_q2, module.lambda_k2)
    product = float((q.double() * k.double()).sum())
    missing = math.log(math.exp(product) + added) - product
    longer, other = (q, k) if float(q.norm()) >= float(k.norm()) else (k, q)
    direction: Tensor = longer.double() / longer.double().square().sum()
    other += (missing * direction).to(other.dtype)
    module.o_proj.weight *= (1 - old) / (1 - new)
