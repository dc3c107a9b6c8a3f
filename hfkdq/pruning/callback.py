# SPDX-License-Identifier: Apache-2.0
"""Gradual pruning while any `Trainer` trains.

Knows the callback protocol and nothing of distillation or quantization, with which it composes in the model alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from ..schedules import Cubic
from ..specs import PruningSpec
from .masks import Masks, check_widths
from .one_shot import prune
from .targets import PruningTarget, find_targets

logger = logging.get_logger(__name__)


class PruningCallback(TrainerCallback, ExportableState):
    """Prunes the model of a `Trainer` along the schedule of a [`PruningSpec`].

    After every optimizer step the share `s(t)` of the weights or neurons is zero, so that evaluation and checkpoints
    see the pruned model; what is pruned stays pruned. At the end of training the model has the full sparsity and
    neurons are removed as by [`prune`], which also records what was done in `model.config.hfkdq["pruning"]`. Training
    that stops before `spec.end` is pruned to the full sparsity all the same, with a warning.

    Masks are a function of the weights and of the step, so a resumed run equals an uninterrupted one. When the full
    sparsity is reached, the best model is searched anew: `load_best_model_at_end` cannot bring back a denser one.

    Args:
        spec (`PruningSpec` or `dict`): what to prune, how much and when; a dictionary as `spec.to_dict()` gives it,
            which is what a Trainer that restores its callbacks passes.
        strict_resume (`bool`, defaults to `True`): refuse to resume from a checkpoint of another spec; `False` warns
            instead.

    Raises:
        TypeError: `spec` is neither; or, as training is set up, the model is no `PreTrainedModel`.
        ValueError: as training is set up, the spec does not fit the model, or the checkpoint is one of another spec.
        RuntimeError: as training starts, the optimizer does not hold the weights to prune. A `Trainer` that has
            removed neurons once cannot train again; make a new one.

    Example:
        ```python
        >>> from transformers import Trainer
        >>> from hfkdq import PruningCallback, PruningSpec
        >>> callback = PruningCallback(PruningSpec(sparsity=0.5, structure="neuron"))
        >>> trainer = Trainer(model, args, train_dataset=train, callbacks=[callback])  # doctest: +SKIP

        ```
    """

    def __init__(self, spec: PruningSpec | dict[str, Any], strict_resume: bool = True) -> None:
        if isinstance(spec, dict):
            spec = PruningSpec.from_dict(spec)
        if not isinstance(spec, PruningSpec):
            raise TypeError(f"PruningCallback takes a PruningSpec, got {type(spec).__name__}.")
        self.spec = spec
        self.strict_resume = strict_resume
        self._schedule = Cubic(0.0, spec.sparsity, spec.begin, spec.end)
        self._masks = Masks([])

    def state(self) -> dict[str, Any]:
        return {"args": {"spec": self.spec.to_dict()}, "attributes": {}}

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel = None,
        **kwargs: Any,
    ) -> None:
        find_targets(model, self.spec)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel = None,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        targets = find_targets(model, self.spec)
        if optimizer is not None:
            _check_trained_by(optimizer, targets)
        check_widths(targets, self.spec)
        if state.global_step > 0:
            self._check_resumed(state)
        # The Trainer updates this entry when it saves, and fails where a checkpoint without pruning did not have it.
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self._masks = Masks(targets, from_zeros=self._schedule(state.global_step / state.max_steps) > 0)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # The step being taken is not counted in global_step yet.
        before, now = state.global_step / state.max_steps, (state.global_step + 1) / state.max_steps
        self._masks.grow_to(self._schedule(now))
        self._masks.apply_()
        if before < self.spec.end <= now:
            # Models before this step were denser; none of them may be loaded as the best one.
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel = None,
        **kwargs: Any,
    ) -> None:
        if state.global_step < self.spec.end * state.max_steps:
            logger.warning(
                f"Training stopped at step {state.global_step} of {state.max_steps}, before the end of pruning "
                f"(end={self.spec.end}). The model is now pruned to sparsity {self.spec.sparsity} without the training "
                "that should have followed."
            )
        self._masks = Masks([])
        prune(model, self.spec)

    def _check_resumed(self, state: TrainerState) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__)
        if saved is None:
            logger.warning("The checkpoint was saved without PruningCallback: only what is zero already is pruned.")
            return
        then = [entry["args"]["spec"] for entry in (saved if isinstance(saved, list) else [saved])]
        if self.spec not in [PruningSpec.from_dict(spec) for spec in then]:
            told = f"The checkpoint was trained with PruningSpec.from_dict({then[0]}), not with {self.spec}."
            if self.strict_resume:
                raise ValueError(
                    f"{told} Resume with the same spec, give strict_resume=False to go on with the new one, or start "
                    "a new training from the weights."
                )
            logger.warning(f"{told} Training goes on with the new one.")


def _check_trained_by(optimizer: Optimizer, targets: Sequence[PruningTarget]) -> None:
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for target in targets:
        for name, linear in target.linears:
            if linear.weight.requires_grad and id(linear.weight) not in held:
                raise RuntimeError(
                    f"The optimizer does not train {name}.weight, which is to be pruned. If this Trainer has trained "
                    "and removed neurons before, its optimizer is out of date: make a new Trainer to train on. "
                    "Freeze weights with requires_grad_(False) rather than by leaving them out of the optimizer."
                )
