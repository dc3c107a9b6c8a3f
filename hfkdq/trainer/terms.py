# SPDX-License-Identifier: Apache-2.0
"""Who learns what from whom: every term of the loss with its learner and its teacher.

Knows names and what objectives ask for; runs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..objectives.base import Objective, unique_names
from ..teachers import Peer

SINGLE = "teacher"
"""The name of a teacher that was given without one."""
STUDENT = "student"
Indices = dict[str, frozenset[int] | None]


@dataclass(frozen=True)
class Term:
    """One objective: what `learner` learns from `sources`, and the name under which it is logged."""

    objective: Objective
    learner: str
    sources: tuple[str, ...]
    name: str


def sources_of(objective: Objective, teachers: Sequence[str]) -> tuple[str, ...]:
    """The names of the teachers that an objective compares with.

    Raises:
        ValueError: it names none of several teachers, or one that is not there.
    """
    if not objective.uses_teacher:
        return ()
    if objective.every_teacher:
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


def terms_of(objectives: Sequence[Objective], teachers: Mapping[str, Any]) -> list[Term]:
    """The terms of the student, and after them those of its peers."""
    named = list(teachers)
    terms = [
        Term(objective, STUDENT, sources_of(objective, named), name)
        for objective, name in zip(objectives, unique_names(objectives), strict=True)
    ]
    for peer, teacher in teachers.items():
        if isinstance(teacher, Peer):
            names = unique_names(teacher.objectives)
            for objective, name in zip(teacher.objectives, names, strict=True):
                sources = (STUDENT,) if objective.uses_teacher else ()
                terms.append(Term(objective, peer, sources, f"{peer}_{name}"))
    return terms


def is_read(who: str, terms: Iterable[Term]) -> bool:
    """Whether any term reads what a model returns for the batch as it is; one with passes of its own may need nothing."""
    involved = [term.objective for term in terms if who == term.learner or who in term.sources]
    return any(objective.needs or not objective.passes_first for objective in involved)


def asked_of(who: str, terms: Iterable[Term]) -> tuple[frozenset[str], Indices]:
    """What terms need of one model: kinds of outputs, and of hidden states and attentions which (`None` for all)."""
    needs: set[str] = set()
    parts: dict[str, list[Any]] = {"hidden_states": [], "attentions": []}
    for term in terms:
        for role, involved in ((0, who == term.learner), (1, who in term.sources)):
            if not involved:
                continue
            needs |= term.objective.needs - ({"loss"} if role else set())
            for need in parts.keys() & term.objective.needs:
                indices = term.objective.indices(need)
                parts[need].append(None if indices is None else indices[role])
    read: Indices = {need: None if None in found else frozenset[int]().union(*found) for need, found in parts.items()}
    return frozenset(needs), read
