# SPDX-License-Identifier: Apache-2.0
"""What distillation adds to a Transformers `Trainer`.

Overrides small public hooks and always calls `super()`; knows neither quantization, pruning nor export, which are
callbacks and functions of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput, logging

from ..forwards import as_output, base_of, by_name, forward_columns, requested, without_gradient
from ..objectives.base import unique_names
from ..objectives.projections import Projections
from ..teachers import TEACHER_PREFIX, FrozenTeacher
from .arguments import instances, is_factory, keep_gradient_, loaded, refuse_unsupported, validated
from .keeping import KeepingMixin

logger = logging.get_logger(__name__)


class DistillationMixin(KeepingMixin):
    """What `DistillationTrainer` adds to a `Trainer`; put it before a trainer class of your own.

    `class MyDistillationTrainer(DistillationMixin, MyTrainer)` calls your `compute_loss` for the task loss, in training
    and in evaluation. A subclass of `DistillationTrainer` that overrides `compute_loss` gets the sum of all objectives
    from `super().compute_loss(...)` instead.
    """

    model_accepts_loss_kwargs: bool

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
        self.objectives = validated(
            teacher_model, objectives if self._make_objectives is None else self._make_objectives(None)
        )
        self.teacher_model = loaded(teacher_model, teacher_init_kwargs)
        self.strict_resume = strict_resume
        self._teacher: FrozenTeacher | None = None
        self._projections: Projections | None = None
        self._in_training = self._in_training_step = False
        self._positions: tuple[torch.Tensor, int] | None = None  # per objective, and the processes they are of
        super().__init__(*args, **kwargs)
        if self.objectives:
            refuse_unsupported(self)
            self._show_terms_in_notebooks()
            itself = self._attach(self.model)
            if self.teacher_model is not None:
                self._teacher = FrozenTeacher(
                    self.teacher_model, self.accelerator, self.label_names, adapters_of=self.model if itself else None
                )

    def _show_terms_in_notebooks(self) -> None:
        callbacks = self.callback_handler.callbacks
        for place, callback in enumerate(callbacks):
            if type(callback).__name__ == "NotebookProgressCallback":
                from .notebook import NotebookTermsCallback

                callbacks[place] = NotebookTermsCallback(lambda: unique_names(self.objectives))

    # ------------------------------------------------------------------ before training

    def _attach(self, student: Any) -> bool:
        """Lets every objective check the pair before anything is trained; whether the student teaches itself."""
        if not isinstance(base_of(student), PreTrainedModel):
            raise TypeError(
                f"Objectives read what Transformers models return; the student is a {type(student).__name__}. Give a "
                "PreTrainedModel, or a PeftModel around one."
            )
        itself = base_of(student) is not student and self.teacher_model is base_of(student)
        if itself and self.model_init is not None:
            raise ValueError(
                "model_init makes a new student for every training, whose base model is not the teacher_model given. "
                "Give the student as model, or a teacher that was loaded on its own."
            )
        if itself and student.active_peft_config.is_prompt_learning:
            raise ValueError(
                "teacher_model is the base model of a student with virtual tokens, and PEFT cannot run every such student "
                "without them. Load the base model a second time and give that."
            )
        keep_gradient_(student)
        trained = {id(p) for p in student.parameters() if p.requires_grad}
        teacher = None if itself else self.teacher_model
        if teacher is student or (teacher is not None and any(id(p) in trained for p in teacher.parameters())):
            raise ValueError(
                "teacher_model shares its parameters with the student, so it would be trained and frozen at once. "
                "Load it a second time or use copy.deepcopy; to learn from a PEFT student's own base model, give "
                "teacher_model=model.get_base_model()."
            )
        left_behind = getattr(student, Projections.NAME, None)
        if left_behind is not None:  # by another trainer of this student
            left_behind.remove(student)
        for objective in self.objectives:
            objective.attach(student, self.teacher_model)
        self._projections = getattr(student, Projections.NAME, None)
        if self._projections is not None:
            self._projections.in_state_dict = self._sharded
        return itself

    def call_model_init(self, trial: Any = None) -> PreTrainedModel:
        """As `Trainer.call_model_init`; makes objectives and callbacks anew where they were given as functions."""
        model = super().call_model_init(trial)
        if hasattr(self, "callback_handler"):  # not while the trainer itself is being made
            if self._make_objectives is not None:
                self.objectives = validated(self.teacher_model, self._make_objectives(trial))
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
        if self._teacher is not None:
            columns = self._teacher.columns | {TEACHER_PREFIX + name for name in self._teacher.columns}
            self._signature_columns += sorted(columns - set(self._signature_columns))

    # ------------------------------------------------------------------ training

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`; afterwards the student is as it was built, without projections.

        `resume_from_checkpoint=True` goes on from the newest checkpoint that was written to the end.

        Raises:
            ValueError: the checkpoint was cut off, or written with another teacher or other objectives.
        """
        if not self.objectives:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        resume_from_checkpoint = self._whole(resume_from_checkpoint)
        self._log_window = self._resumed_window = None
        if self.is_deepspeed_enabled and isinstance(resume_from_checkpoint, str):
            self._take_up(resume_from_checkpoint)  # Trainer loads its checkpoints by another way
        self._in_training = True
        if self._projections is not None and self.model_init is None:  # else `call_model_init` makes new ones
            self._projections.install(self.model)
            self._add_projections_to_optimizer()
        try:
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._in_training = False
            self._positions = self._log_window = self._resumed_window = None
            if self._projections is not None:
                self._projections.remove(self.model)
        self._record()
        return output

    def _add_projections_to_optimizer(self) -> None:
        """Lets an optimizer that was made before the projections train them too."""
        if self.optimizer is not None and self._projections is not None:
            held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
            missing = [p for p in self._projections.maps.parameters() if id(p) not in held]
            # In a group of its own they would be one more than a learning rate schedule knows of.
            self.optimizer.param_groups[0]["params"] += missing

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.get_batch_samples`; counts the positions of every objective over the accumulation window."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        if self.objectives and batches:
            counts = torch.stack([self._count(sum(o.positions(b) for b in batches)) for o in self.objectives])
            processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            if processes > 1:
                counts = self.accelerator.gather(counts.unsqueeze(0)).sum(0)
            self._positions = counts, processes
        return batches, items

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.training_step`, on the sum of all objectives."""
        if not self.objectives:
            return super().training_step(model, inputs, *args, **kwargs)
        # Trainer then divides by the accumulation steps on every version, which `compute_loss` counts on.
        self._forward_takes_items = self.model_accepts_loss_kwargs
        self.model_accepts_loss_kwargs, self._in_training_step = False, True
        alone = None if self._in_training else self._projections  # a step that the user takes without `train`
        if alone is not None:
            alone.install(self.model)
        try:
            loss = super().training_step(model, inputs, *args, **kwargs)
        except BaseException:
            self._log_window = None  # auto_find_batch_size begins again
            raise
        finally:
            self.model_accepts_loss_kwargs, self._in_training_step = self._forward_takes_items, False
            if alone is not None:
                alone.remove(self.model)
        return self._to_log(loss)

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
        teacher_out = None
        if teacher is not None:
            teacher_out = teacher(batch, needs, self._read_of(1), step=self.state.global_step + 1)
        student_out = self._run_student(model, student_inputs, needs, batch, num_items_in_batch)
        loss = self._weighted_sum(student_out, teacher_out, batch)
        return (loss, student_out) if return_outputs else loss

    def _student_inputs(self, inputs: Any) -> Any:
        if self._teacher is None:
            return inputs
        own = forward_columns(self.model)
        # A signature of `**inputs` alone does not tell what the student takes.
        others = self._teacher.columns if base_of(self.model).main_input_name in own else set[str]()
        foreign = {k for k in inputs if k not in own and (k in others or k.startswith(TEACHER_PREFIX))}
        return {key: value for key, value in inputs.items() if key not in foreign} if foreign else inputs

    def _read_of(self, role: int) -> dict[str, frozenset[int] | None]:
        """Which hidden states and attentions objectives read of the student (0) or the teacher (1)."""
        read: dict[str, frozenset[int] | None] = {}
        for need in ("hidden_states", "attentions"):
            parts = [o.indices(need) for o in self.objectives if need in o.needs]
            read[need] = None if None in parts else frozenset[int]().union(*(part[role] for part in parts if part))
        return read

    def _run_student(
        self, model: nn.Module, inputs: dict[str, Any], needs: frozenset[str], batch: dict[str, Any], items: Any
    ) -> Any:
        """The student's output; its `loss` is the task loss, a mean over this micro batch."""
        inputs = {**inputs, **requested(needs, self._read_of(0)), **by_name(self.model)}
        if self.args.use_liger_kernel and "skip_logits" in forward_columns(self.model):
            inputs["skip_logits"] = "logits" not in needs
        if "loss" not in needs:
            output = model(**inputs)
        elif self.compute_loss_func is not None:
            task, output = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=items)
        else:
            if self._forward_takes_items:
                task_loss = next(o for o in self.objectives if "loss" in o.needs)
                inputs["num_items_in_batch"] = torch.as_tensor(task_loss.positions(batch)).clamp(min=1)
            task, output = super().compute_loss(model, inputs, return_outputs=True)
        output = as_output(output)
        if "loss" in needs and isinstance(output, ModelOutput) and without_gradient(output, needs):
            logger.warning_once(
                f"The compute_loss that {type(self).__name__} inherits returns outputs without gradient, so the student "
                "runs a second time in every step for the objectives."
            )
            output = as_output(model(**{k: v for k, v in inputs.items() if k not in ("labels", "num_items_in_batch")}))
        if not isinstance(output, ModelOutput) or ("logits" in needs and output.get("logits") is None):
            found = ", ".join(output) if isinstance(output, ModelOutput) else type(output).__name__
            raise TypeError(
                f"{type(base_of(self.model)).__name__} returned {found} in training; objectives read a ModelOutput"
                f"{' with logits' if 'logits' in needs else ''}. Return one from its forward pass."
            )
        if "loss" in needs:
            output["loss"] = task
        return output

    def _weighted_sum(self, student_out: Any, teacher_out: Any, batch: dict[str, Any]) -> torch.Tensor:
        """Sum of weight * (sum over this micro batch) / (positions of the window), per objective."""
        # A `compute_loss_func` normalises by itself, and Trainer then does not divide by the accumulation steps.
        own_scale = self.compute_loss_func is not None
        steps = 1 if own_scale else getattr(self, "current_gradient_accumulation_steps", 1)
        progress = self.state.global_step / max(self.state.max_steps, 1)
        terms: list[torch.Tensor] = []
        loss: Any = 0.0
        for index, objective in enumerate(self.objectives):
            objective.set_progress(progress)
            with torch.autocast(self.args.device.type, enabled=False):
                mean, count = objective(student_out, teacher_out, batch)
            if not (own_scale and "loss" in objective.needs):
                # The mean over no position at all is NaN in most models.
                count = self._count(count)
                mean = torch.where(count > 0, mean.float(), torch.zeros_like(mean, dtype=torch.float32))
                if self._positions is not None:
                    mean = mean * (count / self._positions[0][index].clamp(min=1) * self._positions[1])
            terms.append(mean.float())
            loss = loss + objective.current(objective.weight) * terms[-1]
        self._terms = torch.stack(terms).detach()
        return loss * steps  # type: ignore[no-any-return]

    def _count(self, positions: torch.Tensor | int) -> torch.Tensor:
        """A number of positions on the device; copying one there would make the host wait."""
        if isinstance(positions, torch.Tensor):
            return positions.to(self.args.device)
        return torch.full((), positions, device=self.args.device)

    # ------------------------------------------------------------------ evaluation and card

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.prediction_step`, without the columns that are the teacher's alone."""
        return super().prediction_step(model, self._student_inputs(inputs), *args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As `Trainer.create_model_card`, with the tag `distillation`."""
        if self.objectives and len(args) < 3:
            tags = kwargs.get("tags") or []
            kwargs["tags"] = [*([tags] if isinstance(tags, str) else tags), "distillation"]
        super().create_model_card(*args, **kwargs)
