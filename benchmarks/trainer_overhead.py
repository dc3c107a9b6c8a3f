#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""What a step of `DistillationTrainer` costs beyond the teacher's forward pass and the student's step.

    make bench-overhead

A hand-written loop does the same work: the teacher's forward pass, the student's forward and backward pass on the sum of
task loss, logit and hidden-state distillation, clipping, AdamW. Steps of both alternate in one process, each on models
of its own, and the ratio is that of the medians. Peak memory is that of a process of its own for each. Writes
`results.json`.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from datasets import Dataset
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.utils import logging

from hfkdq import DistillationTrainer, HiddenStateKD, LogitKD, TaskLoss

TEMPERATURE = 2.0
LAYERS = {1: 2, 2: 4, 3: 6, 4: 8, 5: 10, 6: 12}
VARIANTS = {
    "logits": [TaskLoss(), LogitKD(temperature=TEMPERATURE)],
    "logits and hidden states": [TaskLoss(), LogitKD(temperature=TEMPERATURE), HiddenStateKD(layers=LAYERS)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("out/trainer_overhead"))
    parser.add_argument("--steps", type=int, default=40, help="timed steps of each loop")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an example")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--memory", nargs=2, metavar=("LOOP", "VARIANT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.set_verbosity_error()
    if options.memory:
        print(json.dumps(peak_memory(*options.memory, options)))
        return
    results = {}
    for variant in VARIANTS:
        times = alternate(variant, options)
        peaks = {loop: memory_of(loop, variant, options) for loop in ("trainer", "bare")}
        results[variant] = {**times, "peak_mb": peaks}
    options.output_dir.mkdir(parents=True, exist_ok=True)
    (options.output_dir / "results.json").write_text(json.dumps(results, indent=2))
    show(results, options)


def models(device: str) -> tuple[BertForSequenceClassification, BertForSequenceClassification]:
    """A student and a teacher of the sizes of MiniLM with 6 and 12 layers."""
    sizes = dict(hidden_size=384, num_attention_heads=12, intermediate_size=1536, num_labels=3)
    set_seed(0)
    student = BertForSequenceClassification(BertConfig(num_hidden_layers=6, **sizes))
    teacher = BertForSequenceClassification(BertConfig(num_hidden_layers=12, **sizes))
    return student.to(device), teacher.to(device).eval().requires_grad_(False)


def dataset(options: argparse.Namespace) -> Dataset:
    """As many examples as one loop needs, with five steps to warm up."""
    rows = (options.steps + 5) * options.batch_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30000, (rows, options.tokens), generator=generator)
    labels = torch.randint(0, 3, (rows,), generator=generator)
    return Dataset.from_dict(
        {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist(), "labels": labels.tolist()}
    )


def bare_steps(variant: str, student: torch.nn.Module, teacher: torch.nn.Module, rows: Dataset, options) -> Iterator:
    """The same training written by hand; one step for every item asked of it."""
    hidden = "hidden" in variant
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-5, fused=True)  # as Trainer does
    student.train()
    for batch in DataLoader(rows, options.batch_size, collate_fn=default_data_collator):
        batch = {key: value.to(options.device) for key, value in batch.items()}
        labels = batch.pop("labels")
        with torch.no_grad():
            target = teacher(**batch, output_hidden_states=hidden)
        output = student(**batch, labels=labels, output_hidden_states=hidden)
        loss = output.loss + F.kl_div(
            F.log_softmax(output.logits / TEMPERATURE, -1), F.log_softmax(target.logits / TEMPERATURE, -1),
            reduction="batchmean", log_target=True,
        ) * TEMPERATURE**2  # fmt: skip
        if hidden:
            pairs = [F.mse_loss(output.hidden_states[s], target.hidden_states[t]) for s, t in LAYERS.items()]
            loss = loss + torch.stack(pairs).mean()
        del output, target
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield


def make_trainer(variant: str, options, folder: str, callbacks) -> DistillationTrainer:
    student, teacher = models(options.device)
    arguments = TrainingArguments(
        folder, use_cpu=options.device == "cpu", report_to=[], save_strategy="no", logging_steps=10, disable_tqdm=True,
        per_device_train_batch_size=options.batch_size, num_train_epochs=1, learning_rate=5e-5,
    )  # fmt: skip
    return DistillationTrainer(
        student, arguments, default_data_collator, dataset(options), callbacks=callbacks,
        teacher_model=teacher, objectives=VARIANTS[variant],
    )  # fmt: skip


class Alternate(TrainerCallback):
    """Takes a step of the other loop after every step of the trainer, and the time of both."""

    def __init__(self, other: Iterator, device: str, progress: Progress, task) -> None:
        self.other, self.device, self.progress, self.task = other, device, progress, task
        self.times: dict[str, list[float]] = {"trainer": [], "bare": []}

    def _now(self) -> float:
        if self.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Starts the clock."""
        self.start = self._now()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Takes both times; the trainer's is of everything since the other loop's last step."""
        middle = self._now()
        next(self.other)
        end = self._now()
        self.times["trainer"].append(middle - self.start)
        self.times["bare"].append(end - middle)
        self.progress.advance(self.task)
        self.start = self._now()

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """Silence: the table comes at the end."""


def alternate(variant: str, options) -> dict:
    """Times of both loops, in turn, and their ratio."""
    student, teacher = models(options.device)
    rows = dataset(options)
    with Progress() as progress, tempfile.TemporaryDirectory() as folder:
        task = progress.add_task(variant, total=options.steps + 5)
        callback = Alternate(bare_steps(variant, student, teacher, rows, options), options.device, progress, task)
        trainer = make_trainer(variant, options, folder, [callback])
        trainer.remove_callback(_printer(trainer))
        trainer.train()
    times = {loop: values[5:] for loop, values in callback.times.items()}
    medians = {loop: statistics.median(values) for loop, values in times.items()}
    ratios = [ours / bare for ours, bare in zip(times["trainer"], times["bare"], strict=True)]
    return {
        "median_ms": {loop: 1000 * value for loop, value in medians.items()},
        "fastest_ms": {loop: 1000 * min(values) for loop, values in times.items()},
        "ratio": medians["trainer"] / medians["bare"],
        "quartiles_of_ratios": statistics.quantiles(ratios, n=4),
    }


def _printer(trainer: DistillationTrainer):
    return next(c for c in trainer.callback_handler.callbacks if type(c).__name__ == "PrinterCallback")


def memory_of(loop: str, variant: str, options) -> float:
    """Peak memory of one loop in megabytes beyond what models and data take, in a process of its own."""
    command = [sys.executable, __file__, "--memory", loop, variant, "--steps", "3", "--device", options.device]
    sizes = ["--batch_size", str(options.batch_size), "--tokens", str(options.tokens)]
    return json.loads(subprocess.run([*command, *sizes], check=True, capture_output=True, text=True).stdout)


def peak_memory(loop: str, variant: str, options) -> float:
    """Runs one loop for a few steps."""
    rows = dataset(options)
    if loop == "trainer":
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(variant, options, folder, [])
            trainer.remove_callback(_printer(trainer))
            before = _memory(options.device)
            trainer.train()
    else:
        student, teacher = models(options.device)
        before = _memory(options.device)
        for _ in bare_steps(variant, student, teacher, rows, options):
            pass
    peak = torch.cuda.max_memory_allocated() if options.device != "cpu" else _peak()
    return (peak - before) / 1e6


def _memory(device: str) -> int:
    if device != "cpu":
        return torch.cuda.memory_allocated()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def show(results: dict, options) -> None:
    """Prints the table."""
    where = torch.cuda.get_device_name() if options.device != "cpu" else f"CPU, {torch.get_num_threads()} threads"
    table = Table(title=f"A step of {options.batch_size} x {options.tokens} tokens, {where}")
    for column in ("Objectives", "Trainer ms", "By hand ms", "Ratio", "Quartiles", "Memory MB", "Ratio"):
        table.add_column(column, justify="left" if column == "Objectives" else "right", no_wrap=column != "Objectives")
    for variant, result in results.items():
        low, _, high = result["quartiles_of_ratios"]
        ours, bare = result["peak_mb"]["trainer"], result["peak_mb"]["bare"]
        table.add_row(
            variant, f"{result['median_ms']['trainer']:.1f}", f"{result['median_ms']['bare']:.1f}",
            f"{result['ratio']:.3f}", f"{low:.2f}-{high:.2f}", f"{ours:.0f}/{bare:.0f}", f"{ours / bare:.3f}",
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
