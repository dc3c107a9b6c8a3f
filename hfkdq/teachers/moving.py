# SPDX-License-Identifier: Apache-2.0
"""Teachers that change while the student is trained: its own moving average, and a peer that learns from it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from ..objectives.base import Objective, plain
from ..schedules import Schedule, extremes, value_at
from .frozen import FrozenTeacher


@dataclass(frozen=True)
class EMATeacher:
    """Makes the student its own teacher: the moving average of its weights over the optimizer steps.

    `teacher = d * teacher + (1 - d) * student` after every step, from the student as it is when the trainer is made.
    Tarvainen and Valpola, "Mean teachers are better role models" (2017). It is in every checkpoint, and after training
    `trainer.teacher_model` is the averaged model.

    Args:
        decay (`float` or schedule, defaults to 0.999): `d`, in [0, 1].

    Raises:
        ValueError: a decay outside of [0, 1].

    Example:
        ```python
        >>> from hfkdq import EMATeacher
        >>> EMATeacher(decay=0.99)
        EMATeacher(decay=0.99)

        ```
    """

    decay: float | Schedule = 0.999

    def __post_init__(self) -> None:
        low, high = extremes(self.decay)
        if not 0.0 <= low <= high <= 1.0:
            raise ValueError(f"EMATeacher: decay must be in [0, 1], got {self.decay!r}.")


@dataclass(frozen=True, eq=False)
class CoTrainedTeacher:
    """A teacher that is trained along with the student, and learns from it: deep mutual learning.

    Zhang et al., "Deep Mutual Learning" (2018). Both run on every batch and take the same optimizer step; what one
    learns from the other has no gradient there. Its terms are logged as `teacher_task_loss` and so on. It is in every
    checkpoint; after training it is an ordinary model: `trainer.teacher_model.save_pretrained(folder)`.

    Args:
        model (`PreTrainedModel`): the peer.
        objectives (list of objectives, *optional*): what it learns, with the student as its teacher. By default
            `[TaskLoss(), LogitKD(temperature=1.0)]`, as in the paper.

    Example:
        ```python
        trainer = DistillationTrainer(student, args, teacher_model=CoTrainedTeacher(other),
                                      objectives=[TaskLoss(), LogitKD(temperature=1.0)], ...)
        ```
    """

    model: Any
    objectives: Sequence[Objective] | None = None


class AveragedTeacher(FrozenTeacher):
    """A copy of the student that follows it.

    Args:
        model (`PreTrainedModel`): the copy; frozen in place.
        accelerator (`Accelerator`): that of the trainer.
        label_names (list of `str`): columns that are not fed to it.
        decay (`float` or schedule): how much of the average stays in a step.
    """

    def __init__(self, model: Any, accelerator: Accelerator, label_names: list[str], decay: float | Schedule) -> None:
        super().__init__(model, accelerator, label_names)
        self.decay = decay
        # Its weights differ from step to step; what it is does not.
        self.fingerprint = f"{self.name}, the average of the student with decay {plain(decay)}"
        self.averaged = model

    @torch.no_grad()
    def update(self, student: Any, progress: float) -> None:
        """Moves the average towards the student, after an optimizer step."""
        decay = value_at(self.decay, progress)
        parameters, buffers = dict(student.named_parameters()), dict(student.named_buffers())
        for name, average in self.averaged.named_parameters():
            average.lerp_(parameters[name].detach().to(average), 1.0 - decay)
        for name, buffer in self.averaged.named_buffers():
            buffer.copy_(buffers[name])

    def state(self) -> dict[str, torch.Tensor]:
        return dict(self.averaged.state_dict())

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        self.averaged.load_state_dict(tensors)


def averaged_copy(student: Any) -> Any:
    """The model that the average starts as."""
    return copy.deepcopy(student).eval().requires_grad_(False)
