#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""What does a cache of the teacher's outputs save? An epoch with the teacher and one without it, in turn.

    make bench-caching DATA=path/to/banking77

Teacher and student are those of `benchmarks/objectives.py`, whose fine-tuned teacher is used if it is there. The same
steps are taken with the teacher running and with its outputs read from disk, several times in turn, from the same seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from objectives import arguments, fine_tuned_teacher, load, student_of
from rich.console import Console
from rich.table import Table
from transformers import set_seed

from hfkdq import DistillationTrainer, HiddenStateKD, LogitKD, TaskLoss, cache_teacher_outputs

TERMS = {
    "logits": [TaskLoss(weight=0.5), LogitKD()],
    "logits and hidden states": [TaskLoss(weight=0.5), LogitKD(), HiddenStateKD()],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of banking77: train and test parquet files")
    parser.add_argument("--output_dir", type=Path, default=Path("out/bench-objectives"))
    parser.add_argument("--layers", type=int, default=2, help="layers of the student")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max_rows", type=int, help="of the training split, for a quick look")
    parser.add_argument("--teacher_epochs", type=float, default=4)
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    tokenizer, data, labels = load(options)
    teacher = fine_tuned_teacher(options, tokenizer, data, labels)
    results = []
    for name, terms in TERMS.items():
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            layers = [3, 6] if len(terms) > 2 else []
            cached = cache_teacher_outputs(
                teacher, data["train"], processing_class=tokenizer, folder=Path(folder, "cache"), hidden_states=layers
            )
            caching = time.perf_counter() - started
            size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
            seconds: dict[str, list[float]] = {"live": [], "cached": []}
            loss = {}
            for _ in range(options.rounds):
                for kind in seconds:
                    set_seed(0)
                    trainer = DistillationTrainer(
                        student_of(teacher, options.layers),
                        arguments(options.output_dir / "scratch", 0, 5e-4, num_train_epochs=1),
                        train_dataset=cached if kind == "cached" else data["train"], processing_class=tokenizer,
                        teacher_model=None if kind == "cached" else teacher, objectives=terms,
                    )  # fmt: skip
                    started = time.perf_counter()
                    loss[kind] = trainer.train().training_loss
                    seconds[kind].append(time.perf_counter() - started)
        results.append(dict(terms=name, caching=caching, bytes=size, loss=loss, seconds=seconds))
        (options.output_dir / "caching.json.txt").write_text(json.dumps(results, indent=2) + "\n")
    show(results, len(data["train"]))


def show(results: list[dict], rows: int) -> None:
    """Medians over the rounds, and their ratio."""
    table = Table(
        "Objectives", "epoch, teacher runs (s)", "epoch, cached (s)", "ratio", "caching once (s)", "cache (MB)",
        title=f"{rows} rows of banking77",
    )  # fmt: skip
    for row in results:
        live, cached = (statistics.median(row["seconds"][kind]) for kind in ("live", "cached"))
        ratios = [a / b for a, b in zip(row["seconds"]["cached"], row["seconds"]["live"], strict=True)]
        table.add_row(
            row["terms"], f"{live:.1f}", f"{cached:.1f}", f"{cached / live:.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
            f"{row['caching']:.1f}", f"{row['bytes'] / 1e6:.1f}",
        )  # fmt: skip
        print(f"{row['terms']}: mean training loss {row['loss']['live']:.4f} live, {row['loss']['cached']:.4f} cached")
    Console().print(table)


if __name__ == "__main__":
    main()
