# SPDX-License-Identifier: Apache-2.0
"""The curves of a training, from the log that the Trainer keeps: a value by optimizer step for every loss term."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from ..schema import read_file

# What the Trainer logs beside losses and metrics.
_OTHERS = re.compile(
    r"step|epoch|activation_(min|max)/.*|learning_rate|grad_norm|total_flos|num_tokens|.*runtime|.*per_second|train_.*|memory.*"
)
STATE = "trainer_state.json"


def curves_of(log_history: Iterable[Mapping[str, Any]]) -> dict[str, list[list[float]]]:
    """The values of every loss and metric by step, of those that `trainer.state.log_history` has twice or more."""
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


def settings_of(args: TrainingArguments, log_history: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """The settings of a training, by their names in words; the steps are those of its log."""
    steps = max((entry["step"] for entry in log_history if isinstance(entry.get("step"), int)), default=0)
    rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    found = {
        "optimizer steps": steps, "epochs": args.num_train_epochs if args.max_steps <= 0 else 0, "rows in a step": rows,
        "learning rate": args.learning_rate, "schedule": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "warm-up steps": args.get_warmup_steps(steps) if steps else 0, "weight decay": args.weight_decay,
        "label smoothing": args.label_smoothing_factor, "optimizer": str(getattr(args.optim, "value", args.optim)),
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "float32", "seed": args.seed,
    }  # fmt: skip
    return {name: value for name, value in found.items() if name == "seed" or value}


def read_curves(folder: Path) -> dict[str, list[list[float]]]:
    """The curves of the training that wrote a checkpoint: of the last `trainer_state.json` in it or its checkpoints.
    Raises `ValueError`: the file is damaged; one line names it."""
    return curves_of(_last_state(folder).get("log_history", []))


def read_settings(folder: Path) -> dict[str, Any]:
    """What the same file says of the settings of the training, as [`settings_of`] names them."""
    state = _last_state(folder)
    rates = [entry.get("learning_rate") for entry in state.get("log_history", [])]
    found = {
        "optimizer steps": state.get("global_step"), "epochs": state.get("epoch"),
        "rows in a batch": state.get("train_batch_size"),
        "largest learning rate in the log": max((rate for rate in rates if isinstance(rate, float)), default=None),
    }  # fmt: skip
    return {name: value for name, value in found.items() if isinstance(value, (int, float)) and value}


def _last_state(folder: Path) -> dict[str, Any]:
    """The state with the longest log."""
    states = map(read_file, [*folder.glob(STATE), *folder.glob(f"checkpoint-*/{STATE}")])
    logs = ((state.get("log_history"), state) for state in states)
    fine = [(log, state) for log, state in logs if isinstance(log, list) and all(isinstance(one, dict) for one in log)]
    return max(fine, key=lambda pair: len(pair[0]), default=([], {}))[1]
