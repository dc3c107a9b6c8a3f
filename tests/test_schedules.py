# SPDX-License-Identifier: Apache-2.0
import pytest

from hfkdq.schedules import Cosine, Cubic, Linear, Step, extremes, value_at


@pytest.mark.parametrize("cls", [Linear, Cosine, Cubic])
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
