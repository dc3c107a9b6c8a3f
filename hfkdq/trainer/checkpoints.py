# SPDX-License-Identifier: Apache-2.0
"""The distillation part of a checkpoint: writing it, resuming from it, and finding a checkpoint that is complete."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.training_args import TrainingArguments
from transformers.utils import logging

from .distillation import Distillation
from .loss_log import LossLog

logger = logging.get_logger(__name__)

STATE_FILE = "distillation.safetensors"
"""The file of a checkpoint with projections, teachers, the open log window, and the fingerprint of the training."""


def save(
    folder: str, distillation: Distillation, log: LossLog, args: TrainingArguments, accelerator: Accelerator, step: int
) -> None:
    """Writes `STATE_FILE` of a checkpoint after optimizer step `step`; every process calls it."""
    # On a signal every process saves when it gets to it, so none may wait for the others.
    alone = getattr(args, "enable_jit_checkpoint", False)
    distillation.weighting.adapt(accelerator, together=not alone)
    tensors: dict[str, torch.Tensor] = {}
    facts = {**distillation.fingerprint(), "adapted": distillation.weighting.state()}
    facts["archives"] = _required_files(args, distillation.sharded)
    if (sums := log.finished(step)) is not None:
        rows = sums.unsqueeze(0)
        tensors["log_window"], facts["log_start"] = rows if alone else accelerator.gather(rows), log.start
    if args.should_save:
        tensors = {key: v.detach().contiguous() for key, v in {**tensors, **distillation.state()}.items()}
        save_file(tensors, Path(folder, STATE_FILE), metadata={"facts": json.dumps(facts)})


def load(folder: str, distillation: Distillation, log: LossLog, args: TrainingArguments, strict: bool) -> None:
    """Restores all that `save` wrote. Raises `ValueError`: `strict`, and the checkpoint was written with another
    teacher or other objectives."""
    changes = config_changes(folder, distillation)
    if changes and strict:
        raise ValueError(
            f"{folder} was written by another training than this one ({changes}). Resume with the same teacher and "
            "objectives; or give strict_resume=False to go on with the new ones."
        )
    if changes:
        logger.warning(f"Going on from {folder}, which was written by another training ({changes}).")
    facts = _load_facts(folder)
    if not facts:
        return
    with safe_open(Path(folder, STATE_FILE), framework="pt") as stream:
        tensors = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118
    rows = tensors.pop("log_window", None)
    if rows is not None and rows.shape[1] == len(distillation.terms) + 1:
        row = rows[args.process_index] if len(rows) == args.world_size else rows.mean(0)
        log.clear(resumed=(facts["log_start"], row.to(args.device)))
    distillation.weighting.load_state(facts.get("adapted", {}))
    distillation.load_state(tensors)


def config_changes(folder: str, distillation: Distillation) -> str:
    """What a checkpoint and this training disagree on, of teachers and objectives; empty if nothing."""
    saved, now = _load_facts(folder), distillation.fingerprint()
    return "; ".join(f"{key}: {saved.get(key)!r} then, {now[key]!r} now" for key in now if saved.get(key) != now[key])


def _load_facts(folder: str | Path) -> dict[str, Any]:
    file = Path(folder, STATE_FILE)
    if not file.is_file():
        return {}
    with safe_open(file, framework="pt") as stream:
        return json.loads(stream.metadata()["facts"])


def _required_files(args: TrainingArguments, sharded: bool) -> list[str]:
    """The files of a checkpoint, on this machine, without which training does not go on exactly."""
    if args.save_only_model:
        return []
    states = [] if sharded else [OPTIMIZER_NAME, SCHEDULER_NAME]
    if args.world_size == 1:
        return [*states, "rng_state.pth"]
    ranks = [args.process_index] if args.save_on_each_node else range(args.world_size)
    return [*states, *(f"rng_state_{rank}.pth" for rank in ranks)]


def is_complete(folder: Path) -> bool:
    """Whether a checkpoint was written to the end; `Trainer` writes its state last."""
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_text())
        files = _load_facts(folder).get("archives", [])
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


def resolve(checkpoint: str | bool | None, output_dir: str) -> str | bool | None:
    """The checkpoint to resume from: of `True` the newest complete one, or `True` where there are none at all. Raises
    `ValueError`: the checkpoint is not complete, or none of those in `output_dir` is."""
    if checkpoint is True:
        newest = newest_complete(output_dir)
        if newest is None and _checkpoints(output_dir):
            raise ValueError(
                f"No checkpoint in {output_dir} was written to the end, so there is nothing to go on from. Start anew, "
                "without resume_from_checkpoint."
            )
        return newest or True
    if checkpoint and not is_complete(Path(checkpoint)):
        raise ValueError(
            f"{checkpoint} is no checkpoint, or was cut off while it was written. Name another one, or give "
            "resume_from_checkpoint=True for the newest whole one of the output folder."
        )
    return checkpoint


def newest_complete(output_dir: str) -> str | None:
    """The newest checkpoint in a folder that was written to the end; warns of those after it that were not."""
    for folder in _checkpoints(output_dir):
        if is_complete(folder):
            return str(folder)
        logger.warning(f"{folder} was cut off while it was written. The checkpoint before it is used.")
    return None


def how_to_go_on(output_dir: str) -> str:
    """What an interrupted training leaves, and how to go on, as a sentence."""
    newest = newest_complete(output_dir)
    if newest is None:
        return f"There is no checkpoint in {output_dir}, so a new training begins anew."
    return f"{newest} is kept: train(resume_from_checkpoint=True) goes on from it."


def _checkpoints(output_dir: str) -> list[Path]:
    steps = {path: path.name.split("-")[-1] for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")}
    return sorted((path for path in steps if steps[path].isdigit()), key=lambda path: int(steps[path]), reverse=True)
