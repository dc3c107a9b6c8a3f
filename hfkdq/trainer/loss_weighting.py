# SPDX-License-Identifier: Apache-2.0
"""Adaptive weights of the terms: measured on micro batches, adapted once per optimizer step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator

from ..objectives import LogitKD, TrainingStep
from ..objectives.adaptive import AdaptiveWeight, ByAgreement, ByGradientNorm, gradient_norm
from .terms import Term


class LossWeighting:
    """The adaptive weights of the terms. Raises `ValueError`: a weight by agreement of an objective that predicts
    nothing, or one by gradients with no task loss."""

    def __init__(self, terms: Sequence[Term]) -> None:
        self._terms = terms
        self._weights = {
            i: term.objective.weight
            for i, term in enumerate(terms)
            if isinstance(term.objective.weight, AdaptiveWeight)
        }
        self._sums: dict[int, torch.Tensor] = {}
        self._task: dict[int, int] = {}
        for i, weight in self._weights.items():
            if isinstance(weight, ByAgreement) and not isinstance(terms[i].objective, LogitKD):
                raise ValueError(
                    f"{terms[i].name}: ByAgreement asks whether student and teacher predict the same class, so it is a "
                    "weight for LogitKD. Use ByGradientNorm or a schedule."
                )
            if isinstance(weight, ByGradientNorm):
                tasks = [
                    j for j, t in enumerate(terms) if t.learner == terms[i].learner and "loss" in t.objective.needs
                ]
                if not tasks or tasks[0] == i:
                    raise ValueError(
                        f"{terms[i].name}: ByGradientNorm balances a term against the task loss. Add TaskLoss() with a "
                        "weight of another kind."
                    )
                self._task[i] = tasks[0]

    def measure(
        self, index: int, means: Sequence[torch.Tensor], term_step: TrainingStep, model: torch.nn.Module, step: int
    ) -> None:
        """Measures for the weight of term `index`, if it is adaptive, on a micro batch after `step` optimizer steps.
        `means` are those of all terms over the micro batch, unweighted; `model` is the student."""
        weight = self._weights.get(index)
        if isinstance(weight, ByAgreement):
            found = weight.measured(self._terms[index].objective, term_step)  # type: ignore[arg-type]
            self._sums[index] = found + self._sums.get(index, 0.0)
        elif isinstance(weight, ByGradientNorm) and step % weight.every == 0 and index not in self._sums:
            trained = [p for p in model.parameters() if p.requires_grad]
            both = (means[self._task[index]], means[index])
            self._sums[index] = torch.stack([gradient_norm(mean, trained) for mean in both]).detach()

    def adapt(self, accelerator: Accelerator, together: bool = True) -> None:
        """Lets the weights take in what was measured since the last time, in all processes alike."""
        for index in sorted(self._sums):
            sums = self._sums[index]
            if together and accelerator.num_processes > 1:
                sums = accelerator.gather(sums.unsqueeze(0)).sum(0)
            self._weights[index].adapt(sums.tolist())
        self._sums = {}

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold of the weights."""
        return {self._terms[i].name: weight.state() for i, weight in self._weights.items()}

    def load_state(self, known: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint."""
        for i, weight in self._weights.items():
            weight.load_state(known.get(self._terms[i].name))
