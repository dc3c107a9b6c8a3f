# SPDX-License-Identifier: Apache-2.0
"""Distillation of relations between the examples of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from ..losses.features import mean_state
from ..losses.relations import relational_angle, relational_distance, similarity_distance
from ..modeling.forwards import base_of
from ..modeling.masks import Batch, frame_lengths, position_mask
from .base import Objective, TrainingStep
from .layers import LayerObjective, Shape
from .model_signature import ModelSignature


@dataclass(frozen=True, kw_only=True)
class SampleObjective(LayerObjective):
    """An objective on one vector per example from each model: the mean of its hidden states. The mean is taken over
    the positions attended to, the frames of audio, or the whole map. The models may differ in width, kind and
    tokenizer."""

    positions = Objective.positions  # examples
    _teacher_frames: Callable[[torch.Tensor], torch.Tensor] | None = field(init=False, repr=False, compare=False)

    def attach(self, student: PreTrainedModel, teacher: PreTrainedModel | ModelSignature | None) -> None:
        super().attach(student, teacher)
        self._keep(_teacher_frames=None if isinstance(teacher, ModelSignature) else frame_lengths(base_of(teacher)))

    def _default_layers(self, student_layers: int, teacher_layers: int) -> dict[int, int]:
        return {student_layers: teacher_layers}

    def _check_pair(self, student: PreTrainedModel, s: int, state: Shape, t: int, target: Shape) -> None:
        # Both were tried on texts of one length, which the mask of a batch will have too.
        if base_of(student).main_input_name == "input_ids" and state[1:-1] != target[1:-1]:
            raise ValueError(
                f"Hidden state {s} of the student and {t} of the teacher have the shapes {state} and {target} for texts of "
                "the same length. Virtual tokens, for example of prompt tuning, add positions that no mask tells of."
            )

    def represented(
        self, step: TrainingStep, places: Mapping[int, int] | None = None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The vectors of the examples of student and teacher, `(batch, width)` each, for every pair of layers.
        `places` has the index among the hidden states of the projection of a layer, where there is one."""
        mask, teacher_mask = self.state_mask(step.batch), self._teacher_mask(step.batch)
        for s, t in self._pairs:
            place = (places or {}).get(s, s)
            ours, theirs = step.student.hidden_states[place], step.teacher.hidden_states[t]
            yield mean_state(ours, mask), mean_state(theirs, teacher_mask)

    def _teacher_mask(self, batch: Batch) -> torch.Tensor | None:
        """The mask of the teacher's positions: it may read another text, or make other frames of the audio."""
        own = batch.get("teacher_attention_mask")
        if isinstance(own, torch.Tensor):
            return own.ne(0)
        return position_mask(batch, self._teacher_frames) if self._teacher_frames else self.state_mask(batch)


@dataclass(frozen=True, kw_only=True)
class RKD(SampleObjective):
    """Relational distillation: distances and angles between the examples of a batch are to be those of the teacher.

    `distance * mean over (i, j) of huber(|x_i - x_j| / mu)` plus `angle * mean over (i, j, k) of huber(cos of the angle at
    x_j)`, where `huber` compares the student's number with the teacher's, `mu` is the mean distance within a model, and
    an example's `x` is the mean of its hidden states. Park et al., "Relational Knowledge Distillation" (2019).

    Nothing is learned, as relations lie within a model. They also lie within a micro batch: cutting a batch into others
    (gradient accumulation, several processes) leaves relations out, and a batch of 1 has none, so its value is 0.

    Args:
        distance (`float`, defaults to 25.0): factor of the distances.
        angle (`float`, defaults to 50.0): factor of the angles, of which there are none below 3 examples.
        layers (`dict` or `str`, *optional*): as of [`HiddenStateKD`], not dynamic; by default the last layers of both.
        weight, teacher: as of every [`Objective`]; 1.0 and none by default.

    Raises:
        ValueError: a negative factor, or none that is larger than 0; at `attach`, a layer out of range or models that
            return no hidden states.

    Example:
        ```python
        >>> from hfkdq import RKD
        >>> RKD(angle=0.0).name
        'rkd'

        ```
    """

    distance: float = 25.0
    angle: float = 50.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.distance, self.angle) < 0 or not max(self.distance, self.angle) > 0:
            raise ValueError(
                f"RKD: distance and angle must not be negative, and one of them larger than 0, got {self.distance!r} and "
                f"{self.angle!r}."
            )

    def loss(self, step: TrainingStep) -> torch.Tensor:
        values = []
        for ours, theirs in self.represented(step):
            if self.distance:
                values.append(self.distance * relational_distance(ours, theirs))
            if self.angle:
                values.append(self.angle * relational_angle(ours, theirs))
        return torch.stack(values).sum(0).mean() / len(self._pairs)


@dataclass(frozen=True, kw_only=True)
class SimilarityPreservingKD(SampleObjective):
    """Examples of a batch that are alike to the teacher are to be alike to the student.

    `1/b^2 * |G_student - G_teacher|_F^2`, where `G` is `X X^T` with rows scaled to length 1 and row `i` of `X` the mean of the
    hidden states of example `i` of `b`. Tung and Mori, "Similarity-Preserving Knowledge Distillation" (2019), which has
    the flattened map in the place of the mean; texts of different length have none.

    Nothing is learned, as similarities lie within a model. They also lie within a micro batch: cutting a batch into
    others (gradient accumulation, several processes) leaves some out, and of a batch of 1 the value is 0.

    Args:
        layers (`dict` or `str`, *optional*): as of [`HiddenStateKD`], not dynamic; by default the last layers of both.
        weight (`float` or schedule, defaults to 1.0): factor of this term; the paper has 3000.
        teacher (`str`, *optional*): the name of the teacher, where there are several.

    Raises:
        ValueError: at `attach`, a layer out of range or models that return no hidden states.

    Example:
        ```python
        >>> from hfkdq import SimilarityPreservingKD
        >>> SimilarityPreservingKD(weight=3000.0).needs
        frozenset({'hidden_states'})

        ```
    """

    def loss(self, step: TrainingStep) -> torch.Tensor:
        return torch.stack([similarity_distance(*pair) for pair in self.represented(step)]).mean()
