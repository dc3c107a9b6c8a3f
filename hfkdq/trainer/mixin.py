# SPDX-License-Identifier: Apache-2.0
"""What distillation adds to a Transformers `Trainer`.

Overrides small public hooks and always calls `super()`; knows neither quantization, pruning nor export, which are
callbacks and functions of their own.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel
from transformers.utils import ModelOutput, logging

from ..modeling.forwards import (
    TEACHER_PREFIX,
    accepts_num_items,
    as_output,
    base_of,
    forward_columns,
    no_logits,
    output_kwargs,
    return_dict_kwargs,
    without_gradient,
)
from ..objectives.base import TrainingStep
from ..objectives.quantization_loss import QuantizationLoss
from ..schedules import value_at
from ..teachers import without_graph
from .attaching import AttachingMixin
from .passes import TermPasses, not_synchronised
from .terms import STUDENT, Term, required_outputs

logger = logging.get_logger(__name__)


class DistillationMixin(AttachingMixin):
    """What `DistillationTrainer` adds to a `Trainer`; put it before a trainer class of your own.

    `class MyDistillationTrainer(DistillationMixin, MyTrainer)` calls your `compute_loss` for the task loss, in training
    and in evaluation. A subclass of `DistillationTrainer` that overrides `compute_loss` gets the sum of all objectives
    from `super().compute_loss(...)` instead.
    """

    # ------------------------------------------------------------------ training

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`; afterwards the student is as it was built, without projections.

        `resume_from_checkpoint=True` goes on from the newest checkpoint that was written to the end.

        Raises:
            ValueError: the checkpoint was cut off, or written with another teacher or other objectives.
        """
        if not self.objectives:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        resume_from_checkpoint = self._resolve_checkpoint(resume_from_checkpoint)
        self._log_window = self._resumed_window = self._followed = None
        if self.is_deepspeed_enabled and isinstance(resume_from_checkpoint, str):
            self._load_distillation_state(resume_from_checkpoint)  # Trainer loads its checkpoints by another way
        self._in_training = True
        if self.model_init is None:  # else `call_model_init` makes new ones
            self._install_auxiliary()
            self._add_auxiliary_to_optimizer()
        try:
            output = super().train(resume_from_checkpoint, *args, **kwargs)
            self._update_teachers()
        except KeyboardInterrupt:
            logger.warning(self._kept())
            raise
        finally:
            self._in_training = False
            self._positions = self._log_window = self._resumed_window = None
            self._remove_auxiliary()
        self._record()
        self._refuse_broken_weights()
        return output

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.get_batch_samples`; counts the positions of every objective over the accumulation window."""
        self._loss_weighting.adapt(self.accelerator)
        batches, items = super().get_batch_samples(*args, **kwargs)
        if self.objectives and batches:
            counts = torch.stack([self._count(sum(t.objective.positions(b) for b in batches)) for t in self._terms])
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
        alone = not self._in_training  # a step that the user takes without `train`
        if alone:
            self._install_auxiliary()
        self._update_teachers()
        try:
            loss = super().training_step(model, inputs, *args, **kwargs)
        except BaseException:
            self._log_window = None  # auto_find_batch_size begins again
            raise
        finally:
            self.model_accepts_loss_kwargs, self._in_training_step = self._forward_takes_items, False
            if alone:
                self._remove_auxiliary()
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
        student_inputs = self.student_inputs(inputs)
        if not self._in_training_step:
            return super().compute_loss(
                model, student_inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch, **kwargs
            )
        batch = dict(inputs)
        steps = self._own_passes(model, batch)
        with contextlib.ExitStack() as stack:
            seen = [stack.enter_context(term.objective.capture()) for term in self._terms]
            outputs: dict[str, Any] = {STUDENT: None}
            # What is frozen comes first, so that its activations are gone when others are made.
            for name in sorted(self._used_teachers, key=self._peers.__contains__):
                asked = required_outputs(name, self._terms, steps)
                outputs[name] = asked and self.ask(name, batch, *asked, num_items_in_batch)
            if self._peer_parameters is not None:
                self._peer_parameters.outputs = [outputs[name] for name in self._peers]
            asked = required_outputs(STUDENT, self._terms, steps)
            # Processes exchange gradients in this pass, read or not.
            if asked or return_outputs or isinstance(model, DistributedDataParallel):
                needs, read = asked or (frozenset(), {})
                outputs[STUDENT] = self._run_student(model, student_inputs, needs, read, batch, num_items_in_batch)
        loss = self._weighted_sum([replace(s, seen=x) for s, x in zip(steps, seen, strict=True)], outputs, batch)
        return (loss, outputs[STUDENT]) if return_outputs else loss

    def _own_passes(self, model: nn.Module, batch: dict[str, Any]) -> list[TrainingStep]:
        """The step of every term, with what its own passes gave."""
        step = TrainingStep(batch, self._progress)
        steps = [step] * len(self._terms)
        # A quantization loss repeats the dropout of the pass that follows, so it comes last.
        first = [(i, term) for i, term in enumerate(self._terms) if term.objective.runs_first]
        first.sort(key=lambda found: isinstance(found[1].objective, QuantizationLoss))
        if first:
            with not_synchronised(model):
                for i, term in first:
                    passes = TermPasses(self, model, term.sources[0] if term.sources else "")
                    steps[i] = term.objective.run_forward(passes, step)
        return steps

    def ask(
        self, name: str, batch: dict[str, Any], needs: frozenset[str], read: Mapping[str, Any], items: Any = None
    ) -> Any:
        """The output of a teacher for a batch."""
        teacher = self.teachers[name]
        if not teacher.learns:
            return teacher(batch, needs, read, step=self.state.global_step + 1)
        teacher.model.train()
        with self.accelerator.autocast():
            return self._run_student(teacher.model, teacher.inputs(batch), needs, read, batch, items, learner=name)

    @property
    def _progress(self) -> float:
        return float(self.state.global_step / max(self.state.max_steps, 1))

    def student_inputs(self, inputs: Any) -> Any:
        """Of a batch what the student takes, without the columns that are its teachers' alone."""
        if not self.teachers:
            return inputs
        own = forward_columns(self.model)
        # A signature of `**inputs` alone does not tell what the student takes.
        others = self._teachers_columns() if base_of(self.model).main_input_name in own else set[str]()
        foreign = {k for k in inputs if k not in own and (k in others or k.startswith(TEACHER_PREFIX))}
        return {key: value for key, value in inputs.items() if key not in foreign} if foreign else inputs

    def run_learner(
        self, model: nn.Module, inputs: dict[str, Any], needs: frozenset[str], read: Mapping[str, Any]
    ) -> Any:
        """One forward pass of the student or a peer, returning what objectives need."""
        return as_output(model(**self._asked(model, inputs, needs, read)))

    def _asked(self, model: nn.Module, inputs: Any, needs: frozenset[str], read: Mapping[str, Any]) -> dict[str, Any]:
        bare = model if isinstance(base_of(model), PreTrainedModel) else self.model
        asked = {**inputs, **output_kwargs(needs, read), **return_dict_kwargs(bare)}
        if self.args.use_liger_kernel and "skip_logits" in forward_columns(bare):
            asked["skip_logits"] = "logits" not in needs
        return asked

    def _run_student(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        needs: frozenset[str],
        read: Mapping[str, Any],
        batch: dict[str, Any],
        items: Any,
        learner: str = STUDENT,
    ) -> Any:
        """The output of a model that learns; its `loss` is the task loss, a mean over this micro batch."""
        if "loss" not in needs:
            output = self.run_learner(model, inputs, needs, read)
        else:
            asked = self._asked(model, inputs, needs, read)
            if self.compute_loss_func is not None:
                task, output = super().compute_loss(model, asked, return_outputs=True, num_items_in_batch=items)
            else:
                if self._forward_takes_items if learner == STUDENT else accepts_num_items(model):
                    task_loss = next(
                        t.objective for t in self._terms if t.learner == learner and "loss" in t.objective.needs
                    )
                    asked["num_items_in_batch"] = torch.as_tensor(task_loss.positions(batch)).clamp(min=1)
                task, output = super().compute_loss(model, asked, return_outputs=True)
            output = as_output(output)
            if isinstance(output, ModelOutput) and without_gradient(output, needs):
                logger.warning_once(
                    f"The compute_loss that {type(self).__name__} inherits returns outputs without gradient, so the "
                    "student runs a second time in every step for the objectives."
                )
                unlabelled = {k: v for k, v in inputs.items() if k != "labels"}
                output = self.run_learner(model, unlabelled, needs, read)
        if not isinstance(output, ModelOutput) or ("logits" in needs and no_logits(output)):
            who = type(base_of(self.model if learner == STUDENT else model)).__name__
            found = ", ".join(output) if isinstance(output, ModelOutput) else type(output).__name__
            raise TypeError(
                f"{who} returned {found} in training; objectives read a ModelOutput"
                f"{' with logits' if 'logits' in needs else ''}. Return one from its forward pass."
            )
        if "loss" in needs:
            output["loss"] = task
        return output

    def _weighted_sum(self, steps: list[TrainingStep], outputs: dict[str, Any], batch: dict[str, Any]) -> torch.Tensor:
        """Sum of weight * (sum over this micro batch) / (positions of the window), per term."""
        # A `compute_loss_func` normalises by itself, and Trainer then does not divide by the accumulation steps.
        own_scale = self.compute_loss_func is not None
        accumulated = 1 if own_scale else getattr(self, "current_gradient_accumulation_steps", 1)
        # Outputs that serve as another model's targets are detached.
        targets = {
            name: without_graph(outputs[name]) if name == STUDENT or name in self._peers else outputs[name]
            for name in {source for term in self._terms for source in term.sources}
        }
        values: list[torch.Tensor] = []
        means: list[torch.Tensor] = []
        loss: Any = 0.0
        for index, term in enumerate(self._terms):
            objective, own = term.objective, steps[index]
            sources = {name: targets[name] for name in term.sources}
            teacher = sources if objective.uses_all_teachers else next(iter(sources.values()), None)
            steps[index] = replace(
                own,
                student=outputs[term.learner] if own.student is None else own.student,
                teacher=teacher if own.teacher is None else own.teacher,
            )
            with torch.autocast(self.args.device.type, enabled=False):
                mean = objective.loss(steps[index])
            if not isinstance(mean, torch.Tensor):
                raise TypeError(
                    f"{term.name} gave a {type(mean).__name__} for its loss, not a tensor. Return the mean alone; "
                    "positions(batch) tells over how many positions it is taken."
                )
            means.append(mean.float())
            if not (own_scale and "loss" in objective.needs):
                # The mean over no position at all is NaN in most models.
                count = self._count(objective.positions(batch))
                mean = torch.where(count > 0, mean.float(), torch.zeros_like(mean, dtype=torch.float32))
                if self._positions is not None:
                    mean = mean * (count / self._positions[0][index].clamp(min=1) * self._positions[1])
            values.append(mean.float())
            loss = loss + self._weight_of(term) * values[-1]
        for index, step in enumerate(steps):
            self._loss_weighting.measure(index, means, step, self.model, self.state.global_step)
        self._term_values = torch.stack(values).detach()
        return loss * accumulated  # type: ignore[no-any-return]

    def _weight_of(self, term: Term) -> float:
        """The weight of a term at the present progress."""
        weight = value_at(term.objective.weight, self._progress)
        if not math.isfinite(weight):
            raise RuntimeError(
                f"The weight of {term.name} is {weight} at progress {self._progress:.3f} (step {self.state.global_step + 1}), "
                f"from {term.objective.weight!r}. Training was stopped; correct the schedule."
            )
        return weight

    def _count(self, positions: torch.Tensor | int) -> torch.Tensor:
        """A number of positions on the device; copying one there would make the host wait."""
        if isinstance(positions, torch.Tensor):
            return positions.to(self.args.device)
        return torch.full((), positions, device=self.args.device)

    # ------------------------------------------------------------------ evaluation and card

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.prediction_step`, without the columns that are the teacher's alone."""
        return super().prediction_step(model, self.student_inputs(inputs), *args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As `Trainer.create_model_card`, with the tag `distillation`."""
        if self.objectives and len(args) < 3:
            tags = kwargs.get("tags") or []
            kwargs["tags"] = [*([tags] if isinstance(tags, str) else tags), "distillation"]
        super().create_model_card(*args, **kwargs)
