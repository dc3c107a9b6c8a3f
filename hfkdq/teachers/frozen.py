# SPDX-License-Identifier: Apache-2.0
"""Teachers that are not trained: a frozen model, loaded and placed, and the moving average of the student."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, send_to_device
from transformers import PreTrainedModel

from ..fields import SHARE, check_rules, value_at
from ..modeling import load_checkpoint
from ..modeling.examples import model_inputs
from ..modeling.forwards import as_output, base_of, forward_columns, full_precision, output_kwargs, return_dict_kwargs
from ..modeling.own_modules import as_pretrained_
from ..modeling.placement import has_device_map, is_dispatched, place_frozen
from ..objectives.base import plain
from ..schedules import Schedule
from .base import Indices, Teacher, TeacherSource, fingerprint, refuse_shared_parameters


def load_teacher(name_or_path: str, init_kwargs: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """Loads a teacher from the Hub or a folder, as the class that its configuration names, from safetensors.

    Raises:
        ValueError: the configuration names no class that Transformers has, or `trust_remote_code` is set.
        OSError: nothing there to load.
    """
    arguments = dict(init_kwargs or {})
    if arguments.get("trust_remote_code"):
        raise ValueError(
            "trust_remote_code is set, but a teacher that is named is loaded as a class of Transformers, never with code "
            "of its repository. Load it yourself and give the model as teacher_model."
        )
    return load_checkpoint(name_or_path, **arguments)


class FrozenSource(TeacherSource):
    """A teacher that is given as a model, or as the Hub id or folder of one."""

    def __init__(self, given: Any) -> None:
        self._given = given
        self.to_load = isinstance(given, (str, os.PathLike))
        self.frozen_model = None if self.to_load else given

    def load(self, init_kwargs: Mapping[str, Any] | None) -> None:
        if self.to_load:
            self.frozen_model, self.to_load = load_teacher(str(self._given), init_kwargs), False

    def model_for(self, student: Any, student_is_remade: bool) -> Any:
        if not self._is_base_of(student):
            refuse_shared_parameters(self.frozen_model, student)
        elif student_is_remade:
            raise ValueError(
                "model_init makes a new student for every training, whose base model is not the teacher_model given. Give "
                "the student as model, or a teacher that was loaded on its own."
            )
        elif student.active_peft_config.is_prompt_learning:
            raise ValueError(
                "teacher_model is the base model of a student with virtual tokens, and PEFT cannot run every such student "
                "without them. Load the base model a second time and give that."
            )
        return self.frozen_model

    def _is_base_of(self, student: Any) -> bool:
        return base_of(student) is not student and self.frozen_model is base_of(student)

    def place(self, model: Any, student: Any, accelerator: Accelerator, label_names: list[str]) -> Teacher:
        adapted = student if self._is_base_of(student) else None
        return FrozenTeacher(model, accelerator, label_names, adapters_of=adapted)


def as_source(given: Any) -> TeacherSource:
    """A teacher that a user gave, models and their names wrapped; raises `TypeError` for anything else."""
    source = given if isinstance(given, TeacherSource) else FrozenSource(given)
    model = getattr(source, "model", source.frozen_model)
    if not (isinstance(base_of(as_pretrained_(model)), PreTrainedModel) or source.to_load or source.copies_student):
        raise TypeError(
            "teacher_model must be a PreTrainedModel, the Hub id or folder of one, an EMATeacher, a CoTrainedTeacher, "
            f"or a dict of such by name, got {type(model).__name__}."
        )
    return source


class FrozenTeacher(Teacher):
    """A teacher in eval mode, without gradients, on the device and under the autocast of the training.

    A model that was loaded with a `device_map` or by bitsandbytes stays where it is; its outputs are moved.

    Args:
        model (`PreTrainedModel` or `PeftModel`): the teacher; frozen in place.
        accelerator (`Accelerator`): that of the trainer.
        label_names (list of `str`): columns that are not fed to it.
        adapters_of (`PeftModel`, *optional*): the student, if the teacher is the student without its adapters. Nothing
            is frozen then, and no second copy is kept.
    """

    def __init__(self, model: Any, accelerator: Accelerator, label_names: list[str], adapters_of: Any = None) -> None:
        self.model = model
        self._base: Any = base_of(model)
        self._accelerator = accelerator
        self._adapters_of = adapters_of
        self._running = model if adapters_of is None else adapters_of
        self._label_names = label_names
        self.columns = forward_columns(model) - set(label_names)
        self.name = type(self._base).__name__  # FSDP changes the class
        self.fingerprint = f"{self.name}, the student without its adapters"
        if adapters_of is None:
            self.fingerprint = fingerprint(model)
            model.eval().requires_grad_(False)
            self._running = place_frozen(model, accelerator)
        self._stays = adapters_of is None and has_device_map(self._base) and not is_dispatched(self._base)

    def __call__(self, batch: Mapping[str, Any], needs: frozenset[str], indices: Indices, step: int) -> Any:
        """The teacher's output for a batch of optimizer step `step`, counted from 1. Of hidden states and attentions,
        all but those of `indices` are `None`."""
        training = self._running.training
        self._running.eval()
        try:
            with torch.no_grad(), self._autocast(), self._without_adapters():
                kwargs = {**output_kwargs(needs, indices), **return_dict_kwargs(self._base)}
                output = as_output(self._running(**self._inputs(batch), **kwargs))
        finally:
            self._running.train(training and self._adapters_of is not None)
        for name, read in indices.items():
            states = output.get(name)
            if states is not None and read is not None:
                output[name] = tuple(state if i in read else None for i, state in enumerate(states))
        output = send_to_device(output, self._accelerator.device)
        self._check_finite(output.get("logits"), step)
        return output

    def _autocast(self) -> AbstractContextManager[Any]:
        # One in half precision stays in its own: another may overflow in it, or mix types that no kernel takes.
        if self._base.dtype in (torch.float16, torch.bfloat16):
            return torch.autocast(self._accelerator.device.type, enabled=False)
        # A cast weight that is cached here would have no gradient when the student reads it from the cache.
        return self._accelerator.autocast(AutocastKwargs(cache_enabled=False))

    @contextlib.contextmanager
    def _without_adapters(self) -> Iterator[None]:
        if self._adapters_of is None:
            yield
            return
        kept = [(p, p.requires_grad) for p in self._adapters_of.parameters()]
        try:
            with self._adapters_of.disable_adapter(), full_precision(self._adapters_of):
                yield
        finally:  # PEFT makes every weight of the active adapter trainable, those frozen by the user too.
            for parameter, trained in kept:
                if parameter.requires_grad != trained:
                    parameter.requires_grad_(trained)

    def _inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        inputs = model_inputs(self._base, batch, self._label_names, as_teacher=True)
        if self._stays:
            inputs = send_to_device(inputs, self._base.device)
        kind = self._base.dtype
        floats = {n for n, value in inputs.items() if isinstance(value, torch.Tensor) and value.is_floating_point()}
        return {name: value.to(kind) if name in floats else value for name, value in inputs.items()}

    def _check_finite(self, logits: torch.Tensor | None, step: int) -> None:
        """Remembers the first step whose logits were not finite; raises at once on the CPU."""
        if logits is None:
            return
        bad = ~torch.isfinite(logits.amax(-1)).all()  # minus infinity rules a class out, but never all of them
        if bad.device.type == "cpu":
            self.raise_if_bad(step if bad else 0)
        else:  # Asking a GPU costs a synchronisation; the trainer does it once per logging step.
            before = self.first_bad_step
            if not isinstance(before, torch.Tensor):
                before = torch.zeros((), dtype=torch.long, device=bad.device)
            self.first_bad_step = torch.where(bad & (before == 0), step, before)

    def raise_if_bad(self, step: int) -> None:
        """Raises `RuntimeError` for the first step whose output was not finite; 0 is none."""
        self.first_bad_step = 0
        if step:
            raise RuntimeError(
                f"The teacher's logits were NaN or infinite at step {step}, so there is nothing to learn from them. "
                "Check the teacher's weights and that step's inputs; a teacher in float16 may overflow, try bfloat16 "
                "or float32."
            )


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
    decay: Annotated[float | Schedule, SHARE] = 0.999

    def __post_init__(self) -> None:
        check_rules(self)

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
