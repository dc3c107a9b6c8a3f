# SPDX-License-Identifier: Apache-2.0
"""A process that holds one engine and times it when asked: `python -I worker.py TASK`.

Takes one JSON object as its argument (`engine`, `path`, `inputs`, `threads`, `packages`, `hfkdq`), then on each line of
its input the seconds of a turn, and answers with the milliseconds of every call in it. It is started isolated, imports
the standard library before installed packages, and of those only from the folders named in its task.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import site
import sys
import time
from collections.abc import Callable
from typing import Any

WARM_UP_CALLS = 3
CALLS_PER_TURN = (10, 2000)


def main() -> None:
    """Builds the engine, warms it up, says that it is ready and times it until the input ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints must not mix with the answers
    task = json.loads(sys.argv[1])
    _import_from(task["packages"], task["hfkdq"])
    import numpy as np

    with np.load(task["inputs"]) as arrays:
        inputs = dict(arrays)
    module, _, function = task["engine"].partition(":")
    call = getattr(importlib.import_module(module), function)(task["path"], inputs, task["threads"])
    call()
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(_time_turn(call, float(line))), file=answers, flush=True)


def _import_from(packages: list[str], package: str) -> None:
    """Takes installed packages from `packages` first, and `hfkdq` from its own folder without what lies beside it."""
    standard = [entry for entry in sys.path if os.path.basename(entry) not in ("site-packages", "dist-packages")]
    installed = [entry for entry in sys.path if entry not in standard]
    sys.path[:] = standard
    for entry in (*packages, *installed):
        site.addsitedir(entry)
    place = os.path.join(package, "__init__.py")
    spec = importlib.util.spec_from_file_location("hfkdq", place, submodule_search_locations=[package])
    if spec is None or spec.loader is None:
        raise ImportError(f"There is no package at {package}.")
    sys.modules["hfkdq"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


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
