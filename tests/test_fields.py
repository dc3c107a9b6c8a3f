# SPDX-License-Identifier: Apache-2.0
"""Rules of settings: said in the annotation of a field, held against numbers, schedules and names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import pytest

from hfkdq.fields import COUNT, POSITIVE, SHARE, check_fields, check_rules
from hfkdq.schedules import Linear, Schedule


@dataclass
class Settings:
    temperature: Annotated[float | Schedule, POSITIVE] = 1.0
    share: Annotated[float | Schedule, SHARE] = 0.5
    count: Annotated[int | None, COUNT] = None
    kind: Literal["a", "b", "c"] = "a"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(temperature=0), "Settings: temperature must be larger than 0, got 0."),
        (dict(temperature=float("nan")), "temperature must be larger than 0, got nan"),
        (dict(temperature=Linear(1, 0)), "temperature must be larger than 0, got Linear"),
        (dict(temperature="warm"), "'warm' is neither a number nor a function of progress"),
        (dict(share=Linear(0.5, 1.5)), r"share must be in \[0, 1\], got Linear"),
        (dict(count=1.5), "count must be a positive integer, got 1.5"),
        (dict(count=0), "count must be a positive integer, got 0"),
        (dict(kind="d"), "Settings: kind must be 'a' or 'b' or 'c', got 'd'. Write one of them for kind='d'."),
    ],
)
def test_what_breaks_a_rule_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        check_rules(Settings(**settings))


def test_what_keeps_the_rules_is_let_through():
    check_rules(Settings())
    check_rules(Settings(temperature=Linear(1, 2), share=Linear(0, 1), count=3, kind="c"))


def test_a_rule_does_not_hide_the_type_of_a_field():
    with pytest.raises(ValueError, match=r"count must be an integer or None|count must be None or an integer"):
        check_fields(Settings(count=2.5))
    with pytest.raises(ValueError, match="temperature must be a finite number"):
        check_fields(Settings(temperature=float("inf")))


def test_rules_hold_in_a_subclass_with_types_that_nobody_finds():
    class Local:
        pass

    @dataclass
    class Mine(Settings):
        own: Local | None = None

    with pytest.raises(ValueError, match="Mine: temperature must be larger than 0"):
        check_rules(Mine(temperature=0.0))
