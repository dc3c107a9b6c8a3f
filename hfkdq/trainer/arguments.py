# SPDX-License-Identifier: Apache-2.0
"""What a distilling trainer is given: checked before anything is done with it.

Knows what arguments mean together; nothing of how training goes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_utils import number_of_arguments
from transformers.utils import logging

from ..forwards import base_of
from ..objectives.base import Objective, as_objective
from ..sharding import was_split_while_loaded
from ..teachers import load_teacher

logger = logging.get_logger(__name__)


def is_factory(value: Any) -> bool:
    """Whether `value` is a function of the trial, as `model_init` is, rather than what it makes."""
    if not callable(value) or isinstance(value, (type, Objective, TrainerCallback)):
        return False
    return bool(number_of_arguments(value) == 1)


def instances(callbacks: Iterable[Any]) -> list[Any]:
    """Callbacks, made where a class stands for one, as `Trainer` allows."""
    return [callback() if isinstance(callback, type) else callback for callback in callbacks]


def validated(teacher: Any, objectives: Any) -> list[Objective]:
    """The objectives for a teacher, each a copy of its own.

    Raises:
        TypeError: a teacher or objectives of the wrong type.
        ValueError: nothing to train on, or nobody to learn from.
    """
    if not (
        teacher is None or isinstance(teacher, (str, os.PathLike)) or isinstance(base_of(teacher), PreTrainedModel)
    ):
        raise TypeError(
            f"teacher_model must be a PreTrainedModel, or the Hub id or folder of one, got {type(teacher).__name__}."
        )
    if objectives is not None and not isinstance(objectives, (list, tuple)):
        raise TypeError(f"objectives must be a list, got {objectives!r}. Write objectives=[{objectives!r}].")
    if not objectives and (teacher is not None or objectives is not None):
        raise ValueError(
            "objectives is empty, so there is nothing to train on. Give for example "
            "objectives=[TaskLoss(weight=0.5), LogitKD(temperature=2.0)], or neither teacher nor objectives."
        )
    terms = [as_objective(objective).copy() for objective in objectives or ()]
    orphans = [o.name for o in terms if o.uses_teacher]
    if teacher is None and orphans:
        raise ValueError(f"{', '.join(orphans)} compare with a teacher, but teacher_model is None. Give one.")
    if teacher is not None and not orphans:
        logger.warning("No objective uses the teacher, so it will not be run. Add LogitKD() to learn from it.")
    return terms


def loaded(teacher: Any, init_kwargs: Mapping[str, Any] | None) -> Any:
    """The teacher itself, loaded if it was named.

    Raises:
        ValueError: arguments to load it with, but it is loaded already.
    """
    if isinstance(teacher, (str, os.PathLike)):
        return load_teacher(str(teacher), init_kwargs)
    if init_kwargs is not None:
        raise ValueError(
            "teacher_init_kwargs says how to load a teacher, but teacher_model is "
            f"{'None' if teacher is None else 'loaded already'}. Give its Hub id or folder, or leave them out."
        )
    return teacher


def keep_gradient_(student: Any) -> None:
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
    models = [model for model in (trainer.model, trainer.teacher_model) if model is not None]
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
