# SPDX-License-Identifier: Apache-2.0
"""The base class of objectives, and the adapter for plain callables."""

from __future__ import annotations

import contextlib
import copy
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, ClassVar, Protocol

import torch
from transformers import PreTrainedModel

from ..fields import NOT_NEGATIVE, check_fields, check_rules, extremes, value_at
from ..modeling.forwards import base_of
from ..modeling.masks import Batch, Positions, batch_size, frame_lengths, position_mask
from ..modeling.tasks import written
from ..protocols import Adaptive
from ..schedules import Schedule
from .model_signature import ModelSignature, signature_of


@dataclass(frozen=True)
class TrainingStep:
    """One micro batch of a training, as a term of the loss sees it.

    Args:
        batch (`dict`): the batch, labels included.
        progress (`float`): how much of the training is done, in [0, 1].
        student (`ModelOutput`, *optional*): what the student returned; `loss` is the task loss.
        teacher (`ModelOutput`, *optional*): what the teacher returned; for an objective with `uses_all_teachers` a dict.
        seen (*optional*): what the objective's `capture()` gave.
    """

    batch: Batch
    progress: float = 0.0
    student: Any = None
    teacher: Any = None
    seen: Any = None

    def at(self, value: float | Schedule) -> float:
        """A number, or a schedule's value now."""
        return value_at(value, self.progress)


_RENAMED = {
    "before": "run_forward(passes, step)",
    "observe": "capture()",
    "every_teacher": "uses_all_teachers",
    "set_progress": "the progress of the step that loss(step) is given",
}


class Passes(Protocol):
    """Forward passes for an objective that runs the models itself: as they are wrapped, and under their autocast."""

    model: Any
    """The student without the wrappers of the training."""
    teacher_model: Any
    """The teacher without them; `None` where there are cached outputs alone."""

    def student(self, batch: Batch, needs: frozenset[str] = ..., indices: Any = ...) -> Any:
        """The student's output for a batch, in training mode, with a gradient if that is enabled."""

    def teacher(self, batch: Batch, needs: frozenset[str] = ..., indices: Any = ...) -> Any:
        """The output of this objective's teacher for a batch, without a gradient."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A term of the training loss.

    A term of your own is a subclass with `__call__`, or any callable with the same arguments. One that has schedules or
    looks inside the models defines `loss` instead.

    Args:
        weight (`float` or schedule, defaults to 1.0): factor of this term, or a function of training progress.
        teacher (`str`, *optional*): the name of the teacher to learn from, where there are several.

    Class attributes:
        needs (`frozenset` of `str`): what the models must return for it, out of `"loss"` (the student's own task
            loss), `"logits"`, `"hidden_states"` and `"attentions"`; `"outputs"` for whatever they return by themselves.
        uses_teacher (`bool`): whether it compares with a teacher.
        uses_all_teachers (`bool`): whether it is given a dict of all teachers and their outputs, by their names.
        schedules (`frozenset` of `str`): the settings that may be functions of progress.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"logits"})
    uses_teacher: ClassVar[bool] = True
    uses_all_teachers: ClassVar[bool] = False
    schedules: ClassVar[frozenset[str]] = frozenset({"weight"})

    weight: Annotated[float | Schedule, NOT_NEGATIVE] = 1.0
    teacher: str | None = None
    # Results of `attach`: no settings, and no part of the identity.
    is_sum: bool = field(default=False, init=False, repr=False, compare=False)
    _shifts_labels: bool = field(default=False, init=False, repr=False, compare=False)
    _frames: Callable[[torch.Tensor], torch.Tensor] | None = field(default=None, init=False, repr=False, compare=False)
    # Of "hidden_states" and "attentions", which entries are read of student and teacher.
    _indices: Mapping[str, tuple[frozenset[int], frozenset[int]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        check_rules(self)
        if self.teacher is not None and not self.uses_teacher:
            raise ValueError(f"{type(self).__name__} learns from no teacher; leave teacher={self.teacher!r} out.")

    def check_settings(self) -> None:
        """Refuses settings of another type than declared and numbers that are not finite; every trainer asks first.

        Raises:
            ValueError: naming the setting.
            TypeError: a method that the trainer would never call, in a class of the user's own.
        """
        self._check_methods()
        check_fields(self)
        for f in fields(self):
            value: Any = getattr(self, f.name, None)
            if f.init and isinstance(value, Objective):
                value.check_settings()
            elif f.name in self.schedules and (isinstance(value, str) or not all(map(math.isfinite, extremes(value)))):
                raise ValueError(
                    f"{type(self).__name__}: {f.name} must be a number, finite at every point of training, which {value!r} "
                    "is not."
                )

    def _check_methods(self) -> None:
        kind = type(self)
        old = [f"{name} is called {new} now" for name, new in _RENAMED.items() if hasattr(kind, name)]
        if old:
            raise TypeError(f"{kind.__name__}: {', '.join(old)}. Rename it; docs/objectives.md has an example.")
        defines = [c for c in kind.__mro__ if vars(c).keys() & {"loss", "__call__"} and c is not Objective]
        below = [c.__name__ for c in defines[1:] if "loss" in vars(c)]
        if below and "loss" not in vars(defines[0]):
            raise TypeError(
                f"{defines[0].__name__} defines __call__ over the loss of {below[0]}, so the trainer would not call it. Define "
                "loss(step) instead, and call super().loss(step) in it."
            )

    @property
    def name(self) -> str:
        """The name under which this term is logged: `"logit_kd"` for `LogitKD`."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(self).__name__).lower()

    def attach(self, student: PreTrainedModel, teacher: PreTrainedModel | ModelSignature | None) -> None:
        """Checks that this objective fits the two models, and prepares them; raises `ValueError` where it does not.

        Of a teacher whose outputs were cached there is an [`ModelSignature`] alone.
        """
        signature = signature_of(student)
        shifts = written(signature.names, signature.config) == "next tokens"
        self._keep(_shifts_labels=shifts, _frames=frame_lengths(base_of(student)), _indices={})

    def _keep(self, **found: Any) -> None:
        for name, value in found.items():
            object.__setattr__(self, name, value)

    @property
    def runs_first(self) -> bool:
        """Whether it runs the models itself, before they run on the plain batch."""
        return type(self).run_forward is not Objective.run_forward

    def run_forward(self, passes: Passes, step: TrainingStep) -> TrainingStep:
        """Runs the models on inputs of this objective's own; returns the step with their outputs.

        Outputs that are left `None` come from the plain batch.
        """
        return step

    def capture(self) -> AbstractContextManager[Any]:
        """A context, such as hooks, around the passes of teacher and student; its value is the step's `seen`."""
        return contextlib.nullcontext()

    def indices(self, need: str) -> tuple[frozenset[int], frozenset[int]] | None:
        """Indices of the entries of `"hidden_states"` or `"attentions"` that it reads, of both models; `None` for all."""
        return self._indices.get(need)

    def state_mask(self, batch: Batch) -> torch.Tensor | None:
        """Mask of the hidden states that count, `(batch, seq)`: positions attended to, or frames of audio."""
        return position_mask(batch, self._frames)

    def positions(self, batch: Batch) -> Positions:
        """Number of positions in `batch` that the term is a mean over; examples by default."""
        return batch_size(batch)

    def loss(self, step: TrainingStep) -> torch.Tensor:
        """The term for one step of a training: the mean over the `positions` of its batch, a scalar."""
        return self(step.student, step.teacher, step.batch)

    def __call__(self, student_out: Any, teacher_out: Any, batch: Batch, **more: Any) -> torch.Tensor:
        """The term for one batch.

        Args:
            student_out (`ModelOutput`): what the student returned; `loss` is the task loss.
            teacher_out (`ModelOutput` or `None`): what the teacher returned.
            batch (`dict`): the batch, labels included.
            more: `progress` and `seen` of [`TrainingStep`].

        Returns:
            `torch.Tensor`: the mean over the `positions(batch)` that count, a scalar.
        """
        if type(self).loss is Objective.loss:
            raise NotImplementedError(f"{type(self).__name__} must define __call__(student_out, teacher_out, batch).")
        return self.loss(TrainingStep(batch, student=student_out, teacher=teacher_out, **more))

    def copy(self) -> Objective:
        """The same objective, unattached, so that each trainer has its own."""
        twin = copy.copy(self)
        for f in fields(self):
            if not f.init:
                vars(twin).pop(f.name, None)
            elif isinstance(value := getattr(self, f.name), (Objective, Adaptive)):
                twin._keep(**{f.name: value.copy()})
        return twin

    def describe(self) -> dict[str, Any]:
        """Name and hyper-parameters, ready for JSON; without those that are off."""
        settings = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        told = {key: plain(value) for key, value in settings.items() if value is not None and value is not False}
        return {"name": type(self).__name__, **told}


def plain(value: Any) -> Any:
    """A setting as JSON has it."""
    if isinstance(value, Objective):
        return value.describe()
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (int, float, str, bool, type(None))):
        return value
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    # An address is another one in every process.
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


@dataclass(frozen=True, kw_only=True)
class _CallableObjective(Objective):
    """A plain callable as an objective, with a mean over examples."""

    needs = frozenset({"outputs"})

    function: Callable[[Any, Any, Batch], Any]
    label: str

    @property
    def name(self) -> str:
        return self.label

    def loss(self, step: TrainingStep) -> torch.Tensor:
        return self.function(step.student, step.teacher, step.batch)


def as_objective(objective: Any) -> Objective:
    """`objective` itself, or a plain callable `f(student_out, teacher_out, batch) -> mean over examples` wrapped.

    Raises:
        TypeError: neither an objective nor a callable.
    """
    if isinstance(objective, Objective):
        return objective
    if isinstance(objective, type) or not callable(objective):
        raise TypeError(
            f"objectives must hold objects such as LogitKD() or callables, got {objective!r}. "
            "Did you forget the parentheses?"
        )
    label = getattr(objective, "__name__", type(objective).__name__)
    return _CallableObjective(function=objective, label=label, weight=getattr(objective, "weight", 1.0))


def unique_names(objectives: Sequence[Objective]) -> list[str]:
    """The names under which objectives are logged; of several with one name the later ones are numbered."""
    names: list[str] = []
    for objective in objectives:
        count = sum(name == objective.name or name.startswith(f"{objective.name}_") for name in names)
        names.append(f"{objective.name}_{count + 1}" if count else objective.name)
    return names
