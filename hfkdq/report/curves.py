# SPDX-License-Identifier: Apache-2.0
"""The curves of a training, from the log that the Trainer keeps: a value by optimizer step for every loss term."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..schema import read_file

# What the Trainer logs beside losses and metrics.
_OTHERS = re.compile(
    r"step|epoch|activation_(min|max)/.*|learning_rate|grad_norm|total_flos|num_tokens|.*runtime|.*per_second|train_.*|memory.*"
)
STATE = "trainer_state.json"


def curves_of(log_history: Iterable[Mapping[str, Any]]) -> dict[str, list[list[float]]]:
    """The values of every loss and metric by step, of those that were logged twice or more.

    Args:
        log_history (`Iterable[Mapping]`): `trainer.state.log_history`.
    """
    curves: dict[str, list[list[float]]] = {}
    for entry in log_history:
        step = entry.get("step")
        if not isinstance(step, int):
            continue
        for name, value in entry.items():
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if is_number and not _OTHERS.fullmatch(name):
                curves.setdefault(name, []).append([float(step), float(value)])
    return {name: points for name, points in curves.items() if len(points) > 1}


def read_curves(folder: Path) -> dict[str, list[list[float]]]:
    """The curves of the training that wrote a checkpoint: of the last `trainer_state.json` in it or its checkpoints.

    Raises:
        ValueError: the file is damaged; one line names it.
    """
    states = [*folder.glob(STATE), *folder.glob(f"checkpoint-*/{STATE}")]
    found = [read_file(path).get("log_history") for path in states]
    logs = [log for log in found if isinstance(log, list) and all(isinstance(entry, dict) for entry in log)]
    logs.sort(key=len)
    return curves_of(logs[-1] if logs else [])
