# SPDX-License-Identifier: Apache-2.0
"""Runs a script under `accelerate launch` in several processes on the CPU."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path


def python_path() -> str:
    """Where another Python finds what this one does, `tests.other_processor` included if it is on."""
    return os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))


def accelerate_launch(
    script: Path, *arguments: object, processes: int = 2, options: tuple[str, ...] = (), device: str = ""
) -> str:
    """Standard output of all processes; fails with the end of their errors.

    `options` replace `--multi_gpu`; with a `device` accelerate is told that rather than to use the CPU, which would make
    it ignore that it should shard.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": python_path(),
        "OMP_NUM_THREADS": "1",
        **(
            {"ACCELERATE_TORCH_DEVICE": device, "DS_ACCELERATOR": device} if device else {"ACCELERATE_USE_CPU": "true"}
        ),
    }
    # On a machine without GPUs --multi_gpu means: one process per requested device, joined by gloo.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
    count = ["--dynamo_backend", "no", "--main_process_port", "0", "--num_processes", str(processes)]
    command = [*launch, *count, *(options or ("--multi_gpu",)), __file__, str(script), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def main() -> None:
    """Runs the script, and ends its process group while Python still runs.

    A thread of gloo that lets go of a tensor later aborts the process, now and then (pytorch/pytorch#179291).
    """
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")

    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
