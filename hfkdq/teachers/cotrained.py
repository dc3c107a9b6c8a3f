# SPDX-License-Identifier: Apache-2.0
"""A teacher that learns beside the student, in the same optimizer step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers.utils import ModelOutput

from ..facts import AUXILIARY
from ..modeling.forwards import TEACHER_PREFIX, forward_columns, hide_training_queries
from ..objectives import LogitKD, TaskLoss
from ..objectives.base import Objective, as_objective
from ..objectives.projections import Auxiliary, Projections
from .base import Teacher, TeacherSource, fingerprint, refuse_shared_parameters


@dataclass(frozen=True, eq=False)
class CoTrainedTeacher(TeacherSource):
    """A teacher that is trained along with the student, and learns from it: deep mutual learning.

    Zhang et al., "Deep Mutual Learning" (2018). Both run on every batch and take the same optimizer step; outputs that
    serve as the other's targets are detached. Its terms are logged as `teacher_task_loss` and so on. It is in every
    checkpoint; after training it is an ordinary model: `trainer.teacher_model.save_pretrained(folder)`.

    Args:
        model (`PreTrainedModel`): the co-trained model.
        objectives (list of objectives, *optional*): what it learns, with the student as its teacher. By default
            `[TaskLoss(), LogitKD(temperature=1.0)]`, as in the paper.

    Example:
        ```python
        trainer = DistillationTrainer(student, args, teacher_model=CoTrainedTeacher(other),
                                      objectives=[TaskLoss(), LogitKD(temperature=1.0)], ...)
        ```
    """

    changes = True
    model: Any
    objectives: Sequence[Objective] | None = None

    def model_for(self, student: Any, student_is_remade: bool) -> Any:
        if student_is_remade:
            raise ValueError(
                "model_init makes a new student for every training, beside which a peer would not start anew. Give the "
                "student as model, or a teacher that was loaded on its own."
            )
        refuse_shared_parameters(self.model, student)
        return self.model

    def place(self, model: Any, student: Any, accelerator: Accelerator, label_names: list[str]) -> Teacher:
        return CoTrainedModel(model, self._objectives(), accelerator.device)

    def _objectives(self) -> list[Objective]:
        given = [TaskLoss(), LogitKD(temperature=1.0)] if self.objectives is None else self.objectives
        objectives = [as_objective(objective).copy() for objective in given]
        for objective in objectives:
            objective.check_settings()
        bad = [o.name for o in objectives if o.runs_first or o.uses_all_teachers or o.teacher is not None]
        if bad or not objectives:
            raise ValueError(
                f"The objectives of a CoTrainedTeacher compare it with the student alone; got {', '.join(bad) or 'none'}. Use "
                "for example [TaskLoss(), LogitKD(temperature=1.0)]."
            )
        return objectives


class PeerParameters(Auxiliary):
    """Registers the parameters of co-trained models in the student, so that optimizer, clipping and processes see them.

    Quantization and pruning, which look for modules, find no layers of another model there. The student returns the
    peers' `outputs` beside its own, where DistributedDataParallel looks for the parameters that took part in a pass.
    """

    NAME = f"{AUXILIARY}peer_parameters"

    def __init__(self, models: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for owner, model in models.items():
            for name, parameter in model.named_parameters():
                self.register_parameter(f"{owner}/{name.replace('.', '/')}", parameter)
        self.outputs: list[Any] = []

    def _append(self, student: nn.Module, args: Any, output: Any) -> Any:
        if not self.outputs or not isinstance(output, Mapping):
            return output
        others, self.outputs = [dict(other) for other in self.outputs], []
        return {**output, self.NAME: others}  # the classes of Transformers take no further entry


class CoTrainedModel(Teacher):
    """A [`CoTrainedTeacher`] during a training on `device`, with objectives of its own."""

    learns = True

    def __init__(self, model: Any, objectives: list[Objective], device: torch.device) -> None:
        self.model = model.to(device)
        self.objectives = objectives
        self.name = type(model).__name__
        self.fingerprint = f"{fingerprint(model)}, trained along with the student"
        self.columns = forward_columns(model)
        self.projections: Projections | None = None
        self._hook: Any = None

    def attach(self, student: Any) -> None:
        for objective in self.objectives:
            objective.attach(self.model, student)
        self.projections = getattr(self.model, Projections.NAME, None)

    def install(self) -> None:
        self._hook = self._hook or hide_training_queries(self.model)
        if self.projections is not None:
            self.projections.install(self.model)

    def remove(self) -> None:
        """Removes the projections, so that the model is as it was built, in eval mode."""
        self.model.eval()
        if self._hook is not None:
            self._hook = self._hook.remove()
        if self.projections is not None:
            self.projections.remove(self.model)

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Its columns of a batch, labels included; `teacher_input_ids` takes precedence over `input_ids`."""
        own = {name: value for name, value in batch.items() if name in self.columns}
        return own | {n: batch[TEACHER_PREFIX + n] for n in self.columns if TEACHER_PREFIX + n in batch}

    def state(self) -> dict[str, torch.Tensor]:
        maps = {} if self.projections is None else self.projections.maps.state_dict()
        return {**self.model.state_dict(), **{f"{Projections.NAME}.{key}": value for key, value in maps.items()}}

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        prefix = f"{Projections.NAME}."
        maps = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        self.model.load_state_dict({key: value for key, value in tensors.items() if not key.startswith(prefix)})
        if self.projections is not None:
            self.projections.maps.load_state_dict(maps)


def detached(output: Any) -> Any:
    """The output of a model without gradient, and without its loss."""
    if isinstance(output, torch.Tensor):
        return output.detach()
    if isinstance(output, Mapping):
        return ModelOutput({key: detached(value) for key, value in output.items() if key != "loss"})
    if isinstance(output, (tuple, list)):
        return type(output)(detached(value) for value in output)
    return output
