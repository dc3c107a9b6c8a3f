# SPDX-License-Identifier: Apache-2.0
"""Validation of the arguments of a distilling trainer, and of the settings it runs under."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch.utils.data import IterableDataset
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import number_of_arguments
from transformers.utils import logging

from ..modeling.examples import first_rows
from ..modeling.forwards import TEACHER_PREFIX, forward_columns
from ..modeling.placement import was_split_while_loaded
from ..objectives import ByGradientNorm
from ..objectives.base import Objective, as_objective
from ..teachers import TeacherSource, as_source
from .terms import SINGLE, STUDENT, sources_of

logger = logging.get_logger(__name__)


class _Unpickled(str):
    """A text that is used as any other, and is `None` in what is pickled or saved."""

    def __reduce__(self) -> Any:
        return type(None), ()

    def __copy__(self) -> _Unpickled:
        return self

    def __deepcopy__(self, memo: Any) -> _Unpickled:
        return self


def keep_tokens_back_(args: Any) -> None:
    """Keeps access tokens out of `training_args.bin`, which is in every checkpoint and goes to the Hub with it."""
    for name, value in vars(args).items():
        if name.endswith("_token") and isinstance(value, str):
            setattr(args, name, _Unpickled(value))


def report_last_(trainer: Any) -> None:
    """Puts the callbacks that report logs (TensorBoard, W&B, ...) behind those that add to them, such as the sparsity, and
    before those that print them, which take numbers out."""
    kinds = tuple(get_reporting_integration_callbacks(trainer.args.report_to))
    callbacks = trainer.callback_handler.callbacks
    reporters = [callback for callback in callbacks if type(callback) in kinds]
    others = [callback for callback in callbacks if type(callback) not in kinds]
    printers = (PrinterCallback, ProgressCallback)
    place = next((i for i, callback in enumerate(others) if isinstance(callback, printers)), len(others))
    callbacks[:] = [*others[:place], *reporters, *others[place:]]


class TrialFactories:
    """Objectives and callbacks, where a user gave functions of the trial of a hyperparameter search for them."""

    def __init__(self, objectives: Any, callbacks: Any) -> None:
        self._objectives = objectives if _is_factory(objectives) else None
        self._callbacks = callbacks if _is_factory(callbacks) else None
        self._made: list[TrainerCallback] = []
        self.make_objectives = self._objectives is not None

    def objectives(self, trial: Any, otherwise: Any) -> Any:
        """The objectives for a trial (`None` outside of one), or `otherwise` where there is no function of it."""
        return otherwise if self._objectives is None else self._objectives(trial)

    def callbacks(self, trial: Any, otherwise: Any) -> Any:
        """The callbacks for a trial, or `otherwise`; a class is called, as `Trainer` does."""
        if self._callbacks is None:
            return otherwise
        self._made = [made() if isinstance(made, type) else made for made in self._callbacks(trial)]
        return list(self._made)

    def replace_callbacks(self, trainer: Any, trial: Any, model: Any) -> None:
        """Puts the callbacks for a trial in the place of those of the trial before."""
        if self._callbacks is None:
            return
        callbacks, old = trainer.callback_handler.callbacks, self._made
        place = min((i for i, callback in enumerate(callbacks) if callback in old), default=len(callbacks))
        new = self.callbacks(trial, [])
        for callback in old:
            trainer.remove_callback(callback)
        callbacks[place:place] = new
        for callback in new:
            callback.on_init_end(trainer.args, trainer.state, trainer.control, model=model)


def _is_factory(value: Any) -> bool:
    """Whether `value` is a function of the trial, as `model_init` is, rather than what it makes."""
    if not callable(value) or isinstance(value, (type, Objective, TrainerCallback)):
        return False
    return bool(number_of_arguments(value) == 1)


def teacher_sources(teacher: Any) -> dict[str, TeacherSource]:
    """The teachers by their names; a single one that was given without a name is called "teacher". Raises `TypeError`:
    a teacher of the wrong type. Raises `ValueError`: an empty dict, or a name that is no name."""
    if not isinstance(teacher, Mapping):
        return {} if teacher is None else {SINGLE: as_source(teacher)}
    bad = [name for name in teacher if not (isinstance(name, str) and name.isidentifier()) or name == STUDENT]
    if bad or not teacher:
        raise ValueError(
            f"teacher_model is a dict with the names {list(teacher)}; teachers need names such as 'large' or 'base', "
            "which their terms are logged under."
        )
    return {name: as_source(one) for name, one in teacher.items()}


def load_teachers(sources: Mapping[str, TeacherSource], init_kwargs: Mapping[str, Any] | None) -> None:
    """Loads the teachers that are given by name. Raises `ValueError`: arguments to load them with, but they are loaded
    already."""
    if init_kwargs is not None and not any(source.to_load for source in sources.values()):
        raise ValueError(
            "teacher_init_kwargs says how to load a teacher, but teacher_model is "
            f"{'loaded already' if sources else 'None'}. Give its Hub id or folder, or leave them out."
        )
    for source in sources.values():
        source.load(init_kwargs)


def validated(teachers: Mapping[str, Any], objectives: Any) -> list[Objective]:
    """The objectives for the teachers, each a copy of its own. Raises `TypeError`: objectives of the wrong type.
    Raises `ValueError`: nothing to train on, or a teacher that is not there."""
    if objectives is not None and not isinstance(objectives, (list, tuple)):
        raise TypeError(f"objectives must be a list, got {objectives!r}. Write objectives=[{objectives!r}].")
    if not objectives and (teachers or objectives is not None):
        raise ValueError(
            "objectives is empty, so there is nothing to train on. Give for example "
            "objectives=[TaskLoss(weight=0.5), LogitKD(temperature=2.0)], or neither teacher nor objectives."
        )
    terms = [as_objective(objective).copy() for objective in objectives or ()]
    for term in terms:
        term.check_settings()
    used = {name for objective in terms for name in sources_of(objective, list(teachers))}
    for name in teachers.keys() - used:
        logger.warning(
            f"No objective uses the teacher{'' if name == SINGLE else f' {name}'}, so it will not be run. Add LogitKD() to "
            "learn from it."
        )
    return terms


def first_batch(trainer: Any, student: Any, sources: Iterable[TeacherSource]) -> Any:
    """A batch of the first rows of the training, where they have places and both models read the same columns."""
    if isinstance(trainer.train_dataset, IterableDataset):
        return None
    models = [source.frozen_model for source in sources if source.frozen_model is not None]
    columns = {"label", "label_ids", *trainer.label_names}.union(*map(forward_columns, (student, *models)))
    columns |= {TEACHER_PREFIX + name for name in columns}
    kept = columns if trainer.args.remove_unused_columns else None
    batch = first_rows(trainer.train_dataset, trainer.data_collator, kept)
    return None if any(name.startswith(TEACHER_PREFIX) for name in batch or ()) else batch


def require_teacher(objectives: Iterable[Objective], teachers: Mapping[str, Any]) -> None:
    """Raises `ValueError` for objectives that compare with a teacher where there is none."""
    comparing = [o.name for o in objectives if o.uses_teacher]
    if comparing and not teachers:
        raise ValueError(
            f"{', '.join(comparing)} compare with a teacher, but teacher_model is None, and train_dataset holds no outputs of "
            "one. Give a teacher, or a data set from cache_teacher_outputs."
        )


def refuse_unsupported(trainer: Any, objectives: Iterable[Objective], sources: Iterable[TeacherSource]) -> None:
    """Raises `NotImplementedError` for a kind of parallelism that distillation does not work under."""
    args, accelerator = trainer.args, trainer.accelerator
    if trainer.is_fsdp_enabled and not accelerator.is_fsdp2:
        raise NotImplementedError("FSDP1 is not supported: set fsdp_version: 2 in the configuration of accelerate.")
    whole = [type(source).__name__ for source in sources if source.changes]
    whole += [type(o).__name__ for o in objectives if o.runs_first]
    whole += ["ByGradientNorm" for o in objectives if isinstance(o.weight, ByGradientNorm)]
    if whole and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise NotImplementedError(
            f"{', '.join(whole)} does not work where FSDP or DeepSpeed shard the student. Use one process, or several "
            "under DDP."
        )
    frozen = [source.frozen_model for source in sources if source.frozen_model is not None]
    if any(was_split_while_loaded(model) for model in (trainer.model, *frozen)):
        raise NotImplementedError(
            "DeepSpeed ZeRO-3 split a model over the processes while it was loaded, so objectives cannot look at it. "
            "Load student and teacher before the TrainingArguments are made."
        )
    if args.n_gpu > 1:
        raise NotImplementedError(
            f"torch.nn.DataParallel over {args.n_gpu} GPUs is not supported; use `accelerate launch`, which "
            "runs one process per GPU, or set CUDA_VISIBLE_DEVICES to one of them."
        )
    parallel = getattr(accelerator, "parallelism_config", None)
    if any(getattr(parallel, f"{kind}_enabled", False) for kind in ("tp", "cp", "sp")):
        raise NotImplementedError(
            "Tensor, context and sequence parallelism split a sequence or a layer over processes, and objectives "
            "need both whole. Launch without a parallelism_config, or with data parallelism alone."
        )


def keep_attentions_in_gradient_(args: Any, objectives: Iterable[Objective]) -> None:
    """Makes gradient checkpointing non-reentrant where objectives read attentions; `ValueError` if it is set to be."""
    # Transformers 5 calls gradient checkpointing activation checkpointing.
    name = "activation" if hasattr(args, "activation_checkpointing") else "gradient"
    if getattr(args, f"{name}_checkpointing") and any("attentions" in o.needs for o in objectives):
        settings = getattr(args, f"{name}_checkpointing_kwargs") or {}
        if settings.get("use_reentrant"):
            raise ValueError(
                "Reentrant gradient checkpointing cuts attentions off from the gradient, so AttentionKD would train "
                "nothing. Set gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
        setattr(args, f"{name}_checkpointing_kwargs", {**settings, "use_reentrant": False})
