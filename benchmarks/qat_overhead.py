#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""What fake quantization costs a training step: the step of a quantized model over that of the float one.

    make bench-qat-overhead

Every arm has a copy of the same model, and takes its steps in turn with the others within one process: forward and
backward pass, clipping, AdamW, as the Trainer does. The ratio is taken round by round. Writes `results.json`.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from hfkdq import QuantizationSpec
from hfkdq.quantization import prepare_qat_

ARMS: dict[str, QuantizationSpec | None] = {
    "float": None,
    "int8, moving average": QuantizationSpec(),
    "int8, learned ranges": QuantizationSpec(range_estimator="learned"),
    "W4A8, groups of 64": QuantizationSpec(weight_bits=4, group_size=64),
    "W2A8, ternary": QuantizationSpec(weight_bits=2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("out/qat_overhead"))
    parser.add_argument("--rounds", type=int, default=30, help="timed steps of each arm")
    parser.add_argument("--warmup", type=int, default=3, help="steps of each arm before")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch, on the CPU")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = {}
    for name, make in {
        "BERT, 6 layers of 384, 32 x 64 tokens": text,
        "ViT, 4 layers of 192, 32 images": image,
    }.items():
        results[name] = in_turn(name, make, options)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    (options.output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    where = torch.cuda.get_device_name() if options.device != "cpu" else f"CPU, {torch.get_num_threads()} threads"
    for name, times in results.items():
        show(f"{name}, {where}", times)


def text() -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """The shape of MiniLM."""
    sizes = dict(hidden_size=384, num_attention_heads=12, intermediate_size=1536, num_hidden_layers=6)
    ids = torch.randint(1000, 30000, (32, 64))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.randint(0, 2, (32,))}
    return BertForSequenceClassification(BertConfig(**sizes)), batch


def image() -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """A small vision transformer of 65 positions."""
    sizes = dict(hidden_size=192, num_attention_heads=3, intermediate_size=768, num_hidden_layers=4)
    model = ViTForImageClassification(ViTConfig(image_size=64, patch_size=8, **sizes))
    return model, {"pixel_values": torch.randn(32, 3, 64, 64), "labels": torch.randint(0, 2, (32,))}


def in_turn(name: str, make: Callable, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of every arm's steps; the arms start each round one place later than in the last."""
    set_seed(0)
    model, batch = make()
    batch = {key: value.to(options.device) for key, value in batch.items()}
    steps = {arm: stepper(copy.deepcopy(model), spec, batch, options.device) for arm, spec in ARMS.items()}
    times: dict[str, list[float]] = {arm: [] for arm in steps}
    arms = list(steps)
    for number in track(range(options.warmup + options.rounds), description=name):
        first = number % len(arms)
        for arm in arms[first:] + arms[:first]:
            seconds = steps[arm]()
            if number >= options.warmup:
                times[arm].append(seconds)
    return times


def stepper(
    model: PreTrainedModel, spec: QuantizationSpec | None, batch: dict[str, torch.Tensor], device: str
) -> Callable[[], float]:
    """A function that takes one step and returns its seconds."""
    if spec is not None:
        prepare_qat_(model, spec)
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)  # as Trainer does

    def now() -> float:
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()

    def step() -> float:
        start = now()
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return now() - start

    return step


def show(title: str, times: dict[str, list[float]]) -> None:
    """Prints the table: the ratio is the median over the rounds, each against the float step of the same round."""
    table = Table(title=title)
    for column in ("Model", "median ms", "fastest ms", "ratio", "quartiles", "ratio of fastest"):
        table.add_column(column, justify="left" if column == "Model" else "right", no_wrap=column == "Model")
    base = times["float"]
    for arm, seconds in times.items():
        ratios = [own / other for own, other in zip(seconds, base, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        table.add_row(
            arm, f"{1000 * statistics.median(seconds):.0f}", f"{1000 * min(seconds):.0f}",
            f"{statistics.median(ratios):.3f}", f"{low:.2f}-{high:.2f}", f"{min(seconds) / min(base):.3f}",
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
