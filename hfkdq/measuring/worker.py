# SPDX-License-Identifier: Apache-2.0
"""A process that holds one engine and times it when asked: `python -m hfkdq.measuring.worker`.

Takes one JSON object as its argument (`engine`, `path`, `inputs`, `threads`), then on each line of its input the seconds
of a turn, and answers with the milliseconds of every call in it; knows nothing of the other engines, and imports
nothing but its own.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

WARM_UP_CALLS = 3
CALLS_PER_TURN = (10, 2000)


def main() -> None:
    """Builds the engine, warms it up, says that it is ready and times it until the input ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints must not mix with the answers
    task = json.loads(sys.argv[1])
    with np.load(task["inputs"]) as arrays:
        inputs = dict(arrays)
    module, _, function = task["engine"].partition(":")
    call = getattr(importlib.import_module(module), function)(task["path"], inputs, task["threads"])
    call()
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(_time_turn(call, float(line))), file=answers, flush=True)


def _time_turn(call: Callable[[], Any], seconds: float) -> list[float]:
    """Milliseconds of each call: as many as fit into `seconds`, but 10 at least and 2,000 at most."""
    for _ in range(WARM_UP_CALLS):
        call()
    fewest, most = CALLS_PER_TURN
    milliseconds: list[float] = []
    end = time.perf_counter() + seconds
    while len(milliseconds) < fewest or (len(milliseconds) < most and time.perf_counter() < end):
        start = time.perf_counter_ns()
        call()
        milliseconds.append((time.perf_counter_ns() - start) / 1e6)
    return milliseconds


if __name__ == "__main__":
    main()
