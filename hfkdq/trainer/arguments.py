# SPDX-License-Identifier: Apache-2.0
"""What a distilling trainer is given: checked before anything is done with it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_utils import number_of_arguments
from transformers.utils import logging

from ..modeling.forwards import base_of
from ..modeling.placement import was_split_while_loaded
from ..objectives import ByGradientNorm, LogitKD, TaskLoss
from ..objectives.base import Objective, as_objective
from ..teachers import CoTrainedTeacher, EMATeacher, load_teacher
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


def is_factory(value: Any) -> bool:
    """Whether `value` is a function of the trial, as `model_init` is, rather than what it makes."""
    if not callable(value) or isinstance(value, (type, Objective, TrainerCallback)):
        return False
    return bool(number_of_arguments(value) == 1)


def instances(callbacks: Iterable[Any]) -> list[Any]:
    """Callbacks, made where a class stands for one, as `Trainer` allows."""
    return [callback() if isinstance(callback, type) else callback for callback in callbacks]


def named(teacher: Any) -> dict[str, Any]:
    """The teachers by their names; a single one that was given without a name is called "teacher".

    Raises:
        TypeError: a teacher of the wrong type.
        ValueError: an empty dict, or a name that is no name.
    """
    if isinstance(teacher, Mapping):
        bad = [name for name in teacher if not (isinstance(name, str) and name.isidentifier()) or name == STUDENT]
        if bad or not teacher:
            raise ValueError(
                f"teacher_model is a dict with the names {list(teacher)}; teachers need names such as 'large' or 'base', "
                "which their terms are logged under."
            )
    given = {} if teacher is None else dict(teacher) if isinstance(teacher, Mapping) else {SINGLE: teacher}
    for one in given.values():
        model = one.model if isinstance(one, CoTrainedTeacher) else one
        if not (isinstance(one, (str, os.PathLike, EMATeacher)) or isinstance(base_of(model), PreTrainedModel)):
            raise TypeError(
                "teacher_model must be a PreTrainedModel, the Hub id or folder of one, an EMATeacher, a CoTrainedTeacher, "
                f"or a dict of such by name, got {type(model).__name__}."
            )
    return given


def validated(teachers: Mapping[str, Any], objectives: Any) -> list[Objective]:
    """The objectives for the teachers, each a copy of its own.

    Raises:
        TypeError: objectives of the wrong type.
        ValueError: nothing to train on, or a teacher that is not there.
    """
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


def require_teacher(objectives: Iterable[Objective], teachers: Mapping[str, Any]) -> None:
    """Checks that there is somebody to learn from.

    Raises:
        ValueError: objectives that compare with a teacher, and none is there.
    """
    orphans = [o.name for o in objectives if o.uses_teacher]
    if orphans and not teachers:
        raise ValueError(
            f"{', '.join(orphans)} compare with a teacher, but teacher_model is None, and train_dataset holds no outputs of "
            "one. Give a teacher, or a data set from cache_teacher_outputs."
        )


def peer_objectives(teacher: CoTrainedTeacher) -> list[Objective]:
    """What a peer learns, each a copy of its own.

    Raises:
        ValueError: an objective that cannot be learned by a peer.
    """
    given = [TaskLoss(), LogitKD(temperature=1.0)] if teacher.objectives is None else teacher.objectives
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


def loaded(teachers: Mapping[str, Any], init_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """The teachers themselves, those loaded that were named.

    Raises:
        ValueError: arguments to load them with, but they are loaded already.
    """
    by_name = [name for name, one in teachers.items() if isinstance(one, (str, os.PathLike))]
    if init_kwargs is not None and not by_name:
        raise ValueError(
            "teacher_init_kwargs says how to load a teacher, but teacher_model is "
            f"{'loaded already' if teachers else 'None'}. Give its Hub id or folder, or leave them out."
        )
    return {n: load_teacher(str(one), init_kwargs) if n in by_name else one for n, one in teachers.items()}


def disable_bnb_repacking_(student: Any) -> None:
    """Keeps the 4-bit layers of a student from repacking their weights when they run without gradient.

    On a CPU with AVX512-BF16 bitsandbytes does so for a kernel that passes no gradient on, in later training neither.
    """
    for module in student.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
            module.state_dict()  # unpacks what ran already


def refuse_unsupported(trainer: Any) -> None:
    """Checks how a trainer with objectives is to run; makes gradient checkpointing keep attentions in the gradient.

    Raises:
        NotImplementedError: a kind of parallelism that distillation does not work under.
        ValueError: gradient checkpointing that would cut attentions off.
    """
    args, accelerator = trainer.args, trainer.accelerator
    if trainer.is_fsdp_enabled and not accelerator.is_fsdp2:
        raise NotImplementedError("FSDP1 is not supported: set fsdp_version: 2 in the configuration of accelerate.")
    moving = [
        type(t).__name__ for t in trainer.given_teachers.values() if isinstance(t, (EMATeacher, CoTrainedTeacher))
    ]
    moving += [type(o).__name__ for o in trainer.objectives if o.runs_first]
    moving += ["ByGradientNorm" for o in trainer.objectives if isinstance(o.weight, ByGradientNorm)]
    if moving and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise NotImplementedError(
            f"{', '.join(moving)} does not work where FSDP or DeepSpeed shard the student. Use one process, or several "
            "under DDP."
        )
    models = [trainer.model, *(t for t in trainer.given_teachers.values() if isinstance(t, nn.Module))]
    if any(was_split_while_loaded(model) for model in models):
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
    # Transformers 5 calls gradient checkpointing activation checkpointing.
    name = "activation" if hasattr(args, "activation_checkpointing") else "gradient"
    if getattr(args, f"{name}_checkpointing") and any("attentions" in o.needs for o in trainer.objectives):
        settings = getattr(args, f"{name}_checkpointing_kwargs") or {}
        if settings.get("use_reentrant"):
            raise ValueError(
                "Reentrant gradient checkpointing cuts attentions off from the gradient, so AttentionKD would train "
                "nothing. Set gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
        setattr(args, f"{name}_checkpointing_kwargs", {**settings, "use_reentrant": False})
