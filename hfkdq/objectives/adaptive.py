# SPDX-License-Identifier: Apache-2.0
"""Adaptive weights: weights of objectives that follow measurements rather than progress."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

import torch

from ..fields import COUNT, NOT_NEGATIVE, POSITIVE, Rule, check_fields, check_rules
from .base import TrainingStep
from .logits import LogitKD

_Weight = TypeVar("_Weight", bound="AdaptiveWeight")


@dataclass(eq=True)
class AdaptiveWeight:
    """A weight that is measured in every optimizer step and used in the next, in the place of a schedule. Its state is
    in the checkpoints. `momentum`, in [0, 1), is the share of the former measurements that stays in a step."""

    momentum: Annotated[float, Rule("must be in [0, 1)", lambda x: 0 <= x < 1)] = field(default=0.9, kw_only=True)
    _known: list[float] | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_fields(self)
        check_rules(self)

    def __call__(self, progress: float) -> float:
        raise NotImplementedError

    def adapt(self, sums: list[float]) -> None:
        """Averages the measurements of an optimizer step, summed over micro batches and processes."""
        m, known = self.momentum, self._known
        self._known = sums if known is None else [m * a + (1.0 - m) * b for a, b in zip(known, sums, strict=True)]

    def state(self) -> list[float] | None:
        return self._known

    def load_state(self, known: list[float] | None) -> None:
        self._known = known

    def copy(self: _Weight) -> _Weight:
        """The same weight without measurements."""
        twin = copy.copy(self)
        twin._known = None
        return twin


@dataclass
class ByAgreement(AdaptiveWeight):
    """The less the student agrees with its teacher, the more the objective weighs: `low + (high - low) * (1 - a)`.

    `a` is the share of positions at which both find the same class likeliest, a moving average over the steps. It does
    not depend on how a batch is cut. For `LogitKD`.

    Args:
        low (`float`, defaults to 0.0): the weight where they agree throughout.
        high (`float`, defaults to 1.0): the weight where they never do, and at the start.
        momentum (`float`, defaults to 0.9): share of the former average that stays in a step, in [0, 1).

    Raises:
        ValueError: a negative weight, or a momentum outside of [0, 1).
    """

    low: Annotated[float, NOT_NEGATIVE] = 0.0
    high: Annotated[float, NOT_NEGATIVE] = 1.0

    def __call__(self, progress: float) -> float:
        agreeing, total = self._known or (0.0, 1.0)
        return self.low + (self.high - self.low) * (1.0 - agreeing / max(total, 1e-12))

    @torch.no_grad()
    def measured(self, objective: LogitKD, step: TrainingStep) -> torch.Tensor:
        """Number of positions of a micro batch at which both agree, and of all that count: shape `(2,)`."""
        sums: Any = 0.0
        for p in objective.predictions(step):
            agree = (p.student.argmax(-1) == top_class(p.teacher)).float()
            counts = torch.ones_like(agree) if p.mask is None else p.mask.float()
            sums = sums + torch.stack([(agree * counts).sum(), counts.sum()])
        return sums


def top_class(teacher: Any) -> torch.Tensor:
    """The likeliest class per position, of logits or of the likeliest classes alone."""
    if isinstance(teacher, torch.Tensor):
        return teacher.argmax(-1)
    best = teacher.log_probabilities[..., :-1].argmax(-1, keepdim=True)
    return teacher.indices.gather(-1, best).squeeze(-1)


@dataclass
class ByGradientNorm(AdaptiveWeight):
    """Balances gradients: `ratio * |grad task| / |grad term|`, so that the term pulls `ratio` times as hard as the task.

    Both norms are over all trained weights, measured by two further backward passes in every `every`-th optimizer step,
    on its first micro batch; moving averages over the measurements. Needs a `TaskLoss` beside it. After GradNorm (Chen
    et al., "GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep Multitask Networks", 2018), in closed
    form.

    Args:
        ratio (`float`, defaults to 1.0): pull of the term against that of the task.
        every (`int`, defaults to 20): optimizer steps from one measurement to the next.
        largest (`float`, defaults to 100.0): bound of the weight.
        momentum (`float`, defaults to 0.9): share of the former average that stays with a measurement, in [0, 1).

    Raises:
        ValueError: settings out of range.
    """

    ratio: Annotated[float, POSITIVE] = 1.0
    every: Annotated[int, COUNT] = 20
    largest: Annotated[float, POSITIVE] = 100.0

    def __call__(self, progress: float) -> float:
        task, term = self._known or (1.0, 1.0)
        return min(self.ratio * task / max(term, 1e-12), self.largest)


def gradient_norm(value: torch.Tensor, parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """Euclidean norm of the gradient of `value` over `parameters`, whose own gradients stay as they are."""
    gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    norms = [gradient.float().norm() for gradient in gradients if gradient is not None]
    return torch.stack(norms).norm() if norms else value.new_zeros(())
