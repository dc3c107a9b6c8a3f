# SPDX-License-Identifier: Apache-2.0
"""The plan of a recipe: what would be done, how large things are, and how long the training takes on this machine."""

from __future__ import annotations

import copy
import math
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from textwrap import wrap
from typing import Any, TextIO

from rich.console import Console
from torch import nn
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback

from ..facts import short_count
from ..quantization.bit_choices import stored_bytes
from ..quantization.layers import weight_quantizers_of
from ..quantization.naming import quantized_modules
from ..recipes import dump
from ..report.table import megabytes
from ..specs import PruningSpec, QuantizationSpec
from .compress_setup import Setup

_STEPS = 8
"""Steps that are tried for the estimate; the first half warms up and does not count."""


class _Clock(TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self._began)


def print_plan(setup: Setup, folder: Path, stream: TextIO) -> None:
    """Tries a few steps on a copy of the student that is thrown away, and prints the plan and the whole recipe."""
    width = Console(file=stream).width
    for name, text in plan_lines(setup, folder):
        stream.write("\n".join(wrap(text, width, initial_indent=f"{name:<14}", subsequent_indent=" " * 14)) + "\n")
    stream.write(f"\n{dump(setup.recipe)}")


def plan_lines(setup: Setup, folder: Path) -> list[tuple[str, str]]:
    """The lines of the plan: a topic each, and its text. The student is trained for a few steps."""
    student, parts = _sized(setup.student), setup.parts
    seconds, steps, batch = _tried(setup)
    lines = [("model", f"{setup.recipe.model}: {_sized(setup.original)}")]
    if setup.teacher is not None:
        lines.append(("teacher", f"{setup.recipe.teacher or setup.recipe.model}: {_sized(setup.teacher)}"))
    lines.append(("student", student))
    lines.append(("data", f"trained on {setup.described[0]}; measured on {setup.described[1]}"))
    if parts.objectives:
        described = [(one := objective.describe()).pop("name") + _arguments(one) for objective in parts.objectives]
        lines.append(("objectives", " + ".join(described)))
    lines.extend(("pruning", PruningSpec.describe(spec.to_dict())) for spec, _ in parts.pruning)
    if parts.quantization is not None:
        size = f"{megabytes(weight_bytes(setup.student))} MB of weights"
        size += " before anything is pruned" if parts.pruning else ""
        lines.append(("quantization", f"{QuantizationSpec.describe(parts.quantization[0].to_dict())}: {size}"))
    lines.append(("training", f"{steps:,} steps of {batch} rows"))
    took = f"{seconds:.2g} s a step here"
    lines.append(
        ("time", f"about {_duration(seconds * steps)} of training ({took}); evaluation, export and timing come on top")
    )
    lines.append(("output", str(folder)))
    return lines


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the weights of a model as they are exported: integers where it carries fake quantizers, else as they are."""
    packed: dict[tuple[int, ...], int] = {}
    for module in quantized_modules(model).values():  # tables that are shared count once
        packed[tuple(id(weight) for _, weight in weight_quantizers_of(module).values())] = stored_bytes(module)
    done = {weight for weights in packed for weight in weights}
    rest = (p for p in model.parameters() if id(p) not in done)
    return sum(packed.values()) + sum(p.numel() * p.element_size() for p in rest)


def _tried(setup: Setup) -> tuple[float, int, int]:
    """Seconds of a step, the number of steps, and the rows of each."""
    clock = _Clock()
    with tempfile.TemporaryDirectory() as scratch:
        if setup.parts.pruning:
            replace(setup, student=copy.deepcopy(setup.student)).trainer(scratch)  # refuses what cannot be pruned
        unpruned = replace(setup, parts=replace(setup.parts, pruning=[]))  # its rounds do not fit into a few steps
        given = setup.parts.training
        changes = {"max_steps": _STEPS, "save_strategy": "no", "eval_strategy": "no", "load_best_model_at_end": False}
        tried = replace(
            unpruned, parts=replace(unpruned.parts, training={k: v for k, v in given.items() if k not in changes})
        )
        trainer = tried.trainer(scratch, clock, **changes, disable_tqdm=True, logging_strategy="no")
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        args = trainer.args
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    steps = given.get("max_steps", -1)
    if steps <= 0:
        steps = math.ceil(math.ceil(len(setup.train) / batch) * given.get("num_train_epochs", 3.0))
    return statistics.median(clock.seconds[len(clock.seconds) // 2 :]), steps, batch


def _sized(model: PreTrainedModel) -> str:
    """`BertForSequenceClassification, 6 layers, 66.4M parameters, 266 MB`."""
    parameters = list(model.parameters())
    size = sum(p.numel() * p.element_size() for p in parameters)
    layers = getattr(model.config, "num_hidden_layers", None)
    depth = f", {layers} layers" if isinstance(layers, int) else ""
    return f"{type(model).__name__}{depth}, {short_count(sum(p.numel() for p in parameters))} parameters, {megabytes(size)} MB"


def _arguments(settings: dict[str, Any]) -> str:
    return f"({', '.join(f'{name}={value}' for name, value in settings.items())})"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 1):.0f} seconds"
