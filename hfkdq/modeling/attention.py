# SPDX-License-Identifier: Apache-2.0
"""Where the layers of a model compute queries, keys and values, and how to look at them while it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .heads import ATTENTION_INPUTS
from .tasks import is_listed

KINDS = tuple(ATTENTION_INPUTS)


@dataclass(frozen=True)
class Source:
    """Where a layer computes one of the three: module `name` of `parent`, and which part of its output."""

    # The parent stays where it is when quantization or adapters replace the module itself.
    parent: nn.Module
    name: str
    part: int | None = None

    @property
    def causal(self) -> bool | None:
        """Whether attention here looks back only, where the module says so."""
        found = getattr(self.parent, "is_causal", getattr(self.parent, "is_decoder", None))
        return found if found is None else bool(found)


Sources = Mapping[tuple[int, str], Source]
Seen = dict[tuple[int, str], torch.Tensor]


def find_sources(model: Any, name: str, layer: nn.Module) -> dict[str, Source]:
    """The three sources of a layer, by the names that Transformers give them."""
    found: dict[str, list[Source]] = {kind: [] for kind in KINDS}
    for parent in layer.modules():
        children = dict(parent.named_children())
        for kind, names in ATTENTION_INPUTS.items():
            found[kind] += [Source(parent, child) for child in names if child in children]
        # GPT-2 and its kin; GPTBigCode uses the same name for another arrangement.
        if "c_attn" in children and hasattr(parent, "split_size") and not hasattr(parent, "multi_query"):
            for part, kind in enumerate(KINDS):
                found[kind].append(Source(parent, "c_attn", part))
    if any(len(sources) != 1 for sources in found.values()):
        counts = ", ".join(f"{len(sources)} for {kind}" for kind, sources in found.items())
        known = ", ".join(sorted({child for names in ATTENTION_INPUTS.values() for child in names}))
        raise ValueError(
            f"Layer {name} of {type(model).__name__} should have one module each that computes queries, keys and values, "
            f"named {known}, or the c_attn of GPT-2; found: {counts}. Use HiddenStateKD or AttentionKD."
        )
    return {kind: sources[0] for kind, sources in found.items()}


def looks_back_only(model: Any, sources: Sources) -> bool:
    """Whether attention is causal in any of the layers looked at."""
    # Some old models do not say; those of them that look back only are language models, or kin of GPT-2.
    silent = is_listed(type(model).__name__, "CAUSAL_LM")
    found = [(silent or x.part is not None) if x.causal is None else x.causal for x in sources.values()]
    return any(found)


@contextlib.contextmanager
def watching(sources: Sources, seen: Seen, gradient: bool | None = None) -> Iterator[None]:
    """Keeps what the sources compute, while it lasts: always, or only with or without gradient."""

    def keeper(key: tuple[int, str], part: int | None) -> Any:
        def keep(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            if gradient is None or torch.is_grad_enabled() == gradient:
                seen[key] = output if part is None else output.chunk(3, dim=-1)[part]

        return keep

    with contextlib.ExitStack() as hooks:
        for key, source in sources.items():
            module = getattr(source.parent, source.name)
            hooks.callback(module.register_forward_hook(keeper(key, source.part)).remove)
        yield
