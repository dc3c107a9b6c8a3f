# SPDX-License-Identifier: Apache-2.0
"""Runs cells, each in a process of its own, and keeps what comes of them."""

from __future__ import annotations

import gc
import json
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import hfkdq

from .cells import CELLS
from .entries import ENTRIES, Entry
from .page import FAILS, LINES, REFUSED, WORKS, read, results_file
from .tasks import PREFIX, TASKS, other_tasks

PACKAGE = str(Path(hfkdq.__file__).parent)
LINE = LINES[int(transformers.__version__.split(".")[0]) >= 5]
Result = dict[str, str]


def state_of(model: Any) -> tuple[Any, ...]:
    """What must be as before where something is refused."""
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    return weights, model.config.to_dict(), [type(module).__name__ for module in model.modules()]


def same_state(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return (
        one[1:] == other[1:]
        and one[0].keys() == other[0].keys()
        and all(torch.equal(other[0][name], value) for name, value in one[0].items())
    )


def is_refusal(error: Exception) -> bool:
    """Whether a line of hfkdq raised an error, of a kind that says what is wrong with what came.

    What a library written in C++ raises comes out of the line that called it, which raises nothing itself.
    """
    where = traceback.extract_tb(error.__traceback__)[-1]
    is_kind = isinstance(error, (ValueError, TypeError, NotImplementedError, RuntimeError))
    return is_kind and where.filename.startswith(PACKAGE) and str(where.line).startswith("raise ")


def run_cell(entry: Entry, cell: str) -> Result:
    """What comes of one cell."""
    if cell.startswith(PREFIX):
        return run_cell(other_tasks(entry)[cell.removeprefix(PREFIX)], "distillation")
    model = entry.make()
    before = state_of(model)
    with tempfile.TemporaryDirectory() as folder:
        try:
            note = CELLS[cell](entry, model, Path(folder))
        except Exception as error:
            why = f"{type(error).__name__}: {' '.join(str(error).split())}"
            if not is_refusal(error):
                where = traceback.extract_tb(error.__traceback__)[-1]
                return {"result": FAILS, "why": why[:600], "where": f"{Path(where.filename).name}: {where.name}"}
            if not same_state(before, state_of(model)):
                return {"result": FAILS, "why": f"refused, but the model has changed: {why[:600]}"}
            return {"result": REFUSED, "why": " ".join(str(error).split())}
    return {"result": WORKS, **({"note": note} if note else {})}


def apart(work: Callable[[], Result], seconds: float, is_loud: bool = False) -> Result:
    """What `work` gives in a process of its own, which may crash or never end."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        os.close(reader)
        if not is_loud:
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1)
            os.dup2(silence, 2)
        try:
            found = work()
        except BaseException as error:
            found = {"result": FAILS, "why": f"{type(error).__name__}: {error}"[:600]}
        with os.fdopen(writer, "w") as pipe:
            pipe.write(json.dumps(found))
        os._exit(0)
    os.close(writer)
    end, text = time.monotonic() + seconds, b""
    os.set_blocking(reader, False)
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        while True:
            try:
                chunk = os.read(reader, 65536)
            except BlockingIOError:
                break
            if not chunk:
                break
            text += chunk
        if done:
            os.close(reader)
            if text:
                return json.loads(text)
            return {"result": FAILS, "why": f"the process ended with signal {status & 127}"}
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reader)
    return {"result": FAILS, "why": f"not done in {seconds:.0f} seconds"}


def run(families: Iterable[str], cells: Sequence[str], again: bool, seconds: float, is_loud: bool) -> None:
    """Runs what has no result yet, and writes every result at once."""
    gc.freeze()  # a training begins with a search for garbage, which would go through all that is imported
    for family in families:
        entry = ENTRIES[family]
        if not entry.exists:
            data = read(LINE)
            data["absent"] = sorted({*data.get("absent", ()), family})
            write_results(data)
            continue
        others = [PREFIX + task for task in other_tasks(entry)] if TASKS in cells else []
        for cell in [*(cell for cell in cells if cell != TASKS), *others]:
            if not again and cell in read(LINE)["families"].get(family, {}):
                continue
            start = time.monotonic()
            found = apart(lambda entry=entry, cell=cell: run_cell(entry, cell), seconds, is_loud)
            print(
                f"{family:18} {cell:18} {found['result']:8} {time.monotonic() - start:5.1f} s  {found.get('why', '')[:200]}"
            )
            data = read(LINE)
            data["versions"] = {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]}
            data["families"].setdefault(family, {})[cell] = found
            data["families"] = {name: data["families"][name] for name in ENTRIES if name in data["families"]}
            write_results(data)


def write_results(data: dict[str, Any]) -> None:
    """Replaces the file of this line at once."""
    new = results_file(LINE).with_suffix(".new")
    new.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    new.replace(results_file(LINE))
