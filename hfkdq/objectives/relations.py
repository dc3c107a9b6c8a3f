# SPDX-License-Identifier: Apache-2.0
"""Distillation of the self-attention relations among queries, keys and values."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from transformers import PreTrainedModel

from ..fields import COUNT
from ..losses.features import masked_mean
from ..losses.relations import relation_kl
from ..modeling import find_layer_stack
from ..modeling.attention import KINDS, Seen, Sources, find_sources, looks_back_only, watching
from ..modeling.examples import probe
from ..modeling.forwards import base_of
from .base import Objective, TrainingStep
from .layers import LayerObjective, layer_map
from .model_signature import ModelSignature


@dataclass(frozen=True, kw_only=True)
class RelationKD(LayerObjective):
    """MiniLMv2: KL divergence between the self-attention relations of queries, keys and values of matched layers.

    The vectors `A` of a kind, side by side for all heads, are cut into `H` relation heads of width `d`, whatever the
    number of attention heads, and `R = softmax(A A^T / sqrt(d))` relates every position to every other. The value is
    `mean over pairs of layers of sum over kinds of 1/H * sum_h KL(R_teacher[h, i] || R_student[h, i])`, mean over the
    positions `i` attended to. Wang et al., "MiniLMv2: Multi-Head Self-Attention Relation Distillation for Compressing
    Pretrained Transformers" (2021).

    Widths, numbers of heads, and numbers of keys per query (grouped-query attention) may differ. The vectors are taken
    where they are computed, before rotary positions, so any attention implementation will do. Positions are related to
    those that attention itself could look at: not to padding, and where either model is causal not to later ones.
    Needs memory for `H` matrices of `seq * seq` in float32 per example, kind and model.

    In the project's own comparison it helped nowhere: docs/results/objectives.md.

    Args:
        layers (`dict` or `str`, *optional*): `{student layer: teacher layer}`, numbered from 1, or `"uniform"`, `"last"`
            or `"skip"`. By default the last layers of both; of large teachers the paper takes an upper middle one.
        relation_heads (`int`, *optional*): `H`, which divides the widths of queries, keys and values of both models. By
            default the largest such number up to the teacher's number of attention heads.
        relations (sequence of `str`, defaults to `("query", "key", "value")`): the kinds of vectors.
        weight, teacher: as of every [`Objective`]; 1.0 and none by default.

    Raises:
        ValueError: an unknown kind of vectors; at `attach`, a layer out of range, a model of which the vectors cannot be
            found, a teacher of which only outputs are cached, or relation heads that do not divide the widths.

    Example:
        ```python
        >>> from hfkdq import RelationKD
        >>> RelationKD(layers={6: 10}, relation_heads=48).name
        'relation_kd'

        ```
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    relation_heads: Annotated[int | None, COUNT] = None
    relations: tuple[str, ...] | list[str] = KINDS
    _sources: tuple[Sources, ...] = field(init=False, repr=False, compare=False)
    _head_count: int = field(init=False, repr=False, compare=False)
    _itself: bool = field(init=False, repr=False, compare=False)
    _causal: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        kinds = list(self.relations)
        if isinstance(self.relations, str) or not kinds or set(kinds) - set(KINDS) or len(set(kinds)) < len(kinds):
            raise ValueError(
                f"RelationKD: relations must be some of {', '.join(map(repr, KINDS))}, got {self.relations!r}."
            )

    def attach(self, student: PreTrainedModel, teacher: PreTrainedModel | ModelSignature | None) -> None:
        Objective.attach(self, student, teacher)
        if isinstance(teacher, ModelSignature):
            raise ValueError(
                "Cached outputs hold no queries, keys or values. Give the teacher itself, or cache its hidden states and "
                "use HiddenStateKD."
            )
        bases = base_of(student), base_of(teacher)
        stacks = [find_layer_stack(base) for base in bases]
        ends = len(stacks[0]), len(stacks[1])
        pairs = layer_map({ends[0]: ends[1]} if self.layers is None else self.layers, student, *ends)
        if any(0 in pair for pair in pairs.items()):
            raise ValueError(f"layers={self.layers!r}: layer 0 is the embeddings, without queries, keys or values.")
        sources, shapes = [], []
        for role, (model, stack) in enumerate(zip((student, teacher), stacks, strict=True)):
            numbers = {pair[role] for pair in pairs.items()}
            found = {
                (i, kind): source
                for i in sorted(numbers)
                for kind, source in find_sources(bases[role], f"{stack.name}.{i - 1}", stack.layers[i - 1]).items()
                if kind in self.relations
            }
            sources.append(found)
            shapes.append(self._try(model, found))
        for s, t in pairs.items():
            sizes = [found[i, self.relations[0]][1] for found, i in zip(shapes, (s, t), strict=True)]
            if sizes[0] != sizes[1]:
                raise ValueError(
                    f"Layer {s} of the student has {sizes[0]} positions and layer {t} of the teacher {sizes[1]} for "
                    "the same example, so their relations cannot be compared. Virtual tokens, for example of prompt "
                    "tuning, add positions. RKD compares examples instead."
                )
        heads = self._heads(bases[1], {shape[-1] for found in shapes for shape in found.values()})
        self._keep(
            _pairs=tuple(pairs.items()), _sources=tuple(sources), _head_count=heads, _itself=bases[0] is bases[1],
            _stack=list(stacks[0].layers),
            _causal=any(looks_back_only(b, found) for b, found in zip(bases, sources, strict=True)),
        )  # fmt: skip

    def _try(self, model: Any, sources: Sources) -> dict[tuple[int, str], torch.Size]:
        """Runs a model once, to see that what was found by its name is what runs."""
        seen: Seen = {}
        with watching(sources, seen):
            probe(model)
        missing = [f"{sources[key].name} of layer {key[0]}" for key in sources if key not in seen]
        if missing or any(x.dim() != 3 for x in seen.values()):
            raise ValueError(
                f"{type(base_of(model)).__name__} does not compute (batch, positions, width) by "
                f"{', '.join(missing) or 'its queries, keys and values'} when it runs, so RelationKD has nothing to look at. "
                "Use HiddenStateKD or AttentionKD."
            )
        return {key: x.shape for key, x in seen.items()}

    def _heads(self, teacher: Any, widths: set[int]) -> int:
        common = math.gcd(*widths)
        if self.relation_heads is None:
            most = getattr(teacher.config, "num_attention_heads", None)
            most = most if isinstance(most, int) else common
            return max(h for h in range(1, min(most, common) + 1) if common % h == 0)
        if common % self.relation_heads:
            raise ValueError(
                f"relation_heads={self.relation_heads} does not divide all widths of queries, keys and values: "
                f"{', '.join(map(str, sorted(widths)))}. Use a divisor of {common}, or leave relation_heads out."
            )
        return self.relation_heads

    @contextlib.contextmanager
    def capture(self) -> Iterator[tuple[Seen, Seen]]:
        """While it lasts, the queries, keys and values of student and teacher are kept as they are computed."""
        seen: tuple[Seen, Seen] = {}, {}
        # Where a student is its own teacher, the pass without gradient is the teacher's.
        modes = (True, False) if self._itself else (None, None)
        with watching(self._sources[0], seen[0], modes[0]), watching(self._sources[1], seen[1], modes[1]):
            yield seen

    def loss(self, step: TrainingStep) -> torch.Tensor:
        seen: tuple[Seen, Seen] = step.seen or ({}, {})
        ours, theirs = seen
        self._check_seen(ours, theirs)
        mask, values = self.state_mask(step.batch), []
        for s, t in self._pairs:
            # A teacher may lie on other devices, or be trained too.
            pairs = ((ours[s, kind], theirs[t, kind].detach().to(ours[s, kind].device)) for kind in self.relations)
            parts = [relation_kl(*pair, self._head_count, mask, self._causal) for pair in pairs]
            values.append(torch.stack(parts).sum(0))
        return masked_mean(self._mean_over_pairs(values), mask)

    def _check_seen(self, ours: Seen, theirs: Seen) -> None:
        expected = [set(sources) for sources in self._sources]
        if set(ours) != expected[0] or set(theirs) != expected[1]:
            raise RuntimeError(
                "RelationKD saw no queries, keys and values of this batch. Both models must run within `capture()`, what "
                "that gives be passed on as seen, and the teacher run without gradient where it is the student without "
                "adapters; a compiled model hides them."
            )
        if torch.is_grad_enabled() and not any(x.requires_grad for x in ours.values()):
            raise RuntimeError(
                "The queries, keys and values of the student lead back to no weights that are trained, so RelationKD "
                "teaches nothing. Set gradient_checkpointing_kwargs={'use_reentrant': False}, or train those layers."
            )
