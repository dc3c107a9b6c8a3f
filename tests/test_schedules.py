# SPDX-License-Identifier: Apache-2.0
import pytest

from hfkdq.schedules import (
    BottomUp,
    Cosine,
    Cubic,
    Exponential,
    Linear,
    Piecewise,
    Step,
    TopDown,
    extremes,
    value_at,
)


@pytest.mark.parametrize("cls", [Linear, Cosine, Cubic, Exponential])
def test_ramps_start_and_end_where_they_say(cls):
    ramp = cls(1.0, 3.0, begin=0.2, until=0.6)
    assert [ramp(0.0), ramp(0.2), ramp(0.6), ramp(1.0)] == pytest.approx([1.0, 1.0, 3.0, 3.0])
    assert 1.0 < ramp(0.4) < 3.0


def test_shapes_at_the_half():
    assert [f(0.0, 1.0)(0.5) for f in (Linear, Cosine, Cubic)] == pytest.approx([0.5, 0.5, 0.875])
    assert Cosine(0.0, 1.0)(0.25) == pytest.approx(0.1464466)


def test_step_and_plain_numbers():
    assert [Step(1, 2, at=0.3)(p) for p in (0.0, 0.29, 0.3, 1.0)] == [1, 1, 2, 2]
    assert value_at(4, 0.7) == 4.0
    assert value_at(lambda p: 2 * p, 0.25) == 0.5
    assert extremes(Linear(2, -1)) == (-1.0, 2.0)


def test_a_ramp_needs_room():
    with pytest.raises(ValueError, match="begin"):
        Linear(0, 1, begin=0.5, until=0.5)


def test_exponential_multiplies_by_the_same_factor_in_equal_times():
    ramp = Exponential(8.0, 0.5)
    assert [ramp(p) for p in (0.0, 0.25, 0.5, 0.75, 1.0)] == pytest.approx([8.0, 4.0, 2.0, 1.0, 0.5])
    for start, end in ((0.0, 1.0), (1.0, -1.0)):
        with pytest.raises(ValueError, match="larger than 0"):
            Exponential(start, end)


def test_piecewise_runs_straight_between_its_points():
    curve = Piecewise([(0.2, 1.0), (0.4, 3.0), (0.8, 0.0)])
    assert [curve(p) for p in (0.0, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)] == pytest.approx([1, 1, 2, 3, 1.5, 0, 0])
    for points in ([], [(0.5, 1), (0.2, 1)], [(0.5, 1), (0.5, 2)], [(-0.1, 1)], [(0.0, 1), (1.5, 2)]):
        with pytest.raises(ValueError, match="rising progress"):
            Piecewise(points)


def test_layers_come_in_stages_of_equal_length():
    moments = (0.0, 0.32, 0.34, 0.67, 1.0)
    assert [BottomUp()(p, 3) for p in moments] == [[1, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 1, 1]]
    assert [BottomUp(cumulative=False)(p, 3) for p in moments] == [
        [1, 0, 0],
        [1, 0, 0],
        [0, 1, 0],
        [0, 0, 1],
        [0, 0, 1],
    ]
    assert [TopDown()(p, 3) for p in moments] == [[0, 0, 1], [0, 0, 1], [0, 1, 1], [1, 1, 1], [1, 1, 1]]
