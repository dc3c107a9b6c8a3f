# SPDX-License-Identifier: Apache-2.0
"""Goals: what meets them, what is best, and what is said where nothing does."""

import pytest

from hfkdq.recipes.goals import Goals, Outcome, parse_size, parse_time

pytestmark = pytest.mark.every_case
GOALS = Goals(keep=0.9, max_size=10e6, max_latency=5)


def test_amounts():
    assert [parse_size(text) for text in ("10MB", "1.5 kB", "2MiB", "7")] == [10e6, 1500, 2 * 2**20, 7]
    assert [parse_time(text) for text in ("5ms", "0.2s", "100 us", "3")] == [5, 200, pytest.approx(0.1), 3]


@pytest.mark.parametrize("text", ["", "MB", "10 parsecs", "-3MB", "1e", "ten", "nan", "inf", "1 2MB"])
def test_what_is_no_amount(text):
    for parse in (parse_size, parse_time):
        with pytest.raises(ValueError, match="expected a"):
            parse(text)


@pytest.mark.parametrize("wrong", [{"keep": 0}, {"keep": 99}, {"keep": float("nan")}, {"max_size": 0}, {"max_latency": float("inf")}])  # fmt: skip
def test_bounds_that_are_none(wrong):
    with pytest.raises(ValueError, match="--"):
        Goals(**wrong)


def test_what_meets_all_bounds_comes_before_what_misses_one_and_the_best_keeps_most():
    fine, better = Outcome(kept=0.92, size=9e6, latency=4), Outcome(kept=0.95, size=9.5e6, latency=4.5)
    large, small = Outcome(kept=1.0, size=12e6, latency=4), Outcome(kept=0.5, size=1e6, latency=1)
    assert GOALS.missed(fine) == {}
    assert GOALS.missed(large) == {"--max-size": pytest.approx(0.2)}
    assert GOALS.missed(small) == {"--keep": pytest.approx(1 - 0.5 / 0.9)}
    assert sorted((fine, better, large, small), key=GOALS.score) == [small, large, fine, better]
    assert GOALS.best({3: fine, 5: better, 7: large}) == 5
    assert GOALS.best({7: large}) is None
    assert Goals(keep=0.9).best({1: Outcome(kept=0.95, size=3), 2: Outcome(kept=0.95, size=2)}) == 2


def test_the_frontier_is_what_none_beats():
    fine = Outcome(kept=0.92, size=9, latency=4)
    assert fine.is_beaten_by(Outcome(kept=0.93, size=9, latency=4))
    assert not fine.is_beaten_by(Outcome(kept=0.93, size=9, latency=5))
    assert not fine.is_beaten_by(fine)
    assert Outcome(kept=0.5, size=9).is_beaten_by(Outcome(kept=0.5, size=8))


def test_what_cannot_be_met_is_told_with_how_much_is_missing():
    told = GOALS.explain({0: Outcome(kept=0.95, size=12e6, latency=4), 1: Outcome(kept=0.8, size=11e6, latency=3)})
    assert "--max-size 10 MB is missed by all: the best has 11 MB" in told
    assert "--keep" not in told
    apart = GOALS.explain({0: Outcome(kept=0.95, size=12e6, latency=4), 1: Outcome(kept=0.5, size=9e6, latency=3)})
    assert "never all together; trial 0 misses --max-size by 20.0%" in apart
    assert "No trial" in GOALS.explain({})
