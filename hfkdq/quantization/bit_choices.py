# SPDX-License-Identifier: Apache-2.0
"""The bits that each module of a model could have, their size in bytes, and the spec of a choice."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..specs import QuantizationScheme, QuantizationSpec, override_matches
from .convert import choose_modules
from .layers import quantized_class, swap_in_, swap_out_, weight_of, weight_quantizers_of
from .naming import head_modules, left_out_unasked
from .quantized_module import QuantizedModule


@dataclass(frozen=True)
class BitChoices:
    """The modules that a spec quantizes, by name, and the bits that each could have."""

    spec: QuantizationSpec
    modules: dict[str, nn.Module]
    free: frozenset[str]  # those whose bits the spec does not set
    groups: dict[str, list[str]]  # modules that share their weights, and so their bits, by the first of them
    schemes: dict[str, dict[int, QuantizationScheme]]  # by name and bits, the most first
    patterns: dict[str, str]  # a key of `overrides` that means the module alone, by its name
    sizes: dict[str, dict[int, int]] = field(default_factory=dict)  # bytes of each group, by the first name and bits
    float_bytes: int = 0  # of the weights of all groups in float32
    rest_bytes: int = 0  # of the weights that stay in float32 without the spec saying so

    @classmethod
    def of(cls, model: PreTrainedModel, spec: QuantizationSpec, bits: Sequence[int]) -> BitChoices:
        """The choices that `spec` and `bits` leave. Raises `ValueError`: the spec matches nothing, bits do not go with
        it, or a group size does not divide."""
        chosen, heads = choose_modules(model, spec), head_modules(model)
        modules = {name: module for name, (module, _) in chosen.items()}
        free = frozenset(n for n, module in modules.items() if not _is_set(spec, n, module, id(module) in heads))
        groups: dict[Any, list[str]] = {}
        for name, (module, scheme) in chosen.items():
            weight = weight_of(module)
            # A weight that is computed is a new tensor each time.
            shared = weight.data_ptr() if isinstance(weight, nn.Parameter) else id(module)
            alike = replace(scheme, activation_bits=None)
            groups.setdefault((shared, weight.shape, alike, name in free), []).append(name)
        schemes: dict[str, dict[int, QuantizationScheme]] = {
            name: {} if name in free else {scheme.weight_bits: scheme} for name, (_, scheme) in chosen.items()
        }
        found = cls(
            spec, modules, free, {names[0]: names for names in groups.values()}, schemes, _patterns(model, chosen),
            rest_bytes=4 * sum(left_out_unasked(model, spec, modules.values()).values()),
        )  # fmt: skip
        for width in sorted(bits, reverse=True):
            full = found.spec_with(dict.fromkeys(free, width))
            for name in free:
                found_scheme = full.scheme(name, modules[name], is_head=id(modules[name]) in heads)
                if found_scheme is not None:
                    schemes[name][width] = found_scheme
        return found._measured()

    def _measured(self) -> BitChoices:
        sizes: dict[str, dict[int, int]] = {name: {} for name in self.groups}
        weights = dict.fromkeys(self.groups, 0)
        for name in self.groups:
            for width in self.schemes[name]:
                with self.quantized(name, width) as module:
                    sizes[name][width] = stored_bytes(module)
                    weights[name] = sum(weight.numel() for _, weight in weight_quantizers_of(module).values())
        return replace(self, sizes=sizes, float_bytes=4 * sum(weights.values()))

    def limit(self, budget: float | int) -> int:
        """`budget` in bytes for the modules of `groups`: without what stays in float32. Raises `TypeError`: it is no
        number. Raises `ValueError`: no bits fit, or the most leave room."""
        if isinstance(budget, bool) or not isinstance(budget, (int, float)):
            raise TypeError(f"budget must be a share (float) or bytes (int), got {type(budget).__name__} {budget!r}.")
        if isinstance(budget, float) and not 0.0 < budget <= 1.0:
            raise ValueError(f"budget={budget!r} is no share of the float32 size, in (0, 1]. For bytes give an int.")
        rest, whole = self.rest_bytes, self.float_bytes + self.rest_bytes
        limit = int(budget * whole) if isinstance(budget, float) else budget
        smallest = rest + sum(min(sizes.values()) for sizes in self.sizes.values())
        largest = rest + sum(max(sizes.values()) for sizes in self.sizes.values())
        told = f"budget={budget!r} ({limit:,} of {whole:,} bytes in float32)"
        if limit < smallest:
            stays = f", of which {rest:,} stay in float32" if rest else ""
            raise ValueError(
                f"{told} is too small: the fewest bits take {smallest:,} bytes{stays}, a share of "
                f"{math.ceil(1e4 * smallest / whole) / 1e4}. Raise the budget or allow fewer bits."
            )
        if limit > largest:
            raise ValueError(
                f"{told} is more than the most bits take, {largest:,} bytes, a share of "
                f"{math.floor(1e4 * largest / whole) / 1e4}, so there is nothing to choose. Lower the budget, "
                "allow more bits, or quantize with the most alone."
            )
        return limit - rest

    def spec_with(self, bits: Mapping[str, int]) -> QuantizationSpec:
        overrides = dict(self.spec.overrides)
        for name in (name for name in self.modules if name in self.free):
            pattern = self.patterns[name]
            overrides[pattern] = {**(overrides.get(pattern) or {}), "weight_bits": bits[name]}
        return replace(self.spec, overrides=overrides)

    @contextmanager
    def quantized(self, name: str, width: int) -> Iterator[QuantizedModule]:
        """While it lasts, a group of modules computes with quantized weights; gives the first of them."""
        done: list[QuantizedModule] = []
        try:
            for member in self.groups[name]:
                scheme = replace(self.schemes[member][width], activation_bits=None)
                done.append(swap_in_(self.modules[member], member, scheme, self.spec))
            yield done[0]
        finally:
            for module in done:
                swap_out_(module)


def stored_bytes(module: QuantizedModule) -> int:
    """Bytes of the weights of a module: packed integers, scales, zero points and codebook."""
    total = 0
    for quantizer, weight in weight_quantizers_of(module).values():
        scheme, bits = quantizer.scheme, quantizer.bits
        total += math.ceil(weight.numel() * bits / 8)
        if bits == 16:  # no integers
            continue
        channels, groups, _ = quantizer.blocks(weight).shape
        total += channels * groups * (4 if scheme.storage_dtype == "float32" else 2)
        total += 0 if scheme.symmetric else math.ceil(channels * groups * bits / 8)
        total += 4 * 2**bits if scheme.weight_mapping == "kmeans" else 0
    return total


def _is_set(spec: QuantizationSpec, name: str, module: nn.Module, is_head: bool) -> bool:
    if any("weight_bits" in (changes or {}) and override_matches(pattern, name, module)
           for pattern, changes in spec.overrides.items()):  # fmt: skip
        return True
    own = spec.head_bits if is_head else spec.embedding_bits if isinstance(module, nn.Embedding) else None
    return own is not None


def _patterns(model: nn.Module, names: Mapping[str, Any]) -> dict[str, str]:
    """For every name a pattern that means this module alone: the name, unless it means others too."""
    modules = [(name, module) for name, module in model.named_modules() if quantized_class(module)]
    alone = {name: sum(override_matches(name, *entry) for entry in modules) == 1 for name in names}
    return {name: name if alone[name] else f"(?:{re.escape(name)})" for name in names}
