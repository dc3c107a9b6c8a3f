#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""A distillation step of hfkdq, of TextBrewer and by hand: each in processes of its own, in turn.

    python -m venv peer && peer/bin/pip install torch "transformers>=5" datasets rich accelerate textbrewer tensorboardX
    python benchmarks/peer_step.py --peer_python peer/bin/python

Logits at temperature 2, the labels and six hidden states, MiniLM's sizes with 12 and 6 layers, clipping and AdamW. A
process takes steps for its turn; the median of a loop is that of the steps of all its turns. Writes `results.json`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import trainer_overhead as work
from torch.utils.data import DataLoader
from transformers import default_data_collator

LOOPS = ("hand", "hfkdq", "textbrewer")
WARM_UP = 5


class Clocked(DataLoader):
    """A loader that notes when each batch was asked for, so that times between are whole steps."""

    times: list[float]

    def __iter__(self):
        self.times = []
        for batch in super().__iter__():
            self.times.append(time.perf_counter())
            yield batch
        self.times.append(time.perf_counter())


def by_hand(options) -> list[float]:
    student, teacher = work.models("cpu")
    times = [time.perf_counter()]
    for _ in work.bare_steps("logits and hidden states", student, teacher, work.dataset(options), options):
        times.append(time.perf_counter())
    return times


def by_hfkdq(options) -> list[float]:
    from transformers import TrainerCallback

    times = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        trainer = work.make_trainer("logits and hidden states", options, folder, [Clock()])
        trainer.train()
    return times


def by_textbrewer(options) -> list[float]:
    from textbrewer import DistillationConfig, GeneralDistiller, TrainingConfig

    student, teacher = work.models("cpu")
    student.train()

    def adapt(batch, output):
        return {"logits": output.logits, "hidden": output.hidden_states, "losses": output.loss}

    matches = [
        {"layer_T": t, "layer_S": s, "feature": "hidden", "loss": "hidden_mse", "weight": 1 / len(work.LAYERS)}
        for s, t in work.LAYERS.items()
    ]
    with tempfile.TemporaryDirectory() as folder:
        distiller = GeneralDistiller(
            TrainingConfig(output_dir=folder, log_dir=None, device="cpu"),
            DistillationConfig(
                temperature=work.TEMPERATURE, kd_loss_type="ce", hard_label_weight=1, kd_loss_weight=1, intermediate_matches=matches
            ),
            teacher, student, adapt, adapt,
        )  # fmt: skip
        loader = Clocked(work.dataset(options), options.batch_size, collate_fn=default_data_collator)
        optimizer = torch.optim.AdamW(student.parameters(), lr=5e-5, fused=True)
        with distiller:
            distiller.train(
                optimizer, loader, num_epochs=1, max_grad_norm=1.0, callback=None, output_hidden_states=True
            )
    return loader.times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer_python", default=sys.executable, help="Python of an environment with TextBrewer")
    parser.add_argument("--output_dir", type=Path, default=Path("out/peer_step"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="timed steps of a turn")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--device", default="cpu", help=argparse.SUPPRESS)
    parser.add_argument("--loop", choices=LOOPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.loop:
        times = {"hand": by_hand, "hfkdq": by_hfkdq, "textbrewer": by_textbrewer}[options.loop](options)
        print("\nTIMES", json.dumps([1000 * (b - a) for a, b in itertools.pairwise(times)][WARM_UP:]))
        return
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    found: dict[str, list[list[float]]] = {loop: [] for loop in LOOPS}
    for number in range(options.rounds):
        for loop in LOOPS:
            python = options.peer_python if loop == "textbrewer" else sys.executable
            command = [python, __file__, "--loop", loop, "--steps", str(options.steps)]
            sizes = ["--batch_size", str(options.batch_size), "--tokens", str(options.tokens)]
            process = subprocess.run(
                [*command, *sizes], check=True, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}
            )
            found[loop].append(json.loads(process.stdout.rpartition("TIMES")[2]))
            print(f"round {number + 1}: {loop:<12}{statistics.median(found[loop][-1]):8.1f} ms", flush=True)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    (options.output_dir / "results.json").write_text(json.dumps(found, indent=2))
    for loop, turns in found.items():
        medians = [statistics.median(turn) for turn in turns]
        everything = [value for turn in turns for value in turn]
        print(
            f"{loop:<12} median {statistics.median(everything):7.1f} ms, turns {min(medians):.1f} to {max(medians):.1f}"
        )


if __name__ == "__main__":
    main()
