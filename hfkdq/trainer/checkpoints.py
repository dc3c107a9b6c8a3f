# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint must hold besides the student so that distillation goes on exactly, and which one is whole."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.training_args import TrainingArguments
from transformers.utils import logging

logger = logging.get_logger(__name__)

STATE_FILE = "distillation.safetensors"
"""The file of a checkpoint with projections and open log window, and with what it was trained by."""


def save_state(folder: str, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
    """Writes tensors and JSON-ready facts to `STATE_FILE` of a checkpoint."""
    whole = {key: value.detach().contiguous() for key, value in tensors.items()}
    save_file(whole, Path(folder, STATE_FILE), metadata={"facts": json.dumps(facts)})


def load_state(folder: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and facts of `STATE_FILE`; both empty where the checkpoint has none."""
    file = Path(folder, STATE_FILE)
    if not file.is_file():
        return {}, {}
    with safe_open(file, framework="pt") as stream:
        return {key: stream.get_tensor(key) for key in stream.keys()}, json.loads(stream.metadata()["facts"])  # noqa: SIM118


def invalidate(folder: str) -> None:
    """Takes the last file of a checkpoint away before it is written anew, so that it is not taken for whole."""
    Path(folder, TRAINER_STATE_NAME).unlink(missing_ok=True)


def archives(args: TrainingArguments, sharded: bool) -> list[str]:
    """The files of a checkpoint, on this machine, without which training does not go on exactly."""
    if args.save_only_model:
        return []
    states = [] if sharded else [OPTIMIZER_NAME, SCHEDULER_NAME]
    if args.world_size == 1:
        return [*states, "rng_state.pth"]
    ranks = [args.process_index] if args.save_on_each_node else range(args.world_size)
    return [*states, *(f"rng_state_{rank}.pth" for rank in ranks)]


def is_complete(folder: Path) -> bool:
    """Whether all files of a checkpoint were written to the end, as `Trainer` writes its state last."""
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_text())
        files = load_state(folder)[1].get("archives", [])
    except (OSError, ValueError, SafetensorError):
        return False
    # Other processes write theirs meanwhile, and a checkpoint that was being deleted may lack any of them.
    return all(zipfile.is_zipfile(folder / file) for file in files)


def optimizer_fits(groups: Sequence[Mapping[str, Any]], folder: str) -> bool:
    """Whether the optimizer state of a checkpoint, if it has one, is of parameters as those of `groups`."""
    file = Path(folder, OPTIMIZER_NAME)
    if not file.is_file():
        return True
    saved = torch.load(file, map_location="cpu", weights_only=True)
    if [len(group["params"]) for group in saved["param_groups"]] != [len(group["params"]) for group in groups]:
        return False
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    parameters = [parameter for group in groups for parameter in group["params"]]
    # Moments have as many axes as their parameter; counters and factors of moments have fewer.
    return all(
        value.dim() != parameter.dim() or value.shape == parameter.shape
        for number, parameter in zip(numbers, parameters, strict=True)
        for value in saved["state"].get(number, {}).values()
        if isinstance(value, torch.Tensor)
    )


def newest_complete_checkpoint(output_dir: str) -> str | None:
    """The newest checkpoint in a folder that was written to the end; warns of those after it that were not."""
    for folder in _checkpoints(output_dir):
        if is_complete(folder):
            return str(folder)
        logger.warning(f"{folder} was cut off while it was written. The checkpoint before it is used.")
    return None


def last_complete_checkpoint(output_dir: str) -> str | None:
    """As `newest_complete_checkpoint`, to go on from.

    Raises:
        ValueError: there are checkpoints, but none was written to the end.
    """
    newest = newest_complete_checkpoint(output_dir)
    if newest is None and _checkpoints(output_dir):
        raise ValueError(
            f"No checkpoint in {output_dir} was written to the end, so there is nothing to go on from. Start anew, "
            "without resume_from_checkpoint."
        )
    return newest


def _checkpoints(output_dir: str) -> list[Path]:
    """The checkpoints in a folder, the newest first."""
    found = [
        path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.split("-")[-1].isdigit()
    ]
    return sorted(found, key=lambda path: int(path.name.split("-")[-1]), reverse=True)


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What two descriptions disagree on, as a sentence part for an error; empty if nothing."""
    parts = [f"{key}: {saved.get(key)!r} then, {now[key]!r} now" for key in now if saved.get(key) != now[key]]
    return "; ".join(parts)


class LogWindow:
    """Sums of what is logged since the last log, as of now and as of the last finished optimizer step.

    Args:
        start (`int`): the optimizer step after which the window opened.
        sums (`torch.Tensor` of shape `(terms,)`): what was summed up before, when training goes on.
    """

    def __init__(self, start: int, sums: torch.Tensor) -> None:
        self.start, self.sums = start, sums
        self._step, self._finished = start, sums

    def add(self, values: torch.Tensor, step: int) -> None:
        """Adds the values of one micro batch, while `step` optimizer steps are finished."""
        if step != self._step:
            self._step, self._finished = step, self.sums
        self.sums = self.sums + values

    def finished(self, step: int) -> torch.Tensor:
        """The sums over whole optimizer steps, while `step` of them are finished."""
        return self.sums if step != self._step else self._finished
