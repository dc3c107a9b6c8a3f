# SPDX-License-Identifier: Apache-2.0
"""Adds distillation to a Transformers `Trainer`: overrides its public hooks, and calls `super()` in each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.utils import logging

from ..caching import CachedCollator
from ..caching.teacher import cached_source
from ..modeling.examples import tried_on
from ..modeling.forwards import TEACHER_PREFIX
from ..objectives.projections import Projections
from ..teachers import PeerParameters, check_vocabulary
from . import arguments, checkpoints
from .distillation import TOO_LATE, Distillation
from .loss_log import LossLog, check_finite, check_gradient, check_weights
from .step import KeptGraph, MicroBatch, RunningStep, Window, open_window
from .terms import SINGLE

logger = logging.get_logger(__name__)

if TYPE_CHECKING:  # The class that uses the mixin puts a trainer behind it.
    from transformers import Trainer as _TrainerBase
else:
    _TrainerBase = object


class DistillationMixin(_TrainerBase):
    """Adds teachers and objectives to a `Trainer`; put it before a trainer class of your own.

    `class MyDistillationTrainer(DistillationMixin, MyTrainer)` calls your `compute_loss` for the task loss, in training
    and in evaluation. A subclass of `DistillationTrainer` that overrides `compute_loss` gets the sum of all objectives
    from `super().compute_loss(...)` instead.

    Overrides these methods of `Trainer`, and calls `super()` in each; without objectives that is all they do:

    - `train`, `call_model_init`: install projections and peers in the student, for every training and every new student.
    - `get_batch_samples`, `training_step`, `compute_loss`: the weighted sum of all objectives over an optimizer step.
    - `prediction_step`, `_set_signature_columns_if_needed`: columns that the teacher alone takes.
    - `log`: the mean of every objective, and the check that all is finite.
    - `save_model`, `_save`, `_load_from_checkpoint`, `_load_optimizer_and_scheduler`: the state of the distillation in
      checkpoints, and neither projections nor access tokens in what is saved.
    - `create_model_card`: the tag `distillation`.

    Attributes:
        objectives (list of [`Objective`]): the terms of the loss, copies of those given.
        strict_resume (`bool`): whether a checkpoint of another training is refused.
    """

    model_accepts_loss_kwargs: bool
    loss_is_scaled_for_ga: bool | None
    data_collator: Any

    def __init__(
        self,
        *args: Any,
        teacher_model: Any = None,
        teacher_init_kwargs: Mapping[str, Any] | None = None,
        objectives: Any = None,
        strict_resume: bool = True,
        example_inputs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self._factories = arguments.TrialFactories(objectives, kwargs.get("callbacks"))
        if "callbacks" in kwargs:
            kwargs["callbacks"] = self._factories.callbacks(None, kwargs["callbacks"])
        self._sources = arguments.teacher_sources(teacher_model)
        self.objectives = arguments.validated(self._sources, self._factories.objectives(None, objectives))
        arguments.load_teachers(self._sources, teacher_init_kwargs)
        self.strict_resume = strict_resume
        self._example_inputs = example_inputs
        self._distillation: Distillation | None = None
        self._loss_log = LossLog()
        self._window: Window | None = None  # of the gradient accumulation that runs
        self._running_step: RunningStep | None = None
        self._kept: KeptGraph | None = None
        self._is_resumed = False
        with tried_on(example_inputs, kwargs.get("model", args[0] if args else None)):  # callbacks try the model too
            super().__init__(*args, **kwargs)
        arguments.keep_tokens_back_(self.args)
        if not self.objectives:
            return
        compares = any(objective.uses_teacher for objective in self.objectives)
        if compares and (cached := cached_source(self.train_dataset, list(self._sources.values()))):
            self._sources = {SINGLE: cached}
            self.data_collator = CachedCollator(self.data_collator, cached.info)
        arguments.require_teacher(self.objectives, self._sources)
        arguments.refuse_unsupported(self, self.objectives, self._sources.values())
        arguments.keep_attentions_in_gradient_(self.args, self.objectives)
        self._show_terms_in_notebooks()
        self._distillation = self._attached(self.model)
        for name, teacher in self._distillation.teachers.items():
            told = "The teacher" if name == SINGLE else f"The teacher {name}"
            check_vocabulary(teacher.model, told, self.train_dataset, self.model)

    @property
    def teacher_model(self) -> Any:
        """The model to learn from; of several teachers a dict of them by name."""
        teachers = {} if self._distillation is None else self._distillation.teachers
        models = {name: teacher.model for name, teacher in teachers.items() if teacher.model is not None}
        return models.get(SINGLE) if models.keys() <= {SINGLE} else models

    def _attached(self, student: Any) -> Distillation:
        return Distillation(
            student, self.objectives, self._sources, accelerator=self.accelerator, label_names=self.label_names,
            student_is_remade=self.model_init is not None,
            sharded=bool(self.is_fsdp_enabled or self.is_deepspeed_enabled),
            placed={} if self._distillation is None else self._distillation.teachers, example=self._example_inputs,
            rows=lambda: arguments.first_batch(self, student, self._sources.values()),
        )  # fmt: skip

    def _attach_to(self, batch: Any) -> None:
        """Attaches the objectives to the first batch of a training, where no example could be had before."""
        if self._distillation is not None and not self._distillation.attached:
            is_late = self._is_resumed or self.accelerator.num_processes > 1
            self._distillation.attach(self.model, batch, self.optimizer, is_late)

    def call_model_init(self, trial: Any = None) -> PreTrainedModel:
        """As `Trainer.call_model_init`; makes objectives and callbacks anew where they were given as functions."""
        model = super().call_model_init(trial)
        if hasattr(self, "callback_handler"):  # not while the trainer itself is being made
            if self._distillation is not None:
                installed = self._distillation.installed
                self._distillation.remove(self.model)
                if self._factories.make_objectives:
                    self.objectives = arguments.validated(self._sources, self._factories.objectives(trial, None))
                self._distillation = self._attached(model)
                if installed:
                    self._distillation.install(model)
            self._factories.replace_callbacks(self, trial, model)
        return model

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`; afterwards the student is as it was built, without projections.

        `resume_from_checkpoint=True` goes on from the newest checkpoint that was written to the end.

        Raises:
            ValueError: the checkpoint was cut off, or written with another teacher or other objectives.
        """
        arguments.report_last_(self)
        if self._distillation is None:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        resume_from_checkpoint = checkpoints.resolve(resume_from_checkpoint, str(self.args.output_dir))
        self._loss_log.clear()
        self._distillation.updated_at = None
        if self.is_deepspeed_enabled and isinstance(resume_from_checkpoint, str):
            self._load_distillation_state(resume_from_checkpoint)  # Trainer loads its checkpoints by another way
        self._distillation.install(self.model, self.optimizer)
        self._is_resumed = bool(resume_from_checkpoint)
        try:
            output = super().train(resume_from_checkpoint, *args, **kwargs)
            self._update_teachers()
        except KeyboardInterrupt:
            done = f"Interrupted at step {self.state.global_step} of {self.state.max_steps}."
            logger.warning(f"{done} {checkpoints.how_to_go_on(str(self.args.output_dir))}")
            raise
        finally:
            self._window = self._kept = None
            self._loss_log.clear()
            self._distillation.remove(self.model)
        self._distillation.record(self.model, self.state.global_step)
        if not self._distillation.sharded:
            check_weights(self.model)
        return output

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.get_batch_samples`; counts the positions of every objective over the accumulation window."""
        if self._distillation is None:
            return super().get_batch_samples(*args, **kwargs)
        self._distillation.weighting.adapt(self.accelerator)
        batches, items = super().get_batch_samples(*args, **kwargs)
        if batches:
            self._attach_to(batches[0])
            processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            self._window = open_window(self._distillation.terms, batches, self.accelerator, processes)
        return batches, items

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.training_step`, on the sum of all objectives."""
        if self._distillation is None:
            return super().training_step(model, inputs, *args, **kwargs)
        self._attach_to(inputs)
        alone = not self._distillation.installed  # a step that the user takes without `train`
        if alone:
            self._distillation.install(self.model)
        self._update_teachers()
        if self._kept is not None and not self._kept.fits:
            self._kept = None
        step = self._running_step = RunningStep(takes_items=self.model_accepts_loss_kwargs)
        # Trainer reads it: it then divides by the accumulation steps on every version, also what a subclass adds.
        self.model_accepts_loss_kwargs = False
        try:
            loss = super().training_step(model, inputs, *args, **kwargs)
        except BaseException:
            self._loss_log.sums = self._kept = None  # auto_find_batch_size begins again
            raise
        finally:
            self.model_accepts_loss_kwargs, self._running_step = step.takes_items, None
            if alone:
                self._distillation.remove(self.model)
        alone = alone or self.accelerator.num_processes > 1 or bool(self._distillation.peers)
        self._kept = None if alone else KeptGraph.of(step, self.model)
        # A `compute_loss` of the user's need not call this one.
        return loss if step.terms is None else self._add_to_log(self._distillation, step.terms, loss)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        """In training the weighted sum of all objectives, elsewhere the task loss as `Trainer` computes it."""
        student_inputs = self._student_inputs(inputs)
        if self._distillation is None or self._running_step is None:
            return super().compute_loss(
                model, student_inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch, **kwargs
            )
        # Whether the loss is scaled for gradient accumulation already, so that `Trainer` does not divide it: so says 5.x.
        scaled = self.loss_is_scaled_for_ga if hasattr(Trainer, "loss_is_scaled_for_ga") else None
        step = self._running_step
        step.loss, step.terms, output = MicroBatch(
            distillation=self._distillation, student=self.model, wrapped=model, batch=dict(inputs),
            inputs=student_inputs, step=self.state.global_step,
            progress=self.state.global_step / max(self.state.max_steps, 1), accelerator=self.accelerator,
            task_loss=super().compute_loss,
            loss_is_scaled=self.compute_loss_func is not None if scaled is None else scaled,
            takes_items=step.takes_items, items=num_items_in_batch,
            skips_logits=bool(self.args.use_liger_kernel),
            accumulated=getattr(self, "current_gradient_accumulation_steps", 1), window=self._window,
        ).loss(return_outputs)  # fmt: skip
        return (step.loss, output) if return_outputs else step.loss

    def _student_inputs(self, inputs: Any) -> Any:
        return inputs if self._distillation is None else self._distillation.student_inputs(self.model, inputs)

    def _update_teachers(self) -> None:
        if self._distillation is not None:
            self._distillation.update_teachers(self.model, self.state.global_step, self.state.max_steps)

    def _add_to_log(self, distillation: Distillation, terms: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        """Adds terms and loss of a micro batch to the next log; returns the loss for Trainer's own sum."""
        values, step = torch.cat([terms, loss.detach().float().reshape(1)]), self.state.global_step
        if values.device.type == "cpu":  # elsewhere asking costs a synchronisation, so that the next log asks
            check_finite([*distillation.names, "loss"], values.tolist(), self.accelerator, step)
        resumed = self._loss_log.add(values, step)
        if resumed is not None:
            # Trainer forgets what it summed up since its last log; this makes it go on from there.
            self._globalstep_last_logged, summed = resumed
            loss = summed.to(loss.dtype) + loss
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As `Trainer.log`; adds the unweighted mean of every objective since the last time."""
        if self._distillation is not None:
            step, teachers = self.state.global_step, self._distillation.teachers.values()
            self._update_teachers()  # the last of these comes before callbacks take the trained model apart
            if "loss" in logs:
                logs.update(self._loss_log.close(self._distillation.names, teachers, self.accelerator, step))
            elif "train_loss" in logs:
                for teacher in teachers:
                    teacher.raise_if_bad(int(teacher.first_bad_step))
            check_gradient(logs.get("grad_norm"), self.accelerator, step)
        super().log(logs, *args, **kwargs)

    def _show_terms_in_notebooks(self) -> None:
        callbacks = self.callback_handler.callbacks
        for place, callback in enumerate(callbacks):
            if type(callback).__name__ == "NotebookProgressCallback":
                from .notebook import NotebookTermsCallback

                callbacks[place] = NotebookTermsCallback(
                    lambda: self._distillation.names if self._distillation else []
                )

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.prediction_step`, without the columns that are the teacher's alone."""
        return super().prediction_step(model, self._student_inputs(inputs), *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = set[str]() if self._distillation is None else set(self._distillation.columns)
        columns |= {TEACHER_PREFIX + name for name in (*columns, *self.label_names)} if columns else set()
        own: list[str] = self._signature_columns or []
        self._signature_columns = [*own, *sorted(columns - set(own))]  # type: ignore[assignment]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As `Trainer.create_model_card`, with the tag `distillation`."""
        if self.objectives and len(args) < 3:
            tags = kwargs.get("tags") or []
            kwargs["tags"] = [*([tags] if isinstance(tags, str) else tags), "distillation"]
        super().create_model_card(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self._distillation is not None:
            self._distillation.record(self.model, self.state.global_step)
        arguments.keep_tokens_back_(self.args)  # they may have been given since
        if state_dict is not None:
            auxiliary = (Projections.NAME, PeerParameters.NAME)
            state_dict = {k: v for k, v in state_dict.items() if not any(name in k for name in auxiliary)}
        super()._save(output_dir, state_dict)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`; a checkpoint also gets the state of the distillation."""
        folder, distillation = Path(str(output_dir or self.args.output_dir)), self._distillation
        is_checkpoint = _internal_call and folder != Path(str(self.args.output_dir))
        if distillation is None or not distillation.installed or not is_checkpoint:
            super().save_model(output_dir, _internal_call)
            return
        self._update_teachers()
        if self.args.should_save:
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)  # so that it is not taken for complete
        super().save_model(output_dir, _internal_call)
        step = self.state.global_step
        checkpoints.save(str(folder), distillation, self._loss_log, self.args, self.accelerator, step)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self.is_deepspeed_enabled:
            self._load_distillation_state(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_distillation_state(self, checkpoint: str) -> None:
        if self._distillation is not None:
            checkpoints.load(checkpoint, self._distillation, self._loss_log, self.args, self.strict_resume)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        distillation = self._distillation
        changed = checkpoint and distillation and checkpoints.config_changes(checkpoint, distillation)
        is_late = distillation is not None and not distillation.attached
        if (
            not checkpoint
            or not (changed or is_late)
            or checkpoints.optimizer_fits(self.optimizer.param_groups, checkpoint)  # type: ignore[union-attr]
        ):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        if is_late:
            raise ValueError(TOO_LATE)
        logger.warning(f"The optimizer starts anew, as {checkpoint} has the state of one of other projections.")
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True))  # type: ignore[union-attr]
