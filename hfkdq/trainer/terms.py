# SPDX-License-Identifier: Apache-2.0
"""Terms of the loss: an objective, the model that learns it, and its teachers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

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
    terms = [
        Term(objective, STUDENT, sources_of(objective, named), name)
        for objective, name in zip(objectives, unique_names(objectives), strict=True)
    ]
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
