# SPDX-License-Identifier: Apache-2.0
"""One micro batch of a training: runs teachers and student on it, and sums the terms of the loss."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel
from transformers.utils import ModelOutput, logging

from ..fields import value_at
from ..modeling import forwards
from ..modeling.masks import Batch
from ..objectives.base import TrainingStep
from ..objectives.perturbed import QuantizationLoss
from ..teachers import Indices, Teacher, detached
from .distillation import Distillation
from .terms import STUDENT, Term, required_outputs

logger = logging.get_logger(__name__)
_LOGITS = frozenset({"logits"})


@dataclass(frozen=True)
class Window:
    """Positions of every term over an accumulation window, `counts` of shape `(terms,)`, summed over `processes`."""

    counts: torch.Tensor
    processes: int


def open_window(terms: Sequence[Term], batches: Sequence[Any], accelerator: Accelerator, processes: int) -> Window:
    """Counts the positions of every term over the batches of an accumulation window, in `processes` processes."""
    device = accelerator.device
    counts = torch.stack([_on(device, sum(term.objective.positions(batch) for batch in batches)) for term in terms])
    return Window(accelerator.gather(counts.unsqueeze(0)).sum(0) if processes > 1 else counts, processes)


def _on(device: torch.device, positions: torch.Tensor | int) -> torch.Tensor:
    """A number of positions on the device; copying one there would make the host wait."""
    return positions.to(device) if isinstance(positions, torch.Tensor) else torch.full((), positions, device=device)


@dataclass
class RunningStep:
    """A training step while it runs; `loss` and the values of all terms, `(terms,)`, once they are computed."""

    takes_items: bool
    loss: torch.Tensor | None = None
    terms: torch.Tensor | None = None


@dataclass(frozen=True)
class KeptGraph:
    """The graph of a step that is over, without its tensors; kept until the next loss is there, as in a loop by hand.

    Its nodes lie between the activations, so that glibc does not hand their memory back after every step and take it
    again, page by page, which took 3 % of a step on a CPU.
    """

    loss: torch.Tensor | None
    model: nn.Module
    layout: list[Any]

    @classmethod
    def of(cls, step: RunningStep, model: Any) -> KeptGraph | None:
        return None if step.loss is None or step.loss.device.type != "cpu" else cls(step.loss, model, _layout(model))

    @property
    def fits(self) -> bool:
        """Whether the next step may begin beside it: a graph remembers how the gradients of its parameters look."""
        return self.layout == _layout(self.model)


def _layout(model: nn.Module) -> list[Any]:
    return [(p.shape, p.dtype, p.device) for p in model.parameters()]


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """A micro batch of a training step, and the settings of its trainer."""

    distillation: Distillation
    student: Any  # without the wrappers of the training
    wrapped: nn.Module
    batch: dict[str, Any]
    inputs: Any  # the columns of the batch that the student takes
    step: int  # optimizer steps finished so far
    progress: float  # share of the training that is done, in [0, 1]
    accelerator: Accelerator
    task_loss: Callable[..., Any]  # the `compute_loss` that the trainer inherits
    loss_is_scaled: bool  # by a `compute_loss_func`, which is given the number of `items` in the window
    items: Any
    takes_items: bool  # whether the student's forward pass takes `num_items_in_batch`
    skips_logits: bool  # whether Liger kernels leave logits out unless they are asked for
    accumulated: int  # micro batches of the window, by which Trainer divides the loss
    window: Window | None  # none where the user takes a single step

    def loss(self, return_outputs: bool = False) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """The loss, the value of every term, and the output of the student if it is needed or `return_outputs`."""
        steps = self._extra_passes()
        with contextlib.ExitStack() as stack:
            seen = [stack.enter_context(term.objective.capture()) for term in self.distillation.terms]
            outputs = self._outputs(steps, return_outputs)
        steps = [replace(step, seen=found) for step, found in zip(steps, seen, strict=True)]
        loss, values = self._weighted_sum(self._with_outputs(steps, outputs))
        return loss, values, outputs[STUDENT]

    def _extra_passes(self) -> list[TrainingStep]:
        """The step of every term, with the outputs of the forward passes that its objective runs itself."""
        terms = self.distillation.terms
        step = TrainingStep(self.batch, self.progress)
        steps = [step] * len(terms)
        # A quantization loss repeats the dropout of the pass that follows, so it comes last.
        first = [i for i, term in enumerate(terms) if term.objective.runs_first]
        first.sort(key=lambda i: isinstance(terms[i].objective, QuantizationLoss))
        if first:
            # Processes exchange buffers and gradients once in a step, in the pass on the batch itself.
            ddp = isinstance(self.wrapped, DistributedDataParallel)
            with self.wrapped.no_sync() if ddp else contextlib.nullcontext():  # type: ignore[operator]
                for i in first:
                    steps[i] = terms[i].objective.run_forward(TermPasses(self, *terms[i].sources[:1]), step)
        return steps

    def _outputs(self, steps: list[TrainingStep], return_outputs: bool) -> dict[str, Any]:
        """The outputs that terms still need, by the name of the model."""
        distillation = self.distillation
        outputs: dict[str, Any] = {STUDENT: None}
        # Frozen teachers run first, so that their activations are gone when others are made.
        for name in sorted(distillation.used_teachers, key=distillation.peers.__contains__):
            required = required_outputs(name, distillation.terms, steps)
            outputs[name] = required and self.teacher_forward(name, self.batch, *required)
        if distillation.peer_parameters is not None:
            distillation.peer_parameters.outputs = [outputs[name] for name in distillation.peers]
        required = required_outputs(STUDENT, distillation.terms, steps)
        # Processes exchange gradients in this pass, used or not.
        if required or return_outputs or isinstance(self.wrapped, DistributedDataParallel):
            needs, indices = required or (frozenset(), {})
            outputs[STUDENT] = self._run(STUDENT, self.wrapped, self.inputs, needs, indices)
        return outputs

    def teacher_forward(self, name: str, batch: dict[str, Any], needs: frozenset[str], indices: Indices) -> Any:
        teacher = self.distillation.teachers[name]
        if not teacher.learns:
            return teacher(batch, needs, indices, step=self.step + 1)
        teacher.model.train()
        with self.accelerator.autocast():
            return self._run(name, teacher.model, teacher.inputs(batch), needs, indices)

    def student_forward(self, batch: dict[str, Any], needs: frozenset[str], indices: Indices) -> Any:
        """The output of the student for another batch than its own, without a task loss."""
        inputs = self.distillation.student_inputs(self.student, batch)
        return forwards.as_output(self.wrapped(**self._kwargs(self.wrapped, inputs, needs, indices)))

    def _run(self, name: str, model: nn.Module, inputs: Any, needs: frozenset[str], indices: Indices) -> Any:
        """The output of a model that learns; its `loss` is the task loss, a mean over this micro batch."""
        kwargs = self._kwargs(model, inputs, needs, indices)
        if "loss" in needs:
            task, output = self._task_loss(name, model, kwargs)
            if isinstance(output, ModelOutput) and forwards.without_gradient(output, needs):
                logger.warning_once(  # type: ignore[attr-defined]
                    "The compute_loss that the trainer inherits returns outputs without gradient, so the student runs a "
                    "second time in every step for the objectives."
                )
                unlabelled = {k: v for k, v in inputs.items() if k != "labels"}
                output = forwards.as_output(model(**self._kwargs(model, unlabelled, needs, indices)))
        else:
            output = forwards.as_output(model(**kwargs))
        if not isinstance(output, ModelOutput) or ("logits" in needs and forwards.no_logits(output)):
            who = type(forwards.base_of(self.student if name == STUDENT else model)).__name__
            found = ", ".join(output) if isinstance(output, ModelOutput) else type(output).__name__
            raise TypeError(
                f"{who} returned {found} in training; objectives read a ModelOutput"
                f"{' with logits' if 'logits' in needs else ''}. Return one from its forward pass."
            )
        if "loss" in needs:
            output["loss"] = task
        return output

    def _task_loss(self, name: str, model: nn.Module, kwargs: dict[str, Any]) -> tuple[torch.Tensor, Any]:
        items = {"num_items_in_batch": self.items} if self.loss_is_scaled else {}
        if not items and (self.takes_items if name == STUDENT else forwards.accepts_num_items(model)):
            terms = self.distillation.terms
            objective = next(t.objective for t in terms if t.learner == name and "loss" in t.objective.needs)
            kwargs["num_items_in_batch"] = torch.as_tensor(objective.positions(self.batch)).clamp(min=1)
        task, output = self.task_loss(model, kwargs, return_outputs=True, **items)
        return task, forwards.as_output(output)

    def _kwargs(self, model: nn.Module, inputs: Any, needs: frozenset[str], indices: Indices) -> dict[str, Any]:
        bare = model if isinstance(forwards.base_of(model), PreTrainedModel) else self.student
        kwargs = {**inputs, **forwards.output_kwargs(needs, indices), **forwards.return_dict_kwargs(bare)}
        if "use_cache" in forwards.forward_columns(bare):  # with one, Transformers 4 lets packed texts see one another
            kwargs.setdefault("use_cache", False)
        if self.skips_logits and "skip_logits" in forwards.forward_columns(bare):
            kwargs["skip_logits"] = not needs & {"logits", "outputs"}
        return kwargs

    def _with_outputs(self, steps: list[TrainingStep], outputs: dict[str, Any]) -> list[TrainingStep]:
        """The steps with the outputs of the batch, where the forward passes of their own gave none."""
        terms, peers = self.distillation.terms, self.distillation.peers
        # Outputs that serve as another model's targets are detached.
        targets = {
            name: detached(outputs[name]) if name == STUDENT or name in peers else outputs[name]
            for name in {source for term in terms for source in term.sources}
        }
        filled = list(steps)
        for index, (term, step) in enumerate(zip(terms, steps, strict=True)):
            sources = {name: targets[name] for name in term.sources}
            teacher = sources if term.objective.uses_all_teachers else next(iter(sources.values()), None)
            student = outputs[term.learner] if step.student is None else step.student
            filled[index] = replace(step, student=student, teacher=teacher if step.teacher is None else step.teacher)
        return filled

    def _weighted_sum(self, steps: list[TrainingStep]) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of weight * (sum over this micro batch) / (positions of the window), and that of every term unweighted."""
        terms, weighting = self.distillation.terms, self.distillation.weighting
        means = [self._mean(term, step) for term, step in zip(terms, steps, strict=True)]
        values = [self._scaled(index, mean) for index, mean in enumerate(means)]
        loss: Any = sum(self._weight(term) * value for term, value in zip(terms, values, strict=True))
        for index, step in enumerate(steps):
            weighting.measure(index, means, step, self.student, self.step)
        # Trainer does not divide a loss of `compute_loss_func` by the accumulation steps.
        return loss * (1 if self.loss_is_scaled else self.accumulated), torch.stack(values).detach()

    def _mean(self, term: Term, step: TrainingStep) -> torch.Tensor:
        with torch.autocast(self.accelerator.device.type, enabled=False):
            mean = term.objective.loss(step)
        if not isinstance(mean, torch.Tensor):
            raise TypeError(
                f"{term.name} gave a {type(mean).__name__} for its loss, not a tensor. Return the mean alone; "
                "positions(batch) tells over how many positions it is taken."
            )
        return mean.float()

    def _scaled(self, index: int, mean: torch.Tensor) -> torch.Tensor:
        """The share of this micro batch in the mean over the window."""
        objective = self.distillation.terms[index].objective
        if self.loss_is_scaled and "loss" in objective.needs:
            return mean
        if objective.is_sum:
            return mean if self.window is None else mean * self.window.processes
        # The mean over no position at all is NaN in most models.
        count = _on(self.accelerator.device, objective.positions(self.batch))
        mean = torch.where(count > 0, mean, torch.zeros_like(mean))
        if self.window is None:
            return mean
        return (mean * (count / self.window.counts[index].clamp(min=1) * self.window.processes)).float()

    def _weight(self, term: Term) -> float:
        weight = value_at(term.objective.weight, self.progress)
        if not math.isfinite(weight):
            raise RuntimeError(
                f"The weight of {term.name} is {weight} at progress {self.progress:.3f} (step {self.step + 1}), "
                f"from {term.objective.weight!r}. Training was stopped; correct the schedule."
            )
        return weight


class TermPasses:
    """Extra forward passes of the student and of the teacher called `source`, as an objective runs them."""

    def __init__(self, micro: MicroBatch, source: str = "") -> None:
        self._micro, self._source = micro, source
        self._teacher = micro.distillation.teachers.get(source, Teacher())
        self.model: Any = micro.student
        self.teacher_model: Any = self._teacher.model

    def student(self, batch: Batch, needs: frozenset[str] = _LOGITS, indices: Indices | None = None) -> Any:
        """The student's output for a batch, without a task loss; its running statistics stay as they are."""
        unlabelled = {key: value for key, value in batch.items() if key != "labels"}
        with forwards.statistics_kept(self._micro.wrapped):
            return self._micro.student_forward(unlabelled, needs - {"loss"}, _both(indices))

    def teacher(self, batch: Batch, needs: frozenset[str] = _LOGITS, indices: Indices | None = None) -> Any:
        """The teacher's output for a batch, without a gradient."""
        kept = forwards.statistics_kept(self.teacher_model) if self._teacher.learns else contextlib.nullcontext()
        with torch.no_grad(), kept:
            return self._micro.teacher_forward(self._source, dict(batch), needs, _both(indices))


def _both(indices: Indices | None) -> dict[str, Any]:
    return {"hidden_states": None, "attentions": None, **(indices or {})}
