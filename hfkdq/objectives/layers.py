# SPDX-License-Identifier: Apache-2.0
"""Pairs of layers of a student and a teacher, and what objectives over such pairs have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from ..facts import read_facts
from ..modeling import evenly_spaced_layers, find_layer_stack
from ..modeling.forwards import base_of
from ..modeling.masks import Batch, Positions, refuse_two_texts, valid_count
from ..protocols import Bypassable
from .base import Objective
from .model_signature import ModelSignature, signature_of

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class LayerObjective(Objective):
    """An objective on hidden states of matched layers, by default a mean over the positions attended to. Subclasses
    check a pair in `_check_pair`; `_pairs` holds the layers of student and teacher."""

    needs: ClassVar[frozenset[str]] = frozenset({"hidden_states"})

    layers: Mapping[int, int] | str | None = None
    _pairs: Sequence[tuple[int, Any]] = field(init=False, repr=False, compare=False)
    _stack: Sequence[nn.Module] = field(init=False, repr=False, compare=False)

    def attach(self, student: PreTrainedModel, teacher: PreTrainedModel | ModelSignature | None) -> None:
        super().attach(student, teacher)
        states, signature = signature_of(student).states(), signature_of(teacher)
        targets = signature.states()
        if signature.is_apart:
            targets = tuple((*states[0][:-1], t[-1]) if len(t) == len(states[0]) else t for t in targets)
        self._attach_pairs(student, states, targets)

    def _attach_pairs(self, student: PreTrainedModel, states: Sequence[Shape], targets: Sequence[Shape]) -> None:
        """Matches layers by the shapes of their hidden states, the embeddings first."""
        ends = len(states) - 1, len(targets) - 1
        pairs = layer_map(self._default_layers(*ends) if self.layers is None else self.layers, student, *ends)
        for s, t in pairs.items():
            self._check_pair(student, s, states[s], t, targets[t])
        read = frozenset(pairs), frozenset(pairs.values())
        self._keep(_pairs=tuple(pairs.items()), _stack=layers_of(student), _indices={"hidden_states": read})

    def _default_layers(self, student_layers: int, teacher_layers: int) -> Mapping[int, int] | str | None:
        return None

    def _check_pair(self, student: PreTrainedModel, s: int, state: Shape, t: int, target: Shape) -> None:
        """Raises `ValueError` where hidden states of these shapes cannot be compared."""

    def positions(self, batch: Batch) -> Positions:
        refuse_two_texts(batch, type(self).__name__)
        return valid_count(batch, self.state_mask(batch))

    def _mean_over_pairs(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        """Mean of one value for each pair, over the student layers that are not bypassed."""
        return mean_over_active_layers(torch.stack(list(values)), self._stack, [s for s, _ in self._pairs])


def layer_map(
    layers: Mapping[int, int] | str | None, student: PreTrainedModel, student_layers: int, teacher_layers: int
) -> dict[int, int]:
    """Resolves the argument `layers` of an objective to `{student layer: teacher layer}`, numbered from 1. Of `S`
    student layers and `T` of the teacher, layer `i` is paired with `round(i * T / S)` by `"uniform"`, `T - S + i` by
    `"last"` and `i * (T // S)` by `"skip"`. `None` means the layers that the student was copied from, which its
    configuration may record, or uniform. Raises `ValueError`: an unknown strategy, an empty map, or a layer out of
    range (0 stands for the embeddings); or a student that drops layers at random while it is trained."""
    dropped = getattr(student.config, "layerdrop", 0.0)
    if dropped:
        raise ValueError(
            f"The student drops layers at random in training (config.layerdrop={dropped}), so its layers cannot be "
            "compared with the teacher's one by one. Set student.config.layerdrop = 0."
        )
    if layers is None:
        origin = read_facts(student).get("student", {})
        kept = origin.get("layers", [])
        if len(kept) == student_layers and origin.get("teacher_layers") == teacher_layers:
            return dict(enumerate(kept, start=1))
        layers = "uniform"
    if layers == "uniform":
        return dict(enumerate(evenly_spaced_layers(student_layers, teacher_layers), start=1))
    if layers in ("last", "skip") and student_layers > teacher_layers:
        raise ValueError(
            f"layers={layers!r} needs a teacher with as many layers as the student or more; they have {teacher_layers} "
            f"and {student_layers}. Use 'uniform' or a dict."
        )
    if layers == "last":
        return {i: teacher_layers - student_layers + i for i in range(1, student_layers + 1)}
    if layers == "skip":
        return {i: i * (teacher_layers // student_layers) for i in range(1, student_layers + 1)}
    if isinstance(layers, str):
        raise ValueError(
            f"layers={layers!r} is no strategy. Use 'uniform', 'last', 'skip' or a dict such as {{1: 2, 2: 4}}; "
            "HiddenStateKD also takes 'dynamic'."
        )
    bad = {s: t for s, t in layers.items() if not (0 <= s <= student_layers and 0 <= t <= teacher_layers)}
    if bad or not layers:
        raise ValueError(
            f"layers={layers!r} must map student layers 0 to {student_layers} to teacher layers 0 to {teacher_layers} "
            f"(0 is the embeddings){'; out of range: ' + repr(bad) if bad else ', but is empty'}."
        )
    return dict(layers)


def layers_of(student: PreTrainedModel) -> list[nn.Module]:
    """The layers of the student, or none where it is no single stack of them."""
    try:
        return list(find_layer_stack(base_of(student)).layers)
    except ValueError:
        return []


def mean_over_active_layers(values: torch.Tensor, layers: Sequence[nn.Module], numbers: Sequence[int]) -> torch.Tensor:
    """Mean over the first axis, one entry for each student layer of `numbers` (from 1), of layers that are not
    bypassed. Pruning bypasses layers while it trains; their output is that of the layer before, which has an entry of
    its own. Entries that are left out keep a gradient of zero."""
    bypassed = {i for i, layer in enumerate(layers, start=1) if isinstance(layer, Bypassable) and layer.bypassed}
    active = [number not in bypassed for number in numbers]
    if all(active):
        return values.mean(0)
    weights = values.new_tensor(active, dtype=values.dtype).view(-1, *[1] * (values.dim() - 1))
    return (values * weights).sum(0) / weights.sum().clamp(min=1.0)
