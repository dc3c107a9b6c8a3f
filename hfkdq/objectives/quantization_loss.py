# SPDX-License-Identifier: Apache-2.0
"""Quantization loss: the distance between a student and its fake-quantized self."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from transformers import PreTrainedModel

from ..modeling.forwards import base_of, full_precision
from .base import Passes, TrainingStep
from .model_signature import ModelSignature
from .perturbed import ExtraForwardPasses


@dataclass(frozen=True, kw_only=True)
class QuantizationLoss(ExtraForwardPasses):
    """Distance between the fake-quantized student and its own forward pass in full precision.

    `D(student in full precision, quantized student)` for the same weights, input and dropout; the former has no
    gradient. With task and distillation terms beside it all three are trained together; its weight may be faded in. It
    is 0 while the student has no fake quantizers, which `QATCallback` puts in. Costs a forward pass of the student more.
    Kim et al., "QKD: Quantization-aware Knowledge Distillation" (2019), study the order of the three.

    Args:
        objective (`Objective`, defaults to `LogitKD()`): the distance: an objective on what models return.
        weight (`float` or schedule, defaults to 1.0): factor of this term.

    Raises:
        ValueError: an objective that does not compare two models.

    Example:
        ```python
        >>> from hfkdq import LogitKD, QuantizationLoss
        >>> from hfkdq.schedules import Linear
        >>> QuantizationLoss(objective=LogitKD(divergence="mse"), weight=Linear(0, 1)).name
        'quantization_loss'

        ```
    """

    uses_teacher: ClassVar[bool] = False

    def attach(self, student: PreTrainedModel, teacher: PreTrainedModel | ModelSignature | None) -> None:
        super().attach(student, student)

    def run_forward(self, passes: Passes, step: TrainingStep) -> TrainingStep:
        device = base_of(passes.model).device
        devices = [device] if device.type == "cuda" else []
        # The pass that follows then has the same dropout, so that the distance is the quantizers' alone.
        with torch.random.fork_rng(devices=devices), torch.no_grad(), full_precision(passes.model):
            return replace(step, teacher=passes.student(step.batch, self.needs, self._read(0)))
