# SPDX-License-Identifier: Apache-2.0
"""The student's own moving average as its teacher."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from ..objectives.base import plain
from ..schedules import Schedule, extremes, value_at
from .base import Teacher, TeacherSource
from .frozen import FrozenTeacher


@dataclass(frozen=True)
class EMATeacher(TeacherSource):
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

    changes = copies_student = True
    decay: float | Schedule = 0.999

    def __post_init__(self) -> None:
        low, high = extremes(self.decay)
        if not 0.0 <= low <= high <= 1.0:
            raise ValueError(f"EMATeacher: decay must be in [0, 1], got {self.decay!r}.")

    def model_for(self, student: Any, student_is_remade: bool) -> Any:
        return copy.deepcopy(student).eval().requires_grad_(False)

    def place(self, model: Any, student: Any, accelerator: Accelerator, label_names: list[str]) -> Teacher:
        return AveragedTeacher(model, accelerator, label_names, self.decay)


class AveragedTeacher(FrozenTeacher):
    """A copy of the student that follows it; `decay` is the share of the average that stays in a step."""

    def __init__(self, model: Any, accelerator: Accelerator, label_names: list[str], decay: float | Schedule) -> None:
        super().__init__(model, accelerator, label_names)
        self.decay = decay
        # The weights differ from step to step; the identity does not.
        self.fingerprint = f"{self.name}, the average of the student with decay {plain(decay)}"

    @torch.no_grad()
    def update(self, student: Any, progress: float) -> None:
        """Moves the average towards the student, after an optimizer step."""
        decay = value_at(self.decay, progress)
        parameters, buffers = dict(student.named_parameters()), dict(student.named_buffers())
        for name, average in self.model.named_parameters():
            average.lerp_(parameters[name].detach().to(average), 1.0 - decay)
        for name, buffer in self.model.named_buffers():
            buffer.copy_(buffers[name])

    def state(self) -> dict[str, torch.Tensor]:
        return dict(self.model.state_dict())

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        self.model.load_state_dict(tensors)
