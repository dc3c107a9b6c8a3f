# SPDX-License-Identifier: Apache-2.0
"""Gradual pruning while any `Trainer` trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.optim import Optimizer
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from ..facts import drop_fact
from ..modeling.batches import Batches, first_batch, make_batches
from ..modeling.examples import NoExample, first_rows, given_to, tried_on
from ..modeling.masks import Batch
from ..modeling.placement import sharding
from ..specs import PruningSpec
from .criteria import FROM_GRADIENTS, check_trained
from .finishing import count_parameters, finish_, rehearse, tell_left_unpruned
from .importance import collect_importance_
from .one_shot import check_prunable, targets_of
from .progress import UNFINISHED, Progress
from .targets import VOCABULARY_NEEDS_NO_TRAINING, PruningTarget

logger = logging.get_logger(__name__)


class PruningCallback(TrainerCallback, ExportableState):
    """Prunes the model of a `Trainer` along the schedule of a [`PruningSpec`].

    After every optimizer step the share `s(t)` of the units is out of what the model computes, so that evaluations see the
    pruned model, and so do checkpoints, but for layers and hidden width, whose checkpoints hold all of them and are for
    resuming; what is pruned stays pruned, and has no gradient, so that it does not count when
    gradients are clipped. At the end of training the model has the full sparsity and the units leave its shapes as by
    [`prune`], which also records what was done in `model.config.hfkdq["pruning"]`. Training that stops before `spec.end`
    is pruned to the full sparsity all the same, with a warning.

    The sparsity that is due is logged as `sparsity`.

    With `at_least` or `at_most` it prunes as far as a metric allows: the model is evaluated at the end of every round
    (`spec.rounds`), and the first round that breaks the bound is undone and ends the training. It is evaluated once before
    anything is trained too, so that a metric or data that are missing are told then.

    Masks, and what the criterion has seen, are in the state of the optimizer, and so in every checkpoint: a resumed run
    equals an uninterrupted one, and all processes of a data-parallel run have the same masks. When the full sparsity is
    reached, the best model is searched anew: `load_best_model_at_end` cannot bring back a denser one.

    Args:
        spec (`PruningSpec` or `dict`): what to prune, how much and when; a dictionary as `spec.to_dict()` gives it,
            which is what a Trainer that restores its callbacks passes.
        strict_resume (`bool`, defaults to `True`): refuse to resume from a checkpoint of another spec; `False` warns
            instead.
        metric (`str`, defaults to `"loss"`): the metric of an evaluation that a bound is for, with or without `"eval_"`.
        at_least (`float`, *optional*): what the metric must reach after every round, for example `0.99 * teacher_accuracy`.
        at_most (`float`, *optional*): what it must not exceed.
        calibration (iterable of `dict` or `datasets.Dataset`, *optional*): for the criterion `"teacher"`: batches of model
            inputs, or examples to make them from, which are looked at whenever the sparsity grows.
        teacher_model (`PreTrainedModel`, *optional*): for the criterion `"teacher"`; by default the model itself.
        batch_size, data_collator, processing_class: as of [`prune`], for a `Dataset`; 8 examples in a batch by default.
        example_inputs (`dict`, *optional*): a batch as your collator makes it, on which a copy is tried where none that is
            made up from the configuration fits, as [`prune`] does; by default that of the [`DistillationTrainer`], the
            first one of `calibration`, or, as training begins, the first rows that are trained on, if they have places.

    Raises:
        TypeError: `spec` is neither; or, as training is set up, the model is no `PreTrainedModel`.
        ValueError: a bound without `spec.rounds`, or the criterion `"teacher"` without data; as training is set up, the
            spec does not fit the model or, as training begins, there is no batch to try it on, has more rounds than steps, or the checkpoint is one of another spec.
        NotImplementedError: as training is set up, FSDP or DeepSpeed shard the model.
        RuntimeError: as training starts, the optimizer does not hold the weights to prune. A `Trainer` that has
            removed units once cannot train again; make a new one.

    Example:
        ```python
        >>> from transformers import Trainer
        >>> from hfkdq import PruningCallback, PruningSpec
        >>> callback = PruningCallback(PruningSpec(sparsity=0.5, structure="neuron"))
        >>> trainer = Trainer(model, args, train_dataset=train, callbacks=[callback])  # doctest: +SKIP
        >>> far = PruningSpec(sparsity=0.9, structure="neuron", rounds=6, end=1.0)
        >>> callback = PruningCallback(far, metric="accuracy", at_least=0.87)  # the last round that keeps 87 %

        ```
    """

    def __init__(
        self,
        spec: PruningSpec | dict[str, Any],
        strict_resume: bool = True,
        *,
        metric: str = "loss",
        at_least: float | None = None,
        at_most: float | None = None,
        calibration: Batches | None = None,
        teacher_model: PreTrainedModel | None = None,
        batch_size: int = 8,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        processing_class: Any = None,
        example_inputs: Batch | None = None,
    ) -> None:
        spec = PruningSpec.given(spec, "PruningCallback")
        if spec.structure == "vocab":
            raise ValueError(VOCABULARY_NEEDS_NO_TRAINING)
        if spec.criterion == "teacher" and calibration is None:
            raise ValueError(
                "criterion='teacher' asks the teacher about data: PruningCallback(spec, calibration=dataset, "
                "teacher_model=teacher). In a DistillationTrainer 'taylor' follows the trainer's own loss without it."
            )
        if (at_least is not None or at_most is not None) and spec.rounds is None:
            raise ValueError(
                "at_least and at_most are looked at after every round: give PruningSpec(rounds=...), and end=1.0 so that "
                "every round has the same time to recover."
            )
        for name, bound in (("at_least", at_least), ("at_most", at_most)):
            if bound is not None and (isinstance(bound, (bool, str)) or not math.isfinite(bound)):
                raise ValueError(f"{name} must be a finite number, in the unit of the metric, got {bound!r}.")
        self.spec = spec
        self.strict_resume = strict_resume
        self.metric, self.at_least, self.at_most = metric, at_least, at_most
        self._calibration, self._teacher = calibration, teacher_model
        self._how = (batch_size, data_collator, processing_class)
        self._example, self._waits = example_inputs, False
        self._progress: Progress | None = None
        self._judging = False
        self._evaluates_first: bool | None = None

    def state(self) -> dict[str, Any]:
        bounds = dict(metric=self.metric, at_least=self.at_least, at_most=self.at_most) if self._bounded else {}
        return {"args": {"spec": self.spec.to_dict(), **bounds}, "attributes": {}}

    @property
    def _bounded(self) -> bool:
        return self.at_least is not None or self.at_most is not None

    def _tried(self, model: Any) -> AbstractContextManager[None]:
        if self._example is None and isinstance(model, PreTrainedModel):
            calibration = self._calibration
            self._example = given_to(model)  # by a DistillationTrainer, while it is made
            if self._example is None and calibration is not None:
                self._example = first_batch(make_batches(model, calibration, *self._how))
        return tried_on(self._example, model)

    def _rehearse(self, model: Any) -> None:
        with self._tried(model):
            targets = targets_of(model, self.spec)
            check_prunable(model, self.spec, targets)
            rehearse(model, self.spec)
            tell_left_unpruned(model, self.spec, targets)

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if (by := sharding()) is not None:
            raise NotImplementedError(
                f"{by} spreads every parameter over the processes, and units leave whole parameters alone. Prune before this "
                "training, in one process (prune(model, spec) and save_pretrained), or train under DDP."
            )
        try:
            self._rehearse(model)
        except NoExample:
            if self._example is not None:
                raise
            self._waits = True  # for the data, which a Trainer shows its callbacks as training begins
        if self._bounded and args.load_best_model_at_end:
            raise ValueError(
                "load_best_model_at_end would choose among models of different sparsity. Leave it out: with at_least or "
                "at_most the model of the last round that keeps the bound is what you get."
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None,
        optimizer: Any = None, train_dataloader: Any = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        if self._waits:
            data, collate = (getattr(train_dataloader, name, None) for name in ("dataset", "collate_fn"))
            self._example = None if collate is None else first_rows(data, collate, None)
            self._rehearse(model)
            self._waits = False
        with self._tried(model):
            targets = targets_of(model, self.spec)
        if optimizer is not None:
            _check_trained_by(optimizer, targets)
        check_prunable(model, self.spec, targets)
        check_trained(targets, self.spec)
        if args.fp16 and not args.max_grad_norm and self.spec.criterion in FROM_GRADIENTS:
            raise ValueError(
                f"criterion={self.spec.criterion!r} reads gradients, which fp16 without clipping leaves scaled by a factor that "
                "changes. Set max_grad_norm, or train in bf16."
            )
        steps = math.floor(self.spec.end * state.max_steps) - math.floor(self.spec.begin * state.max_steps)
        if self.spec.rounds is not None and self.spec.rounds > max(steps, 1):
            raise ValueError(
                f"{self.spec.rounds} rounds do not fit into the {steps} optimizer steps between begin={self.spec.begin} and "
                f"end={self.spec.end} of a training of {state.max_steps} steps. Train longer, or use fewer rounds."
            )
        self._progress = Progress(model, targets, self.spec, count_parameters(model))
        saved: Any = state.stateful_callbacks  # by name, whatever type Transformers says
        if state.global_step > 0:
            self._check_resumed(saved)
            self._progress.resume(optimizer, self.spec.sparsity_at(state.global_step / state.max_steps))
        # The Trainer updates this entry when it saves, and fails where a checkpoint without pruning did not have it.
        saved.setdefault(type(self).__name__, self.state())
        self._progress.begin(optimizer)
        if self._bounded and self._evaluates_first is None:
            # Whether there is anything to evaluate, and such a metric, is found out now, not after the first round.
            self._evaluates_first, args.eval_on_start = args.eval_on_start, True

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        progress = self._progress
        if progress is not None and self.spec.criterion in FROM_GRADIENTS and self.spec.criterion != "teacher":
            progress.observe_gradients()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        progress = self._progress
        if progress is None:
            return
        # The step being taken is not counted in global_step yet.
        due = self.spec.sparsity_at((state.global_step + 1) / state.max_steps)
        if due > progress.masks.sparsity and not progress.settled:
            if self._bounded and progress.last_good is None:
                progress.snapshot()
            if self.spec.criterion == "teacher":
                progress.importance.tensors.clear()
                progress.importance.not_finite.clear()
                batches = make_batches(model, self._calibration, *self._how)
                collect_importance_(model, progress.importance, batches, self._teacher)
            if progress.grow_to(due) and due == self.spec.sparsity:
                # Models before this step were denser; none of them may be loaded as the best one.
                state.best_metric = state.best_model_checkpoint = state.best_global_step = None
        progress.apply((self.spec.end - self.spec.begin) * state.max_steps)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        progress = self._progress
        if progress is None or not self._bounded or progress.settled or not progress.masks.sparsity:
            return
        last = state.global_step >= state.max_steps
        if last or self.spec.sparsity_at((state.global_step + 1) / state.max_steps) > progress.masks.sparsity:
            self._judging = control.should_evaluate = True

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        progress = self._progress
        is_first = self._evaluates_first is not None
        if not (self._judging or is_first) or progress is None:
            return
        if is_first:
            self._evaluates_first, args.eval_on_start = None, bool(self._evaluates_first)
        self._judging = False
        name = self.metric if self.metric.startswith("eval_") else f"eval_{self.metric}"
        if name not in (metrics or {}):
            raise ValueError(
                f"The evaluation gave no {name}, only {', '.join(sorted(metrics or {}))}. Name one of them as metric, or give "
                "the trainer compute_metrics."
            )
        value = (metrics or {})[name]
        if is_first:
            if math.isnan(value):
                raise ValueError(f"{name} is {value} before anything is pruned, so no bound can be kept.")
            return
        kept = not math.isnan(value)
        kept &= self.at_least is None or value >= self.at_least
        kept &= self.at_most is None or value <= self.at_most
        logger.info(
            f"Pruned to sparsity {progress.masks.sparsity:.3f}: {name} is {value:.4f}, {'kept' if kept else 'too far'}."
        )
        if kept:
            progress.snapshot()
        else:
            progress.rollback()
            control.should_training_stop = True
            if not progress.masks.sparsity:
                told = f"{name} is {value:.4f}. Nothing is pruned."
                logger.warning(f"Not even the first round of pruning keeps the bound: {told}")

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if self._progress is not None and logs is not None and state.log_history:
            state.log_history[-1]["sparsity"] = logs["sparsity"] = round(self._progress.masks.sparsity, 4)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        progress, self._progress = self._progress, None
        if progress is None:
            return
        final = self.spec.sparsity or 0.0
        progress.follow_shapes()
        if not progress.settled and progress.masks.sparsity < final:
            logger.warning(
                f"Training stopped at step {state.global_step} of {state.max_steps}, before the end of pruning "
                f"(end={self.spec.end}). The model is now pruned to sparsity {self.spec.sparsity} without the training "
                "that should have followed."
            )
            if not progress.grow_to(final):
                logger.warning(
                    f"No gradients or activations of {', '.join(list(progress.importance.missing().values())[:3])} were seen in this training, so "
                    f"no more was pruned than {progress.masks.sparsity:.3f}."
                )
        progress.end()
        drop_fact(model, UNFINISHED)
        finish_(model, progress.masks, progress.parameters_before)

    def _check_resumed(self, callbacks: Any) -> None:
        saved = callbacks.get(type(self).__name__)
        if saved is None:
            logger.warning("The checkpoint was saved without PruningCallback: only what is zero already is pruned.")
            return
        then = [entry["args"]["spec"] for entry in (saved if isinstance(saved, list) else [saved])]
        if told := self.spec.differs(then, self.strict_resume):
            logger.warning(told)


def _check_trained_by(optimizer: Optimizer, targets: Sequence[PruningTarget]) -> None:
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for target in targets:
        for part in target.parts:
            values = part.values
            if isinstance(values, torch.nn.Parameter) and values.requires_grad and id(values) not in held:
                raise RuntimeError(
                    f"The optimizer does not train {part.name}.{part.tensor}, which is to be pruned. If this Trainer has "
                    "trained and removed units before, its optimizer is out of date: make a new Trainer to train on. "
                    "Freeze weights with requires_grad_(False) rather than by leaving them out of the optimizer."
                )
