# SPDX-License-Identifier: Apache-2.0
"""A process that holds one engine and times it when asked: `python -m hfkdq.report.worker`.

Takes one JSON object as its argument (`engine`, `path`, `inputs`, `threads`), then on each line of its input the seconds
of a turn, and answers with the milliseconds of every call in it; knows nothing of the other engines. Imports torch only to time torch.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

WARM_UP_CALLS = 3
CALLS_PER_TURN = (10, 2000)


def _onnx_call(path: str, inputs: dict[str, np.ndarray[Any, Any]], threads: int) -> Callable[[], Any]:
    from ..export.runtime import OnnxSession

    session = OnnxSession(path, threads=threads)
    return lambda: session(inputs)


def _torch_call(folder: str, inputs: dict[str, np.ndarray[Any, Any]], threads: int) -> Callable[[], Any]:
    import torch

    from hfkdq.architecture import load_checkpoint

    torch.set_num_threads(threads)
    model = load_checkpoint(folder, dtype="auto").eval()
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    tensors = {name: t.to(model.dtype) if t.is_floating_point() else t for name, t in tensors.items()}

    def call() -> Any:
        with torch.inference_mode():
            return model(**tensors)

    return call


def main() -> None:
    """Builds the engine, warms it up, says that it is ready and times it until the input ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints must not mix with the answers
    task = json.loads(sys.argv[1])
    with np.load(task["inputs"]) as arrays:
        inputs = dict(arrays)
    build = {"onnx": _onnx_call, "torch": _torch_call}[task["engine"]]
    call = build(task["path"], inputs, task["threads"])
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
