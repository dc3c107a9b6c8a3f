# SPDX-License-Identifier: Apache-2.0
"""Terms of the loss, each an objective, its learner and teachers, and their adaptive weights, adapted once per step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
from accelerate import Accelerator

from ..objectives import LogitKD
from ..objectives.adaptive import AdaptiveWeight, ByAgreement, ByGradientNorm, gradient_norm
from ..objectives.base import Objective, TrainingStep, unique_names
from ..teachers import Indices, Teacher

SINGLE = "teacher"
"""The name of a teacher that was given without one."""
STUDENT = "student"


@dataclass(frozen=True)
class Term:
    """An objective that `learner` learns from `sources`, and the name under which it is logged."""

    objective: Objective
    learner: str
    sources: tuple[str, ...]
    name: str


def sources_of(objective: Objective, teachers: Sequence[str]) -> tuple[str, ...]:
    """The names of the teachers that an objective compares with. Raises `ValueError`: it names none of several
    teachers, or one that is not there."""
    if not objective.uses_teacher:
        return ()
    if objective.uses_all_teachers:
        return tuple(teachers)
    if objective.teacher is None and len(teachers) > 1:
        raise ValueError(
            f"There are several teachers ({', '.join(teachers)}), and {objective.name} does not say which it learns from. "
            f"Give it one: {type(objective).__name__}(teacher={teachers[0]!r}, ...); EnsembleKD learns from all of them."
        )
    if objective.teacher is not None and objective.teacher not in teachers:
        raise ValueError(
            f"{objective.name} learns from teacher={objective.teacher!r}, which is not there. The teachers are: "
            f"{', '.join(teachers) or 'none'}. Several are given as teacher_model={{name: model, ...}}."
        )
    return (objective.teacher or teachers[0],) if teachers else (SINGLE,)


def terms_of(objectives: Sequence[Objective], teachers: Mapping[str, Teacher]) -> list[Term]:
    """The terms of the student, and after them those of its peers."""
    named = list(teachers)
    named_terms = zip(objectives, unique_names(objectives), strict=True)
    terms = [Term(objective, STUDENT, sources_of(objective, named), name) for objective, name in named_terms]
    for peer, teacher in teachers.items():
        names = unique_names(teacher.objectives)
        for objective, name in zip(teacher.objectives, names, strict=True):
            sources = (STUDENT,) if objective.uses_teacher else ()
            terms.append(Term(objective, peer, sources, f"{peer}_{name}"))
    return terms


def required_outputs(
    who: str, terms: Iterable[Term], steps: Iterable[TrainingStep] | None = None
) -> tuple[frozenset[str], Indices] | None:
    """The outputs that terms need of one model: their kinds, and which hidden states and attentions (`None` for all).
    `None` if they need none, as their extra forward passes gave all in `steps`."""
    needs: set[str] = set()
    found: dict[str, list[Any]] = {"hidden_states": [], "attentions": []}
    is_used = False
    for term, step in zip(terms, repeat(TrainingStep({})) if steps is None else steps, strict=False):
        roles = (who == term.learner and step.student is None, who in term.sources and step.teacher is None)
        for role in (role for role, involved in enumerate(roles) if involved):
            is_used = True
            needs |= term.objective.needs - ({"loss"} if role else set())
            for need in found.keys() & term.objective.needs:
                indices = term.objective.indices(need)
                found[need].append(None if indices is None else indices[role])
    read = {need: None if None in several else frozenset[int]().union(*several) for need, several in found.items()}
    return (frozenset(needs), read) if is_used else None


class LossWeighting:
    """The adaptive weights of the terms. Raises `ValueError`: a weight by agreement of an objective that predicts
    nothing, or one by gradients with no task loss."""

    def __init__(self, terms: Sequence[Term]) -> None:
        self._terms = terms
        weights = {i: term.objective.weight for i, term in enumerate(terms)}
        self._weights = {i: weight for i, weight in weights.items() if isinstance(weight, AdaptiveWeight)}
        self._sums: dict[int, torch.Tensor] = {}
        self._task: dict[int, int] = {}
        for i, weight in self._weights.items():
            if isinstance(weight, ByAgreement) and not isinstance(terms[i].objective, LogitKD):
                raise ValueError(
                    f"{terms[i].name}: ByAgreement asks whether student and teacher predict the same class, so it is a "
                    "weight for LogitKD. Use ByGradientNorm or a schedule."
                )
            if isinstance(weight, ByGradientNorm):
                learner = terms[i].learner
                tasks = [j for j, t in enumerate(terms) if t.learner == learner and "loss" in t.objective.needs]
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
        return {self._terms[i].name: weight.state() for i, weight in self._weights.items()}

    def load_state(self, known: Mapping[str, Any]) -> None:
        for i, weight in self._weights.items():
            weight.load_state(known.get(self._terms[i].name))
