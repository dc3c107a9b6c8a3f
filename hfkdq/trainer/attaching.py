# SPDX-License-Identifier: Apache-2.0
"""Validates and attaches teachers and objectives, before a distilling trainer trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from ..caching import CachedCollator, CachedTeacher, CacheInfo, cache_info
from ..caching.keys import weights_fingerprint
from ..modeling.forwards import TEACHER_PREFIX, base_of
from ..objectives.model_signature import ModelSignature
from ..objectives.projections import Projections
from ..teachers import (
    AveragedTeacher,
    CoTrainedModel,
    CoTrainedTeacher,
    EMATeacher,
    FrozenTeacher,
    PeerParameters,
    Teacher,
    averaged_copy,
    check_vocabulary,
)
from .arguments import (
    disable_bnb_repacking_,
    instances,
    is_factory,
    keep_tokens_back_,
    loaded,
    named,
    peer_objectives,
    refuse_unsupported,
    require_teacher,
    validated,
)
from .keeping import KeepingMixin
from .loss_weighting import LossWeighting
from .terms import SINGLE, Term, required_outputs, sources_of, terms_of


class AttachingMixin(KeepingMixin):
    """Construction of [`DistillationMixin`], and what is made anew for every trial of a search."""

    model_accepts_loss_kwargs: bool
    data_collator: Any

    def __init__(
        self,
        *args: Any,
        teacher_model: Any = None,
        teacher_init_kwargs: Mapping[str, Any] | None = None,
        objectives: Any = None,
        strict_resume: bool = True,
        **kwargs: Any,
    ) -> None:
        self._make_objectives: Any = objectives if is_factory(objectives) else None
        self._make_callbacks: Any = kwargs.get("callbacks") if is_factory(kwargs.get("callbacks")) else None
        self._made_callbacks: list[Any] = []
        if self._make_callbacks is not None:
            self._made_callbacks = kwargs["callbacks"] = instances(self._make_callbacks(None))
        self.given_teachers = named(teacher_model)
        self.objectives = validated(
            self.given_teachers, objectives if self._make_objectives is None else self._make_objectives(None)
        )
        self.given_teachers = loaded(self.given_teachers, teacher_init_kwargs)
        self.strict_resume = strict_resume
        self.teachers: dict[str, Teacher] = {}
        self.models_of_teachers: dict[str, Any] = {}
        self._terms: list[Term] = []
        self._loss_weighting = LossWeighting([])
        self._projections: Projections | None = None
        self._peer_parameters: PeerParameters | None = None
        self._followed = None
        self._in_training = self._in_training_step = False
        self._positions: tuple[torch.Tensor, int] | None = None  # per term, and the processes they are of
        super().__init__(*args, **kwargs)
        keep_tokens_back_(self.args)
        if self.objectives:
            self._use_cached_outputs()
            require_teacher(self.objectives, self.given_teachers)
            refuse_unsupported(self)
            self._show_terms_in_notebooks()
            self._attach(self.model)
            for name, model in self.models_of_teachers.items():
                if not _is_cache(model) and model is not self.model:
                    told = "The teacher" if name == SINGLE else f"The teacher {name}"
                    check_vocabulary(model, told, self.train_dataset, self.model)

    @property
    def teacher_model(self) -> Any:
        """The model to learn from; of several teachers a dict of them by name."""
        models = {n: m for n, m in (self.models_of_teachers or self.given_teachers).items() if not _is_cache(m)}
        return models.get(SINGLE) if models.keys() <= {SINGLE} else dict(models)

    def _use_cached_outputs(self) -> None:
        """Lets the outputs in the training data stand for the teacher, if that is what they are of."""
        info = cache_info(self.train_dataset) if any(o.uses_teacher for o in self.objectives) else None
        if info is None:
            return
        teacher = self.given_teachers.get(SINGLE)
        if len(self.given_teachers) > 1 or (teacher is not None and not isinstance(base_of(teacher), PreTrainedModel)):
            raise ValueError(
                "train_dataset holds the outputs of one frozen teacher, but teacher_model is another kind of teacher, or "
                "several. Leave teacher_model out, or give the dataset without the outputs: "
                f"remove_columns({sorted(info.columns)})."
            )
        if teacher is not None and weights_fingerprint(teacher) != info.key["teacher"]:
            raise ValueError(
                f"The outputs in train_dataset are those of {info.key['teacher']}, but teacher_model is "
                f"{weights_fingerprint(teacher)}, another model or the same with other weights. Leave teacher_model out to "
                "learn from the cached outputs, or call cache_teacher_outputs again."
            )
        self.given_teachers = {SINGLE: info}
        self.data_collator = CachedCollator(self.data_collator, info)

    def _show_terms_in_notebooks(self) -> None:
        callbacks = self.callback_handler.callbacks
        for place, callback in enumerate(callbacks):
            if type(callback).__name__ == "NotebookProgressCallback":
                from .notebook import NotebookTermsCallback

                callbacks[place] = NotebookTermsCallback(lambda: [term.name for term in self._terms])

    def _attach(self, student: Any) -> None:
        """Lets every objective check its pair before anything is trained, and puts the teachers where they run."""
        if not isinstance(base_of(student), PreTrainedModel):
            raise TypeError(
                f"Objectives read what Transformers models return; the student is a {type(student).__name__}. Give a "
                "PreTrainedModel, or a PeftModel around one."
            )
        disable_bnb_repacking_(student)
        for stale in (getattr(student, module.NAME, None) for module in (Projections, PeerParameters)):
            if stale is not None:  # by another trainer of this student
                stale.remove(student)
        for name, given in self.given_teachers.items():
            self.models_of_teachers[name] = self._model_of(student, given)
        for objective in self.objectives:
            sources = sources_of(objective, list(self.given_teachers))
            pool = (
                self.models_of_teachers
                if objective.uses_all_teachers
                else self.models_of_teachers.get(*sources or [""])
            )
            objective.attach(student, pool)
        self._projections = getattr(student, Projections.NAME, None)
        if self._projections is not None:
            self._projections.in_state_dict = self._sharded
        for name, given in self.given_teachers.items():
            if name not in self.teachers or isinstance(given, EMATeacher):
                self.teachers[name] = self._placed(student, given, self.models_of_teachers[name])
        models = {name: peer.model for name, peer in self._peers.items()}
        self._peer_parameters = PeerParameters(models) if models else None
        self._terms = terms_of(self.objectives, self.teachers)
        for name, teacher in self.teachers.items():
            if asked := required_outputs(name, self._terms):
                teacher.check(asked[1])
        self._loss_weighting = LossWeighting(self._terms)

    def _model_of(self, student: Any, given: Any) -> Any:
        """The model that objectives see as a teacher, checked that it may be trained or frozen beside the student."""
        if isinstance(given, CacheInfo):
            return given.outline
        if isinstance(given, EMATeacher):
            return averaged_copy(student)
        model = given.model if isinstance(given, CoTrainedTeacher) else given
        itself = base_of(student) is not student and model is base_of(student)
        if (itself or isinstance(given, CoTrainedTeacher)) and self.model_init is not None:
            raise ValueError(
                "model_init makes a new student for every training, "
                + ("whose base model is not the teacher_model given. " if itself else "beside which a peer would not start anew. ")
                + "Give the student as model, or a teacher that was loaded on its own."
            )  # fmt: skip
        if itself and student.active_peft_config.is_prompt_learning:
            raise ValueError(
                "teacher_model is the base model of a student with virtual tokens, and PEFT cannot run every such student "
                "without them. Load the base model a second time and give that."
            )
        trained = {id(p) for p in student.parameters() if p.requires_grad}
        shared = any(id(p) in trained for p in model.parameters())
        if model is student or (shared and not itself):
            raise ValueError(
                "teacher_model shares its parameters with the student, so it would be trained and frozen at once. "
                "Load it a second time or use copy.deepcopy; to learn from a PEFT student's own base model, give "
                "teacher_model=model.get_base_model()."
            )
        return model

    def _placed(self, student: Any, given: Any, model: Any) -> Teacher:
        if isinstance(given, CacheInfo):
            return CachedTeacher(given, self.args.device)
        if isinstance(given, CoTrainedTeacher):
            objectives = peer_objectives(given)
            for objective in objectives:
                objective.attach(model, student)
            return CoTrainedModel(model, objectives, self.args.device)
        if isinstance(given, EMATeacher):
            return AveragedTeacher(model, self.accelerator, self.label_names, given.decay)
        itself = base_of(student) is not student and model is base_of(student)
        return FrozenTeacher(model, self.accelerator, self.label_names, adapters_of=student if itself else None)

    def call_model_init(self, trial: Any = None) -> PreTrainedModel:
        """As `Trainer.call_model_init`; makes objectives and callbacks anew where they were given as functions."""
        model = super().call_model_init(trial)
        if hasattr(self, "callback_handler"):  # not while the trainer itself is being made
            if self._make_objectives is not None:
                self.objectives = validated(self.given_teachers, self._make_objectives(trial))
            if self.objectives:
                self._attach(model)
            if self._make_callbacks is not None:
                self._replace_callbacks(instances(self._make_callbacks(trial)), model)
        return model

    def _replace_callbacks(self, made: list[Any], model: PreTrainedModel) -> None:
        callbacks = self.callback_handler.callbacks
        old = self._made_callbacks
        place = min((i for i, callback in enumerate(callbacks) if callback in old), default=len(callbacks))
        for callback in old:
            self.remove_callback(callback)
        callbacks[place:place] = made
        self._made_callbacks = made
        for callback in made:
            callback.on_init_end(self.args, self.state, self.control, model=model)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = self._teachers_columns()
        columns |= {TEACHER_PREFIX + name for name in (*columns, *self.label_names)} if columns else set()
        self._signature_columns += sorted(columns - set(self._signature_columns))

    def _teachers_columns(self) -> set[str]:
        return set[str]().union(*(teacher.columns for teacher in self.teachers.values()))

    @property
    def _auxiliary(self) -> list[Projections | PeerParameters]:
        """The modules that are trained with the student, and are in it only while it is trained."""
        return [module for module in (self._projections, self._peer_parameters) if module is not None]

    def _install_auxiliary(self) -> None:
        """Lets the student have what is trained along with it."""
        for module in self._auxiliary:
            module.install(self.model)
        for teacher in self.teachers.values():
            teacher.install()

    def _remove_auxiliary(self) -> None:
        for module in self._auxiliary:
            module.remove(self.model)
        for teacher in self.teachers.values():
            teacher.remove()

    @property
    def _peers(self) -> dict[str, Teacher]:
        return {name: teacher for name, teacher in self.teachers.items() if teacher.learns}

    def _add_auxiliary_to_optimizer(self) -> None:
        """Lets an optimizer that was made before them train the projections and peers too."""
        if self.optimizer is None:
            return
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        missing = [p for module in self._auxiliary for p in module.parameters() if id(p) not in held]
        # In a group of its own they would be one more than a learning rate schedule knows of.
        self.optimizer.param_groups[0]["params"] += missing


def _is_cache(model: Any) -> bool:
    return isinstance(model, (ModelSignature, CacheInfo))
