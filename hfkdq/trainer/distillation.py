# SPDX-License-Identifier: Apache-2.0
"""The teachers and objectives of one student: validated, attached, and placed beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from ..facts import record_fact
from ..modeling.examples import NoExample, tried_on
from ..modeling.forwards import TEACHER_PREFIX, base_of, forward_columns, hide_training_queries
from ..modeling.masks import Batch
from ..modeling.own_modules import as_pretrained_
from ..objectives.base import Objective
from ..objectives.projections import Projections
from ..teachers import PeerParameters, Teacher, TeacherSource
from .terms import SINGLE, LossWeighting, required_outputs, sources_of, terms_of

TOO_LATE = (
    "Learned projections of hidden states must be there before a training goes on from a checkpoint or is shared among "
    "processes, and the models could not be tried on anything before the first batch. Give the trainer "
    "example_inputs=batch, a batch as your collator makes it."
)


class Distillation:
    """Teachers and objectives of one student, with the modules that are trained along with it. `student_is_remade` by
    `model_init` for every training; `sharded` by FSDP or DeepSpeed. `placed` are the teachers of an earlier student,
    which stay where they are. Models are tried on `example`, a batch; without one on a made-up one, and where that
    fails or leads to a refusal, on the first `rows` of the training. Where a model runs on neither, objectives are not
    `attached` yet, and `attach` takes a batch of the training. Raises `ValueError`: an objective or a teacher that
    does not fit the student. Raises `TypeError`: a student that is no Transformers model."""

    def __init__(
        self, student: Any, objectives: Sequence[Objective], sources: Mapping[str, TeacherSource], *,
        accelerator: Accelerator, label_names: list[str], student_is_remade: bool, sharded: bool,
        placed: Mapping[str, Teacher], example: Batch | None, rows: Callable[[], Batch | None],
    ) -> None:  # fmt: skip
        prepare_student_(student)
        self.sharded, self._objectives = sharded, objectives
        self._models = {name: source.model_for(student, student_is_remade) for name, source in sources.items()}
        self.projections: Projections | None = None
        self.attached = self._try(self._attach_objectives, student, example, rows)
        known = {name: teacher for name, teacher in placed.items() if not sources[name].copies_student}
        self.teachers = {
            name: known.get(name) or source.place(self._models[name], student, accelerator, label_names)
            for name, source in sources.items()
        }
        self.peers = {name: teacher for name, teacher in self.teachers.items() if teacher.learns}
        self.peer_parameters = PeerParameters({n: t.model for n, t in self.peers.items()}) if self.peers else None
        self.terms = terms_of(objectives, self.teachers)
        used = {source for term in self.terms for source in term.sources}
        self.used_teachers = {name: teacher for name, teacher in self.teachers.items() if name in used}
        self.weighting = LossWeighting(self.terms)
        self.columns = set[str]().union(*(teacher.columns for teacher in self.teachers.values()))
        self.installed = False  # for a training
        self.updated_at: int | None = None  # the optimizer step that moving averages have seen last
        self._hook: Any = None
        self.attached = self.attached and self._try(self._attach_teachers, student, example, rows)

    def _try(
        self, attach: Callable[[Any], None], student: Any, example: Batch | None, rows: Callable[[], Batch | None]
    ) -> bool:
        """Whether the models could be tried on something; raises the refusal that came of it."""
        try:
            self._attach_on(example, student, attach)
            return True
        except ValueError as error:
            batch, refusal = None if example is not None else rows(), error
        if batch is not None:
            try:
                self._attach_on(batch, student, attach)
                return True
            except ValueError as error:
                refusal = refusal if isinstance(error, NoExample) else error
        if example is None and isinstance(refusal, NoExample):
            return False
        raise refusal

    def _attach_on(self, batch: Batch | None, student: Any, *attach: Callable[[Any], None]) -> None:
        with tried_on(batch, student), _unchanged_by_refusal(student, self._models):
            for one in attach:
                one(student)

    def attach(self, student: Any, batch: Batch, optimizer: Any, is_late: bool) -> None:
        """Attaches what could not be attached yet, with a batch of the training to try the models on. `is_late` where
        the optimizer's state was restored, or the student wrapped for several processes. Raises `ValueError`: an
        objective that does not fit the models, a model that does not run on the batch, or a learned projection that
        comes too late."""
        self._attach_on(batch, student, self._attach_objectives, self._attach_teachers)
        if is_late and self.projections is not None:
            self.projections.remove(student)
            raise ValueError(TOO_LATE)
        self.attached = True
        if self.installed:
            self.install(student, optimizer)

    def _attach_objectives(self, student: Any) -> None:
        for objective in self._objectives:
            one = self._models.get(*sources_of(objective, list(self._models)) or [""])
            objective.attach(student, self._models if objective.uses_all_teachers else one)  # type: ignore[arg-type]
        self.projections = getattr(student, Projections.NAME, None)
        if self.projections is not None:
            self.projections.in_state_dict = self.sharded

    def _attach_teachers(self, student: Any) -> None:
        for name, teacher in self.teachers.items():
            teacher.attach(student)
            if required := required_outputs(name, self.terms):
                teacher.check(required[1])

    @property
    def _auxiliary(self) -> list[Any]:
        return [module for module in (self.projections, self.peer_parameters) if module is not None]

    @property
    def names(self) -> list[str]:
        return [term.name for term in self.terms]

    def install(self, student: Any, optimizer: Any = None) -> None:
        """Puts the auxiliary modules into the student, and their parameters into an optimizer that is there already."""
        # There is none between the trials of a search; the next one gets them when it is made.
        for module in self._auxiliary if student is not None else ():
            module.install(student)
        for teacher in self.teachers.values():
            teacher.install()
        if student is not None and self._hook is None:
            self._hook = hide_training_queries(student)
        self.installed = True
        if optimizer is not None:
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            missing = [p for module in self._auxiliary for p in module.parameters() if id(p) not in held]
            # In a group of its own they would be one more than a learning rate schedule knows of.
            optimizer.param_groups[0]["params"] += missing

    def remove(self, student: Any) -> None:
        for module in self._auxiliary:
            module.remove(student)
        for teacher in self.teachers.values():
            teacher.remove()
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        self.installed = False

    def student_inputs(self, student: Any, inputs: Any) -> Any:
        """A batch without the columns that only teachers take."""
        if not self.teachers:
            return inputs
        own = forward_columns(student)
        # A signature of `**inputs` alone does not tell what the student takes.
        others = self.columns if base_of(student).main_input_name in own else set[str]()
        foreign = {k for k in inputs if k not in own and (k in others or k.startswith(TEACHER_PREFIX))}
        return {key: value for key, value in inputs.items() if key not in foreign} if foreign else inputs

    def update_teachers(self, student: Any, step: int, max_steps: int) -> None:
        """Lets moving averages follow the optimizer step that was finished since the last call."""
        if self.updated_at is not None and step > self.updated_at:
            for teacher in self.teachers.values():
                teacher.update(student, step / max(max_steps, 1))
        self.updated_at = step

    def fingerprint(self) -> dict[str, Any]:
        """Teachers and objectives, by which a checkpoint knows its training again."""
        teachers = {name: teacher.fingerprint for name, teacher in self.used_teachers.items()}
        return {
            "teacher": teachers.get(SINGLE) if teachers.keys() <= {SINGLE} else teachers,
            "objectives": [term.objective.describe() for term in self.terms],
        }

    def record(self, student: Any, steps: int) -> None:
        """Writes into the configuration of the student what it was trained by."""
        fact = {"objectives": [o.describe() for o in self._objectives], "steps": steps}
        if self.used_teachers:
            fact["teacher"] = ", ".join(teacher.name for teacher in self.used_teachers.values())
        record_fact(student, "distillation", fact)

    def state(self) -> dict[str, torch.Tensor]:
        maps = {} if self.projections is None or self.sharded else self.projections.maps.state_dict()
        states = {f"{n}/{key}": v.clone() for n, t in self.teachers.items() for key, v in t.state().items()}
        return {**maps, **states}

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restores projections, those of the same shape, and teachers from a checkpoint."""
        for name, teacher in self.teachers.items():
            own = {key.removeprefix(f"{name}/"): v for key, v in tensors.items() if key.startswith(f"{name}/")}
            if own:
                teacher.load_state(own)
        if self.projections is not None and not self.sharded:
            maps = self.projections.maps.state_dict()
            fitting = {k: v for k, v in tensors.items() if k in maps and v.shape == maps[k].shape}
            self.projections.maps.load_state_dict({**maps, **fitting})


@contextlib.contextmanager
def _unchanged_by_refusal(student: Any, teachers: Mapping[str, Any]) -> Iterator[None]:
    """Takes out of the models what objectives put in before one of them raised an error."""
    models = [base_of(model) for model in (student, *teachers.values()) if isinstance(base_of(model), PreTrainedModel)]
    kinds = [model.config._attn_implementation for model in models]
    try:
        yield
    except Exception:
        for model, kind in zip(models, kinds, strict=True):
            if model.config._attn_implementation != kind:
                model.set_attn_implementation(kind)
        for model in (student, *teachers.values()):
            if isinstance(projections := getattr(model, Projections.NAME, None), Projections):
                projections.remove(model)
        raise


def prepare_student_(student: Any) -> None:
    """Checks the type of a student, and frees it from what another trainer or bitsandbytes did to it. Raises
    `TypeError`: it is no Transformers model."""
    if not isinstance(base_of(as_pretrained_(student)), PreTrainedModel):
        raise TypeError(
            f"Objectives read what Transformers models return; the student is a {type(student).__name__}. Give a "
            "PreTrainedModel, a PeftModel around one, or a module of your own that takes and returns dictionaries."
        )
    for module in student.modules():
        # On a CPU with AVX512-BF16 bitsandbytes repacks 4-bit weights that run without gradient, for a kernel that passes
        # none on, in later training neither.
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
            module.state_dict()  # unpacks what ran already
    for stale in (getattr(student, module.NAME, None) for module in (Projections, PeerParameters)):
        if stale is not None:
            stale.remove(student)
