# SPDX-License-Identifier: Apache-2.0
"""Run in processes of its own: caches the outputs of a tiny teacher, in small shards, and counts its calls."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from unittest.mock import patch

import datasets
from accelerate import Accelerator

from hfkdq.caching import cache_teacher_outputs, writer
from tests import tiny


def run(folder: Path, log: Path, die_at: int = 0) -> datasets.Dataset:
    """Caches 22 rows in shards of 4; the process kills itself at call `die_at` of the teacher, and logs every call."""
    teacher, calls = tiny.bert(), []

    def called(module, args, kwargs):
        calls.append(1)
        if kwargs["input_ids"].shape[1] > 4 or len(kwargs["input_ids"]) > 1:  # not the example of the outline
            with log.open("a") as file:
                file.write(f"{os.getpid()} {len(kwargs['input_ids'])}\n")
            if die_at and len(log.read_text().splitlines()) == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    teacher.register_forward_pre_hook(called, with_kwargs=True)
    rows = tiny.text_dataset(22)
    accelerator = Accelerator(cpu=True)
    with patch.object(writer, "SHARD_ROWS", 4):
        return cache_teacher_outputs(
            teacher, rows, processing_class=tiny.tokenizer(), folder=folder, batch_size=2, accelerator=accelerator
        )


if __name__ == "__main__":
    folder, log, die_at, result = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    dataset = run(folder, log, die_at)
    if Accelerator().is_main_process:
        dataset.save_to_disk(result)
    # In one write, for two processes share the output.
    os.write(1, f"rows {len(dataset)} shards {len(list(folder.glob('part-*.arrow')))}\n".encode())
