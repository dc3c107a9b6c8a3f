# SPDX-License-Identifier: Apache-2.0
"""What quantization leaves in floating point, and its share of a model."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn
from transformers.utils import logging

from ..facts import AUXILIARY, NOTABLE, left_of
from ..specs import QuantizationSpec, module_matches, override_matches
from .adapters import plain_modules
from .naming import quantized_modules
from .quantized_module import QuantizedModule

logger = logging.get_logger(__name__)


def left_in_float(model: nn.Module, chosen: Collection[nn.Module] = ()) -> dict[str, int]:
    """How many weights, parameters with more than one axis, are in floating point, by the name of their module.
    `chosen` are modules that are going to be quantized; those that are count without."""
    quantized = [*quantized_modules(model).values(), *chosen]
    inside = {id(parameter) for module in quantized for parameter in module.parameters()}
    found: dict[str, int] = {}
    for name, module in plain_modules(model):
        if name.startswith(AUXILIARY):
            continue
        own = {} if isinstance(module, QuantizedModule) else dict(module.named_parameters(recurse=False))
        free = [p for p in own.values() if p.dim() > 1 and p.is_floating_point() and id(p) not in inside]
        inside |= set(map(id, free))  # what modules share counts once
        if free:
            found[name] = sum(parameter.numel() for parameter in free)
    return found


def left_out_unasked(model: nn.Module, spec: QuantizationSpec, chosen: Collection[nn.Module] = ()) -> dict[str, int]:
    """`left_in_float` without what the spec itself leaves out by name."""
    if spec.target_modules is not None:
        return {}
    off = [pattern for pattern, changes in spec.overrides.items() if changes is None]
    modules = dict(plain_modules(model))
    return {
        name: count
        for name, count in left_in_float(model, chosen).items()
        if not module_matches(name, spec.exclude_modules)
        and not any(override_matches(each, name, modules[name]) for each in off)
    }


def describe_left(model: nn.Module) -> dict[str, Any]:
    """`{"share": of all parameters, "modules": the largest eight by name}`, JSON-ready."""
    return left_of(left_in_float(model), _size(model))


def _size(model: nn.Module) -> int:
    return max(
        1, sum(parameter.numel() for name, parameter in model.named_parameters() if not name.startswith(AUXILIARY))
    )


def tell_left_in_float(model: nn.Module, spec: QuantizationSpec) -> None:
    """Warns where a spec leaves a notable part of a prepared model in floating point without being asked to."""
    found = left_out_unasked(model, spec)
    share = sum(found.values()) / _size(model)
    if share <= NOTABLE:
        return
    largest = sorted(found, key=found.__getitem__, reverse=True)
    kinds = dict(plain_modules(model))
    told = ", ".join(f"{name} ({type(kinds[name]).__name__}, {found[name]:,})" for name in largest[:4])
    logger.warning_once(  # type: ignore[attr-defined]
        f"{share:.0%} of the parameters of {type(model).__name__} stay in floating point, as hfkdq has no fake quantizers "
        f"for their modules: {told}{f' and {len(largest) - 4} more' if len(largest) > 4 else ''}. Name them in "
        "exclude_modules if that is meant."
    )
