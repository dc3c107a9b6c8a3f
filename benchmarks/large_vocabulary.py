#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Peak memory of distilling a large vocabulary, against a plain cross-entropy training step of the same student.

    make bench-memory

Every step runs in a process of its own: forward pass, loss, backward pass over 2,048 tokens and 128,000 classes. What is
compared is the peak above what the process held before the step (weights of student and teacher, libraries). On the CPU
that is the growth of the resident set, sampled by the kernel; with a GPU it is what PyTorch allocated there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from hfkdq import DistillationTrainer, LogitKD, TaskLoss

STEPS = {
    "cross-entropy, plain Trainer": lambda: None,
    "forward KL, chunked": lambda: [LogitKD()],
    "forward KL, in one piece": lambda: [LogitKD()],
    "reverse KL, chunked": lambda: [LogitKD(divergence="reverse_kl")],
    "JSD, chunked": lambda: [LogitKD(divergence="jsd")],
    "64 likeliest tokens and the rest, chunked": lambda: [LogitKD(top_k=64)],
    "cross-entropy and forward KL, chunked": lambda: [TaskLoss(), LogitKD()],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabulary", type=int, default=128_000)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--output_dir", type=Path, default=Path("out/bench-memory"))
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        print(json.dumps(peak(options.step, options)))
        return
    options.output_dir.mkdir(parents=True, exist_ok=True)
    settings = [f"--{name}={getattr(options, name)}" for name in ("vocabulary", "tokens", "hidden", "output_dir")]
    found = {}
    for name in STEPS:
        command = [sys.executable, __file__, "--step", name, *settings]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found[name] = json.loads(output.strip().splitlines()[-1])
    (options.output_dir / "results.json").write_text(json.dumps(found, indent=2) + "\n")
    table = Table("Step", "peak (MB)", "against plain", title=f"{options.tokens} tokens, {options.vocabulary} classes")
    plain = found["cross-entropy, plain Trainer"]
    for name, value in found.items():
        table.add_row(name, f"{value / 1e6:.0f}", f"{value / plain:.2f}")
    Console().print(table)


def peak(step: str, options: argparse.Namespace) -> int:
    """Bytes that one training step takes above what was held before it."""
    if "in one piece" in step:
        from hfkdq.losses import divergences
        from hfkdq.objectives import logits

        logits.in_chunks = lambda function, *tensors: divergences.in_chunks(function, *tensors, elements=2**62)
    config = LlamaConfig(
        vocab_size=options.vocabulary, hidden_size=options.hidden, intermediate_size=2 * options.hidden,
        num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    student, teacher = LlamaForCausalLM(config), LlamaForCausalLM(config)
    objectives = STEPS[step]()
    arguments = TrainingArguments(
        str(options.output_dir), report_to=[], max_steps=1, per_device_train_batch_size=4, disable_tqdm=True
    )
    distilled = {} if objectives is None else dict(teacher_model=teacher, objectives=objectives)
    trainer = DistillationTrainer(student, arguments, **distilled)
    trainer.current_gradient_accumulation_steps = 1  # as in `train`
    ids = torch.randint(options.vocabulary, (4, options.tokens // 4), device=arguments.device)
    for parameter in student.parameters():  # what an optimizer step leaves
        parameter.grad = torch.zeros_like(parameter)
    warm = {"input_ids": ids[:1, :8], "labels": ids[:1, :8]}
    trainer.training_step(student, warm)
    before = held(arguments.device)
    trainer.training_step(student, {"input_ids": ids, "labels": ids})
    return highest(arguments.device) - before


def held(device: torch.device) -> int:
    """Bytes held now; forgets the highest so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def highest(device: torch.device) -> int:
    """The most bytes held since `held` was called."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else status("VmHWM")


def status(field: str) -> int:
    """A size in bytes from the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


if __name__ == "__main__":
    main()
