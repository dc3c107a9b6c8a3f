# SPDX-License-Identifier: Apache-2.0
"""Learned quantization parameters, and a multiplier of their learning rate."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .records import activation_quantizers, weight_quantizers


def learned_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The learned ranges of activations and scales of weights of `model`, which the optimizer trains with the rest."""
    quantizers = [*activation_quantizers(model).values(), *weight_quantizers(model).values()]
    # A table and the head that shares it have one quantizer.
    return [parameter for quantizer in dict.fromkeys(quantizers) for parameter in quantizer.parameters(recurse=False)]


class UpdateScaling:
    """Multiplies what an optimizer step does to some parameters. For every optimizer whose step is proportional to its
    learning rate, this is a learning rate of their own. A parameter group, which would say the same, cannot be added
    by a callback before the Trainer loads the state of the optimizer that it resumes. Raises `ValueError`: the factor
    is negative or not finite."""

    def __init__(self, factor: float) -> None:
        if not (factor >= 0.0 and math.isfinite(factor)):
            raise ValueError(f"learning_rate_factor must be a number of 0 or more, got {factor!r}.")
        self.factor = factor
        self._before: list[tuple[nn.Parameter, Tensor]] = []
        self._now = factor

    def before_step(self, model: nn.Module, frozen: bool) -> None:
        """Remembers the learned parameters of a model; `frozen` ones will stay where they are."""
        self._now = 0.0 if frozen else self.factor
        if self._now != 1.0:
            self._before = [(parameter, parameter.detach().clone()) for parameter in learned_parameters(model)]

    @torch.no_grad()
    def after_step_(self) -> None:
        """Multiplies what the step has done to the parameters."""
        for parameter, before in self._before:
            parameter.copy_(before + self._now * (parameter - before))
        self._before = []
