# SPDX-License-Identifier: Apache-2.0
"""Distillation of hidden states, with learned projections where the widths differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from transformers import PreTrainedModel

from ..losses import cosine_distance, masked_mean, mean_squared_error, normalized_squared_error
from ..schedules import LayerSchedule
from .base import TrainingStep
from .layers import LayerObjective, Shape, layer_map, layers_of
from .projections import Projection, add_projection

_DISTANCES = {"mse": mean_squared_error, "cosine": cosine_distance, "normalized_mse": normalized_squared_error}


@dataclass(frozen=True, kw_only=True)
class HiddenStateKD(LayerObjective):
    """Distance between hidden states of matched layers.

    `mean over pairs (s, t) of d(W_s h_student[s], h_teacher[t])`, mean over the positions attended to. `W_s` is
    learned where the widths differ, and absent where they are equal. Romero et al., "FitNets" (2015); Jiao et al.,
    "TinyBERT" (2020); Sun et al., "Patient Knowledge Distillation for BERT Model Compression" (2019).

    Args:
        layers (`dict` or `str`, *optional*): `{student layer: teacher layer}`, numbered from 1, 0 for the embeddings;
            or, for layer `i` of `S` and `T` layers of the teacher, `"uniform"` (`round(i * T / S)`), `"last"`
            (`T - S + i`), `"skip"` (`i * (T // S)`) or `"dynamic"` (the nearest teacher layer, found anew in every
            batch; Xia et al., "CoFi", 2022). By default the layers that `make_student` copied, or uniform.
        embeddings (`bool`, defaults to `False`): compare the embeddings too, as `{0: 0}` does.
        distance (`str`, defaults to `"mse"`): `"mse"`, `"cosine"` (`1 - cos`) or `"normalized_mse"` (of states scaled to
            length 1, summed over the width).
        projection (`bool`, *optional*): learn `W_s` for every pair, or for none. By default where widths differ.
        active (callable, *optional*): which pairs count when: a schedule over layers such as `BottomUp()` or
            `TopDown()` of `hfkdq.schedules`. By default all of them, always.
        weight, teacher: as of every [`Objective`]; 1.0 and none by default.

    Raises:
        ValueError: an unknown distance; at `attach`, a layer out of range, models that return no hidden states, states
            over different numbers of positions, or widths that differ with `projection=False`.

    Example:
        ```python
        >>> from hfkdq import HiddenStateKD
        >>> HiddenStateKD(layers={1: 2, 2: 4}, distance="cosine").needs
        frozenset({'hidden_states'})

        ```
    """

    embeddings: bool = False
    distance: Literal["mse", "cosine", "normalized_mse"] = "mse"
    projection: bool | None = None
    active: LayerSchedule | None = None
    _places: Mapping[int, int] = field(init=False, repr=False, compare=False)

    def _attach_pairs(self, student: PreTrainedModel, states: Sequence[Shape], targets: Sequence[Shape]) -> None:
        if self.layers == "dynamic":
            pairs = {s: tuple(range(1, len(targets))) for s in range(1, len(states))}
        else:
            mapped = layer_map(self.layers, student, len(states) - 1, len(targets) - 1)
            pairs = {s: (t,) for s, t in mapped.items()}
        if self.embeddings:
            pairs = {0: (0,), **pairs}
        for s, ts in pairs.items():
            for t in ts:
                self._check_pair(student, s, states[s], t, targets[t])
        places = {}
        for s, ts in pairs.items():
            width, teacher_width = states[s][-1], targets[ts[0]][-1]
            if self.projection or (self.projection is None and width != teacher_width):
                places[s] = add_projection(student, s, partial(Projection, width, teacher_width), len(states))
        read = frozenset(pairs), frozenset(t for ts in pairs.values() for t in ts)
        self._keep(_pairs=tuple(pairs.items()), _places=places, _stack=layers_of(student))
        self._keep(_indices={"hidden_states": read})

    def _check_pair(self, student: PreTrainedModel, s: int, state: Shape, t: int, target: Shape) -> None:
        if state[:-1] != target[:-1]:
            raise ValueError(
                f"Hidden state {s} of the student and {t} of the teacher have the shapes {state} and {target} for the "
                "same example; all axes but the last must agree. Virtual tokens, for example of prompt tuning, add "
                "positions; feature maps of convolutions are for FeatureMapKD."
            )
        if self.projection is False and state[-1] != target[-1]:
            raise ValueError(
                f"projection=False, but layer {s} of the student is {state[-1]} wide and layer {t} of the teacher "
                f"{target[-1]}. Leave projection out, so that a map between them is learned."
            )

    def loss(self, step: TrainingStep) -> torch.Tensor:
        states, targets = step.student.hidden_states, step.teacher.hidden_states
        distance, mask = _DISTANCES[self.distance], self.state_mask(step.batch)
        terms = []
        for s, ts in self._pairs:
            state = states[self._places.get(s, s)]
            candidates = [masked_mean(distance(state, targets[t]), mask) for t in ts]
            terms.append(torch.stack(candidates).min() if len(ts) > 1 else candidates[0])
        if self.active is None:
            return self._mean_over_pairs(terms)
        values = torch.stack(terms)
        # A pair that does not count keeps a gradient of 0, so that every projection has one in every process.
        weights = values.new_tensor(self.active(step.progress, len(self._pairs)))
        return (values * weights).sum() / weights.sum().clamp(min=1e-12)
