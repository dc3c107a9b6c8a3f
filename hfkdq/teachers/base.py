# SPDX-License-Identifier: Apache-2.0
"""What a trainer asks of a teacher, whether it is frozen, cached, averaged or trained along."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch

from ..objectives.base import Objective


class Teacher:
    """Who a student learns from, during a training.

    Attributes:
        name (`str`): class of its model.
        fingerprint (`str`): what it is, for checkpoints.
        columns (set of `str`): the columns that batches must keep for it.
        learns (`bool`): whether it is trained along with the student; `objectives` is what it learns.
        first_bad_step (`int` or `torch.Tensor`): of the first output that was not finite since the last look; 0 if there
            was none.
    """

    name: str
    fingerprint: str
    columns: set[str]
    model: Any
    learns: ClassVar[bool] = False
    objectives: Sequence[Objective] = ()
    first_bad_step: int | torch.Tensor = 0

    def check(self, indices: Mapping[str, Collection[int] | None]) -> None:
        """Refuses, before training, hidden states or attentions that it cannot give."""

    def __call__(
        self, batch: Mapping[str, Any], needs: frozenset[str], indices: Mapping[str, Collection[int] | None], step: int
    ) -> Any:
        """Its output for a batch of optimizer step `step`; one that learns is run by the trainer instead."""
        raise NotImplementedError

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What one that learns is fed of a batch, labels included."""
        raise NotImplementedError

    def install(self) -> None:
        """Makes it ready for a training."""

    def remove(self) -> None:
        """Undoes what `install` did."""

    def update(self, student: Any, progress: float) -> None:
        """Takes in an optimizer step of the student."""

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint must hold of it."""
        return {}

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Goes on from a checkpoint."""

    def raise_if_bad(self, step: int) -> None:
        """Raises for the first step whose output was not finite; 0 is none."""
