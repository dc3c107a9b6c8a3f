# SPDX-License-Identifier: Apache-2.0
"""`DistillationTrainer`: the Transformers `Trainer` with a teacher and objectives.

Overrides small public hooks and always calls `super()`; knows neither quantization, pruning nor export, which are
callbacks and functions of their own.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.utils import ModelOutput, logging

from .facts import record_fact
from .objectives.base import Objective, as_objective
from .objectives.hidden_states import Projections
from .teachers import FrozenTeacher, forward_columns, requested

logger = logging.get_logger(__name__)

PROJECTIONS_FILE = "distillation.safetensors"


if TYPE_CHECKING:  # What the methods of the mixin may count on; the class that uses it puts a trainer behind it.
    from transformers import Trainer as _TrainerBase
else:
    _TrainerBase = object


class DistillationMixin(_TrainerBase):
    """What `DistillationTrainer` adds to a `Trainer`; put it before a trainer class of your own.

    `class MyDistillationTrainer(DistillationMixin, MyTrainer)` calls your `compute_loss` for the task loss.
    """

    model_accepts_loss_kwargs: bool

    def __init__(
        self,
        *args: Any,
        teacher_model: PreTrainedModel | None = None,
        objectives: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.objectives = _validated(teacher_model, objectives)
        self.teacher_model = teacher_model
        self._teacher: FrozenTeacher | None = None
        self._projections: Projections | None = None
        self._attached = self._in_training_step = False
        self._window: tuple[torch.Tensor, int] | None = None  # positions per objective, and processes they are of
        self._log_sums: torch.Tensor | None = None
        self._log_start = 0
        super().__init__(*args, **kwargs)
        if self.objectives:
            self._refuse_unsupported()
            self._attach(self.model)
            if teacher_model is not None:
                self._teacher = FrozenTeacher(teacher_model, self.accelerator, self.label_names)
                self._teacher_only = self._teacher.columns - forward_columns(self.model)

    @property
    def _used_teacher(self) -> FrozenTeacher | None:
        return self._teacher if any(o.uses_teacher for o in self.objectives) else None

    # ------------------------------------------------------------------ before training

    def _refuse_unsupported(self) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise NotImplementedError(
                "This release distils on one device or under DDP; FSDP and DeepSpeed would need the teacher to be "
                "sharded too. Launch without them."
            )
        if self.args.n_gpu > 1:
            raise NotImplementedError(
                f"torch.nn.DataParallel over {self.args.n_gpu} GPUs is not supported; use `accelerate launch`, which "
                "runs one process per GPU, or set CUDA_VISIBLE_DEVICES to one of them."
            )
        reentrant = (self.args.gradient_checkpointing_kwargs or {}).get("use_reentrant", True)
        if self.args.gradient_checkpointing and reentrant and any("attentions" in o.needs for o in self.objectives):
            raise ValueError(
                "Reentrant gradient checkpointing cuts attentions off from the gradient, so AttentionKD would train "
                "nothing. Set gradient_checkpointing_kwargs={'use_reentrant': False}."
            )

    def _attach(self, student: PreTrainedModel) -> None:
        """Lets every objective check the pair, before anything is trained."""
        if self.teacher_model is not None:
            shared = {id(p) for p in self.teacher_model.parameters()} & {id(p) for p in student.parameters()}
            if self.teacher_model is student or shared:
                raise ValueError(
                    "teacher_model shares its parameters with the student, so it would be trained and frozen at once. "
                    "Load it a second time or use copy.deepcopy."
                )
        for objective in self.objectives:
            objective.attach(student, self.teacher_model)
        self._projections = getattr(student, Projections.NAME, None)
        self._attached = True

    def call_model_init(self, trial: Any = None) -> PreTrainedModel:
        model = super().call_model_init(trial)
        if self._attached:
            self._attach(model)
        return model

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self._teacher is not None:
            self._signature_columns += sorted(self._teacher_only - set(self._signature_columns))

    # ------------------------------------------------------------------ training

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`; afterwards the student is as it was built, without projections."""
        if self._projections is not None:
            self._projections.install(self.model)
        try:
            output = super().train(*args, **kwargs)
        finally:
            self._window = self._log_sums = None
            if self._projections is not None:
                self._projections.remove(self.model)
        self._record()
        return output

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.get_batch_samples`; counts the positions of every objective over the accumulation window."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        if self.objectives and batches:
            counts = torch.stack(
                [torch.stack([torch.as_tensor(o.positions(b)) for b in batches]).sum() for o in self.objectives]
            ).to(self.args.device)
            processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            if processes > 1:
                counts = self.accelerator.gather(counts.unsqueeze(0)).sum(0)
            self._window = counts, processes
        return batches, items

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.training_step`, on the sum of all objectives."""
        if not self.objectives:
            return super().training_step(model, inputs, *args, **kwargs)
        # Trainer then divides by the accumulation steps on every version, which `compute_loss` counts on.
        self._forward_takes_items = self.model_accepts_loss_kwargs
        self.model_accepts_loss_kwargs, self._in_training_step = False, True
        try:
            return super().training_step(model, inputs, *args, **kwargs)
        finally:
            self.model_accepts_loss_kwargs, self._in_training_step = self._forward_takes_items, False

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
        if not self._in_training_step:
            return super().compute_loss(
                model, student_inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch, **kwargs
            )
        batch = dict(inputs)
        needs = frozenset[str]().union(*(o.needs for o in self.objectives))
        teacher = self._used_teacher
        teacher_out = None if teacher is None else teacher(batch, needs, step=self.state.global_step + 1)
        student_out = self._run_student(model, student_inputs, needs, batch, num_items_in_batch)
        loss = self._weighted_sum(student_out, teacher_out, batch)
        return (loss, student_out) if return_outputs else loss

    def _student_inputs(self, inputs: Any) -> Any:
        if self._teacher is None or not self._teacher_only:
            return inputs
        return {key: value for key, value in inputs.items() if key not in self._teacher_only}

    def _run_student(
        self, model: nn.Module, inputs: dict[str, Any], needs: frozenset[str], batch: dict[str, Any], items: Any
    ) -> Any:
        """The student's output; its `loss` is the task loss, a mean over this micro batch."""
        inputs = {**inputs, **requested(needs)}
        if "loss" not in needs:
            output = model(**inputs)
        elif self.compute_loss_func is not None:
            task, output = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=items)
        else:
            if self._forward_takes_items:
                task_loss = next(o for o in self.objectives if "loss" in o.needs)
                inputs["num_items_in_batch"] = torch.as_tensor(task_loss.positions(batch)).clamp(min=1)
            task, output = super().compute_loss(model, inputs, return_outputs=True)
        if not isinstance(output, ModelOutput):
            raise TypeError(
                f"{type(self.model).__name__} returned {type(output).__name__}; objectives read a ModelOutput. "
                "Set config.return_dict=True."
            )
        if "loss" in needs:
            output.loss = task
        return output

    def _weighted_sum(self, student_out: Any, teacher_out: Any, batch: dict[str, Any]) -> torch.Tensor:
        """Sum of weight * (sum over this micro batch) / (positions of the window), per objective."""
        # A `compute_loss_func` normalises by itself, and Trainer then does not divide by the accumulation steps.
        own_scale = self.compute_loss_func is not None
        steps = 1 if own_scale else getattr(self, "current_gradient_accumulation_steps", 1)
        progress = self.state.global_step / max(self.state.max_steps, 1)
        means, factors, weights = [], [], []
        for index, objective in enumerate(self.objectives):
            objective.set_progress(progress)
            with torch.autocast(self.args.device.type, enabled=False):
                mean, count = objective(student_out, teacher_out, batch)
            count = torch.as_tensor(count, device=mean.device)
            total, processes = (count, 1) if self._window is None else (self._window[0][index], self._window[1])
            done = own_scale and "loss" in objective.needs
            factors.append(torch.ones_like(mean) if done else count / total.clamp(min=1) * processes)
            means.append(mean)
            weights.append(objective.current(objective.weight))
        terms = torch.stack([m.float() * f for m, f in zip(means, factors, strict=True)])
        self._accumulate(terms.detach())
        return (terms * terms.new_tensor(weights)).sum() * steps

    # ------------------------------------------------------------------ logs

    def _accumulate(self, terms: torch.Tensor) -> None:
        if self._log_sums is None:
            self._log_sums, self._log_start = torch.zeros_like(terms), self.state.global_step
        self._log_sums += terms

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As `Trainer.log`; adds the unweighted mean of every objective since the last time."""
        if self._teacher is not None:
            self._teacher.raise_if_nan()
        if "loss" in logs and self._log_sums is not None:
            means = self.accelerator.gather(self._log_sums.unsqueeze(0)).mean(0)
            steps = max(self.state.global_step - self._log_start, 1)
            for name, value in zip(_unique_names(self.objectives), (means / steps).tolist(), strict=True):
                logs[name] = float(f"{value:.5g}")
            self._log_sums = None
        super().log(logs, *args, **kwargs)

    # ------------------------------------------------------------------ evaluation and files

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.prediction_step`, without the columns that are the teacher's alone."""
        return super().prediction_step(model, self._student_inputs(inputs), *args, **kwargs)

    def _record(self) -> None:
        if self.objectives:
            fact = {"objectives": [o.describe() for o in self.objectives], "steps": self.state.global_step}
            if self._used_teacher is not None:
                fact["teacher"] = type(self.teacher_model).__name__
            record_fact(self.model, "distillation", fact)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        self._record()
        super()._save(output_dir, state_dict)
        if self._projections is not None and hasattr(self.model, Projections.NAME) and self.args.should_save:
            weights = {key: value.contiguous() for key, value in self._projections.maps.state_dict().items()}
            save_file(weights, os.path.join(output_dir or self.args.output_dir, PROJECTIONS_FILE))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self._projections is not None:
            file = Path(resume_from_checkpoint, PROJECTIONS_FILE)
            if not file.is_file():
                raise ValueError(
                    f"{resume_from_checkpoint} holds no {PROJECTIONS_FILE}, but these objectives train projections: it was "
                    "written with other objectives. Resume with the same ones, or start from its weights."
                )
            self._projections.maps.load_state_dict(load_file(file))


class DistillationTrainer(DistillationMixin, Trainer):
    """The Transformers `Trainer` with a teacher.

    Takes everything `Trainer` takes, in the same positions, with plain `TrainingArguments`. Without `objectives` it is
    `Trainer`. Loss terms are means over all valid positions of an optimizer step, over accumulated micro batches and
    processes alike; every term is logged under its own name. Evaluation is plain `Trainer`: the teacher is not run.

    Args:
        args, kwargs: what `transformers.Trainer` takes.
        teacher_model (`PreTrainedModel`, *optional*): the model to learn from. It is frozen and put into eval mode in
            place, and is in no optimizer and no checkpoint.
        objectives (list of objectives or callables, *optional*): the terms of the training loss, such as
            `[TaskLoss(weight=0.5), LogitKD(temperature=2.0)]`. A callable `f(student_out, teacher_out, batch)` returns
            a mean over the examples.

    Raises:
        ValueError: no objectives for a teacher, objectives that need one where there is none, a teacher that shares
            parameters with the student, or an objective that does not fit the pair.
        TypeError: a teacher that is no `PreTrainedModel`, or an objective that cannot be called.
        NotImplementedError: FSDP, DeepSpeed or `torch.nn.DataParallel`.
        RuntimeError: while training, at the first step at which the teacher's logits are not finite.

    Example:
        ```python
        trainer = DistillationTrainer(
            model=student, teacher_model=teacher, args=TrainingArguments("out"),
            objectives=[TaskLoss(weight=0.5), LogitKD(temperature=2.0)],
            train_dataset=train, eval_dataset=dev, processing_class=tokenizer)
        trainer.train()
        ```
    """


def _validated(teacher: Any, objectives: Sequence[Any] | None) -> list[Objective]:
    if teacher is not None and not isinstance(teacher, PreTrainedModel):
        raise TypeError(
            f"teacher_model must be a PreTrainedModel, got {type(teacher).__name__}. Load it first, for example with "
            "AutoModelForSequenceClassification.from_pretrained(...)."
        )
    if objectives is not None and not isinstance(objectives, (list, tuple)):
        raise TypeError(f"objectives must be a list, got {objectives!r}. Write objectives=[{objectives!r}].")
    if not objectives and (teacher is not None or objectives is not None):
        raise ValueError(
            "objectives is empty, so there is nothing to train on. Give for example "
            "objectives=[TaskLoss(weight=0.5), LogitKD(temperature=2.0)], or neither teacher nor objectives."
        )
    terms = [as_objective(objective) for objective in objectives or ()]
    orphans = [o.name for o in terms if o.uses_teacher]
    if teacher is None and orphans:
        raise ValueError(f"{', '.join(orphans)} compare with a teacher, but teacher_model is None. Give one.")
    if teacher is not None and not orphans:
        logger.warning("No objective uses the teacher, so it will not be run. Add LogitKD() to learn from it.")
    return terms


def _unique_names(objectives: Sequence[Objective]) -> list[str]:
    names: list[str] = []
    for objective in objectives:
        count = sum(name == objective.name or name.startswith(f"{objective.name}_") for name in names)
        names.append(f"{objective.name}_{count + 1}" if count else objective.name)
    return names
