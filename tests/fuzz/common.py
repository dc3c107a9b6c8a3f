# SPDX-License-Identifier: Apache-2.0
"""Mutations of JSON, and what must hold whatever they do: an answer in time, one clear error, nothing executed."""

from __future__ import annotations

import copy
import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("HFKDQ_FUZZ_EXAMPLES", "100"))
SECONDS = 2
bounded = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)  # fmt: skip
# What runs something, or reaches for another machine.
_FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "socket.connect", "pty.spawn")
_watching: list[str] = []


def _hook(event: str, args: Any) -> None:
    if _watching and event in _FORBIDDEN:
        _watching.append(event)


sys.addaudithook(_hook)

HOSTILE = [
    None, True, False, 0, -1, 1, 255, 256, 2**31, 2**53, 2**63, -(2**70), 10**400, 0.0, -0.5, 1e-300, 1e308, float("nan"),
    float("inf"), float("-inf"), "", "8", "no", "nan", "([a-z._0-9]+)*!", "((a{999}){999}){999}", ".*", "a" * 20_000, "\x00",
    "\n# Heading\n", "```\nimport os\n```", "{{ 7 * 7 }}", "<script>alert(1)</script>", "](http://example.org)", "../../etc/passwd",
    "__class__", "classifier", "classifier.weight", "bert", "\ud800", "\u202e", "AAAA", "x" * 1001, [], {}, [[]], [None], {"": 1},
    {"__class__": "os.system"}, {"_target_": "os.system"}, ["query", 5], list(range(1000)), {str(i): i for i in range(1000)},
    json.loads("[" * 200 + "]" * 200), {"a": json.loads('{"a":' * 200 + "1" + "}" * 200)},
]  # fmt: skip
_PLACES = st.lists(st.integers(0, 10**6), min_size=1, max_size=3)
mutations = st.lists(
    st.tuples(
        st.sampled_from(["drop", "replace", "replace", "replace", "add", "swap", "rename", "repeat", "nudge"]),
        st.integers(0, 10**6),
        st.integers(0, 10**6),
        st.sampled_from(HOSTILE),
    ),
    min_size=1,
    max_size=4,
)
"""What to do, where, where else, and with which value."""


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """All paths into a JSON value, the whole first."""
    found = [path]
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        found += places(value, (*path, key))
    return found


def mutated(data: Any, steps: list[tuple[str, int, int, Any]]) -> Any:
    """`data` after the mutations; the whole of it may be another value."""
    root = {"root": copy.deepcopy(data)}
    for what, first, second, value in steps:
        paths = places(root["root"])[:20_000]
        path = ("root", *paths[first % len(paths)])
        owner = _at(root, path[:-1])
        if what == "drop" and len(path) > 1:
            del owner[path[-1]]
        elif what == "swap":
            other = ("root", *paths[second % len(paths)])
            owner[path[-1]] = copy.deepcopy(_at(root, other))
        elif what == "rename" and isinstance(owner, dict) and len(path) > 1:
            owner[value if isinstance(value, str) else str(value)[:100]] = owner.pop(path[-1])
        elif what == "add" and isinstance(_at(root, path), dict):
            _at(root, path)[str(value)[:2000]] = copy.deepcopy(value)
        elif what == "repeat" and isinstance(_at(root, path), list):
            owner[path[-1]] = _at(root, path) * (2 + second % 50)
        elif what == "nudge" and isinstance(_at(root, path), (int, float)) and not isinstance(_at(root, path), bool):
            owner[path[-1]] = _at(root, path) * (second % 7 - 3)
        else:
            owner[path[-1]] = copy.deepcopy(value)
    return root["root"]


def _at(data: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        data = data[key]
    return data


@contextmanager
def in_time():
    """Fails what takes longer than it may, a loop in C too once that ends."""

    def late(*_: Any) -> None:
        raise AssertionError(f"took more than {SECONDS} s")

    # Of the processor's time, as other tests run beside this; and of the clock's, in case it waits for something.
    timers = {signal.SIGVTALRM: (signal.ITIMER_VIRTUAL, SECONDS), signal.SIGALRM: (signal.ITIMER_REAL, 20 * SECONDS)}
    before = {number: signal.signal(number, late) for number in timers}
    for timer, seconds in timers.values():
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for timer, _ in timers.values():
            signal.setitimer(timer, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def answers(call: Callable[[], Any]) -> bool:
    """Whether `call` returned; else it raised a clear `ValueError`, in time, and ran nothing."""
    _watching.append("")
    try:
        with in_time():
            call()
        return True
    except ValueError as error:
        text = str(error)
        assert len(text) > 20, repr(text)
        assert "\n" not in text, text
        assert len(text) < 3000, len(text)
        return False
    finally:
        seen = [event for event in _watching if event]
        _watching.clear()
        assert not seen, seen
