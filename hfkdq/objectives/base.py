# SPDX-License-Identifier: Apache-2.0
"""The protocol of an objective, and the adapter that makes one of a plain callable.

An objective knows two models and a batch; it knows neither the trainer nor how its mean is weighted over a window.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..forwards import base_of
from ..schedules import Schedule, extremes, value_at

Batch = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A term of the training loss.

    A term of your own is a subclass with `__call__`, or any callable with the same arguments.

    Args:
        weight (`float` or schedule, defaults to 1.0): factor of this term, or a function of training progress.

    Class attributes:
        needs (`frozenset` of `str`): what the models must return for it, out of `"loss"` (the student's own task
            loss), `"logits"`, `"hidden_states"` and `"attentions"`.
        uses_teacher (`bool`): whether it compares with a teacher.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"logits"})
    uses_teacher: ClassVar[bool] = True

    weight: float | Schedule = 1.0
    # What `attach` found out about the pair; not part of the objective's identity.
    _found: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if extremes(self.weight)[0] < 0:
            raise ValueError(f"{type(self).__name__}: weight must not be negative, got {self.weight!r}.")

    @property
    def name(self) -> str:
        """The name under which this term is logged: `"logit_kd"` for `LogitKD`."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(self).__name__).lower()

    def attach(self, student: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
        """Checks that this objective fits the two models, and prepares them; raises `ValueError` where it does not."""
        self._found.update(shifts_labels=type(base_of(student)).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())

    def set_progress(self, progress: float) -> None:
        """Tells how much of the training is done, in [0, 1], for the schedules."""
        self._found["progress"] = progress

    def current(self, value: float | Schedule) -> float:
        """A number or schedule of this objective at the present progress."""
        return value_at(value, self._found.get("progress", 0.0))

    def indices(self, need: str) -> tuple[frozenset[int], frozenset[int]] | None:
        """Which entries of `"hidden_states"` or `"attentions"` it reads, of student and teacher; `None` for all."""
        return self._found.get(need)

    def positions(self, batch: Batch) -> torch.Tensor | int:
        """Number of positions in `batch` that `__call__` takes its mean over; examples by default."""
        return batch_size(batch)

    def __call__(self, student_out: Any, teacher_out: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | int]:
        """The term for one batch.

        Args:
            student_out (`ModelOutput`): what the student returned; `loss` is the task loss.
            teacher_out (`ModelOutput` or `None`): what the teacher returned.
            batch (`dict`): the batch, labels included.

        Returns:
            The mean over the valid positions and their number, the same as `positions(batch)`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define __call__(student_out, teacher_out, batch).")

    def copy(self) -> Objective:
        """The same objective, unattached, so that each trainer has its own."""
        twin = copy.copy(self)
        object.__setattr__(twin, "_found", {})
        return twin

    def describe(self) -> dict[str, Any]:
        """Name and hyper-parameters, ready for JSON."""
        settings = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        return {"name": type(self).__name__, **{key: _plain(value) for key, value in settings.items()}}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (int, float, str, bool, type(None))):
        return value
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    # An address is another one in every process.
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


@dataclass(frozen=True, kw_only=True)
class _CallableObjective(Objective):
    """A plain callable as an objective, with a mean over examples."""

    function: Callable[[Any, Any, Batch], Any]
    label: str

    @property
    def name(self) -> str:
        return self.label

    def __call__(self, student_out: Any, teacher_out: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | int]:
        value = self.function(student_out, teacher_out, batch)
        return value if isinstance(value, tuple) else (value, self.positions(batch))


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


def batch_size(batch: Batch) -> int:
    """Number of examples in a batch."""
    for value in batch.values():
        if isinstance(value, torch.Tensor) and value.dim() > 0:
            return value.shape[0]
    raise ValueError(f"No tensor in the batch tells its size; it has: {', '.join(batch) or 'nothing'}.")


def attended_mask(batch: Batch) -> torch.Tensor | None:
    """`attention_mask` of the batch, of shape `(batch, seq)`; `None` where there is none and every position counts."""
    mask = batch.get("attention_mask")
    return mask.ne(0) if isinstance(mask, torch.Tensor) else None


def token_mask(batch: Batch, shifts_labels: bool) -> torch.Tensor | None:
    """Which token positions count: those with a label other than -100, else those attended to.

    Args:
        batch (`dict`): with `labels` or `attention_mask` of shape `(batch, seq)`, or neither.
        shifts_labels (`bool`): whether the model predicts the next token, so that the first label is never used.

    Returns:
        `torch.BoolTensor` of shape `(batch, seq)`, or `(batch, seq - 1)` if labels are shifted; `None` where nothing
        says which positions are padding.
    """
    labels = batch.get("labels")
    if isinstance(labels, torch.Tensor) and labels.dim() == 2 and not labels.is_floating_point():
        mask: torch.Tensor | None = labels.ne(-100)
    else:
        mask = attended_mask(batch)
    return mask[:, 1:] if mask is not None and shifts_labels else mask
