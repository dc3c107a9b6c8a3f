# SPDX-License-Identifier: Apache-2.0
"""What a distilling trainer keeps from step to step: sums for its logs, and all that a checkpoint must go on with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.trainer import SCHEDULER_NAME
from transformers.utils import logging

from ..facts import record_fact
from ..objectives.base import Objective
from ..objectives.projections import Projections
from ..teachers import PeerParameters, Teacher
from .arguments import keep_tokens_back_
from .checkpoints import (
    LogWindow,
    archives,
    differences,
    invalidate,
    is_complete,
    last_complete_checkpoint,
    load_state,
    newest_complete_checkpoint,
    optimizer_fits,
    save_state,
)
from .loss_weighting import LossWeighting
from .terms import SINGLE, Term

logger = logging.get_logger(__name__)

if TYPE_CHECKING:  # What the methods of a mixin may count on; the class that uses it puts a trainer behind it.
    from transformers import Trainer as _TrainerBase
else:
    _TrainerBase = object


class KeepingMixin(_TrainerBase):
    """Logs, checkpoints and resuming of [`DistillationMixin`]."""

    objectives: Sequence[Objective]
    strict_resume: bool
    teachers: dict[str, Teacher]
    _terms: list[Term]
    _loss_weighting: LossWeighting
    _projections: Projections | None
    _in_training: bool
    _term_values: torch.Tensor | None = None  # of the last micro batch
    _log_window: LogWindow | None = None
    _resumed_window: LogWindow | None = None
    _followed: int | None  # optimizer steps that the moving averages have seen
    _config_changed = False  # the training that wrote the checkpoint to go on from

    @property
    def _used_teachers(self) -> dict[str, Teacher]:
        used = {source for term in self._terms for source in term.sources}
        return {name: teacher for name, teacher in self.teachers.items() if name in used}

    def _update_teachers(self) -> None:
        """Lets moving averages see the optimizer step that was finished since they last did."""
        step = self.state.global_step
        if self._followed is not None and step > self._followed:
            for teacher in self.teachers.values():
                teacher.update(self.model, step / max(self.state.max_steps, 1))
        self._followed = step

    @property
    def _sharded(self) -> bool:
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    # ------------------------------------------------------------------ logs

    def _to_log(self, loss: torch.Tensor) -> torch.Tensor:
        """Adds terms and loss of a micro batch to what is logged next; returns the loss for Trainer's own sum."""
        if self._term_values is None:  # a `compute_loss` of the user's that does not call this one
            return loss
        values = torch.cat([self._term_values, loss.detach().float().reshape(1)])
        self._term_values = None
        if values.device.type == "cpu":  # elsewhere asking costs a synchronisation, so that the next log asks
            self._refuse_not_finite(values.tolist())
        step, resumed = self.state.global_step, self._resumed_window
        if resumed is not None:
            # Trainer forgets what it summed up since its last log; this makes it go on from there.
            self._log_window, self._resumed_window = resumed, None
            self._globalstep_last_logged = resumed.start
            loss = resumed.sums[-1].to(loss.dtype) + loss
        if self._log_window is None:
            self._log_window = LogWindow(step, torch.zeros_like(values))
        self._log_window.add(values, step)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As `Trainer.log`; adds the unweighted mean of every objective since the last time."""
        self._update_teachers()  # the last of these comes before callbacks take the trained model apart
        if "loss" in logs and self._log_window is not None:
            window, self._log_window = self._log_window, None
            bad = [torch.as_tensor(t.first_bad_step, device=window.sums.device) for t in self.teachers.values()]
            row = torch.cat([window.sums[:-1], *(step.to(window.sums).reshape(1) for step in bad)])
            rows = self.accelerator.gather(row.unsqueeze(0)).tolist()  # the one synchronisation of a logging step
            columns = list(zip(*rows, strict=True))
            for teacher, found in zip(self.teachers.values(), columns[len(self._terms) :], strict=True):
                teacher.raise_if_bad(int(max(found)))
            self._refuse_not_finite([sum(column) for column in columns[: len(self._terms)]])
            steps = max(self.state.global_step - window.start, 1)
            for term, column in zip(self._terms, columns, strict=False):
                logs[term.name] = float(f"{sum(column) / len(rows) / steps:.5g}")
        elif "train_loss" in logs:
            for teacher in self.teachers.values():
                teacher.raise_if_bad(int(teacher.first_bad_step))
        norm = logs.get("grad_norm")
        if self._terms and norm is not None and not math.isfinite(norm) and self.accelerator.scaler is None:
            raise RuntimeError(
                f"The gradient was {norm} before step {self.state.global_step}, so the weights are of no use from there on. "
                f"{self._advice()}"
            )
        super().log(logs, *args, **kwargs)

    def _refuse_not_finite(self, values: Sequence[float]) -> None:
        """Stops a training one of whose terms is no number; with a loss scale that is searched for, one step may overflow.

        Raises:
            RuntimeError: naming the terms.
        """
        named = [*(term.name for term in self._terms), "loss"]
        bad = [f"{name} is {value}" for name, value in zip(named, values, strict=False) if not math.isfinite(value)]
        if not bad:
            return
        told = f"At step {self.state.global_step + 1} {', '.join(bad)}, so there is nothing to learn from it."
        if self.accelerator.scaler is None:
            raise RuntimeError(f"{told} {self._advice()}")
        logger.warning_once(f"{told} If that goes on, train in bf16 or float32.")

    def _refuse_broken_weights(self) -> None:
        """Says so where the last step has left weights that are no numbers, which no loss has shown yet."""
        if self._sharded:
            return
        trained = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        fine = torch.stack([weight.isfinite().all().cpu() for weight in trained.values()]).tolist()
        bad = [name for name, is_fine in zip(trained, fine, strict=True) if not is_fine]
        if bad:
            raise RuntimeError(
                f"After training {len(bad)} of {len(fine)} weights are not finite, such as {bad[0]}. {self._advice()}"
            )

    def _kept(self) -> str:
        """What an interrupted training leaves, and how to go on."""
        told = f"Interrupted at step {self.state.global_step} of {self.state.max_steps}."
        newest = newest_complete_checkpoint(str(self.args.output_dir))
        if newest is None:
            return f"{told} There is no checkpoint in {self.args.output_dir}, so a new training begins anew."
        return f"{told} {newest} is kept: train(resume_from_checkpoint=True) goes on from it."

    def _advice(self) -> str:
        return (
            "Training was stopped. Look at the batch, the objectives and their weights, and lower the learning rate; "
            "train(resume_from_checkpoint=True) goes on from the last checkpoint, if there is one."
        )

    # ------------------------------------------------------------------ checkpoints

    def _resolve_checkpoint(self, checkpoint: str | bool | None) -> str | bool | None:
        if checkpoint is True:
            return last_complete_checkpoint(str(self.args.output_dir)) or True
        if checkpoint and not is_complete(Path(checkpoint)):
            raise ValueError(
                f"{checkpoint} is no checkpoint, or was cut off while it was written. Name another one, or give "
                "resume_from_checkpoint=True for the newest whole one of the output folder."
            )
        return checkpoint

    def _record(self) -> None:
        if self.objectives:
            fact = {"objectives": [o.describe() for o in self.objectives], "steps": self.state.global_step}
            if self._used_teachers:
                fact["teacher"] = ", ".join(teacher.name for teacher in self._used_teachers.values())
            record_fact(self.model, "distillation", fact)

    def _training_fingerprint(self) -> dict[str, Any]:
        teachers = {name: teacher.fingerprint for name, teacher in self._used_teachers.items()}
        return {
            "teacher": teachers.get(SINGLE) if teachers.keys() <= {SINGLE} else teachers,
            "objectives": [term.objective.describe() for term in self._terms],
        }

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        self._record()
        keep_tokens_back_(self.args)  # they may have been given since
        if state_dict is not None:
            state_dict = {
                key: value
                for key, value in state_dict.items()
                if Projections.NAME not in key and PeerParameters.NAME not in key
            }
        super()._save(output_dir, state_dict)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`; into a checkpoint also what training goes on with: projections, open log window."""
        folder = str(output_dir or self.args.output_dir)
        self._update_teachers()
        is_checkpoint = self._in_training and _internal_call and Path(folder) != Path(str(self.args.output_dir))
        if is_checkpoint and self.args.should_save:
            invalidate(folder)
        super().save_model(output_dir, _internal_call)
        if not is_checkpoint:
            return
        alone = getattr(self.args, "enable_jit_checkpoint", False)
        self._loss_weighting.adapt(self.accelerator, together=not alone)
        tensors, facts = {}, {**self._training_fingerprint(), "archives": archives(self.args, self._sharded)}
        facts["adapted"] = self._loss_weighting.state()
        if self._log_window is not None:
            rows = self._log_window.finished(self.state.global_step).unsqueeze(0)
            # On a signal every process saves when it gets to it, so none may wait for the others.
            if not alone:
                rows = self.accelerator.gather(rows)
            tensors["log_window"], facts["log_start"] = rows, self._log_window.start
        if self.args.should_save:
            if self._projections is not None and not self._sharded:
                tensors.update(self._projections.maps.state_dict())
            for name, teacher in self.teachers.items():
                tensors.update({f"{name}/{key}": value.clone() for key, value in teacher.state().items()})
            save_state(folder, tensors, facts)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.objectives and not self.is_deepspeed_enabled:
            self._load_distillation_state(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_distillation_state(self, checkpoint: str) -> None:
        """Goes on where a checkpoint left off, in all that is not the student's or the optimizer's."""
        tensors, facts = load_state(checkpoint)
        self._refuse_other(checkpoint, facts)
        rows = tensors.pop("log_window", None)
        if rows is not None and rows.shape[1] == len(self._terms) + 1:
            same_processes = len(rows) == self.args.world_size
            row = rows[self.args.process_index] if same_processes else rows.mean(0)
            self._resumed_window = LogWindow(facts["log_start"], row.to(self.args.device))
        self._loss_weighting.load_state(facts.get("adapted", {}))
        for name, teacher in self.teachers.items():
            own = {key.removeprefix(f"{name}/"): v for key, v in tensors.items() if key.startswith(f"{name}/")}
            if own:
                teacher.load_state(own)
        if self._projections is not None and not self._sharded:
            maps = self._projections.maps.state_dict()
            fitting = {k: v for k, v in tensors.items() if k in maps and v.shape == maps[k].shape}
            self._projections.maps.load_state_dict({**maps, **fitting})

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if (
            checkpoint is not None
            and self._config_changed
            and not optimizer_fits(self.optimizer.param_groups, checkpoint)
        ):
            logger.warning(f"The optimizer starts anew, as {checkpoint} has the state of one of other projections.")
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True))
            return
        super()._load_optimizer_and_scheduler(checkpoint)

    def _refuse_other(self, checkpoint: str, facts: Mapping[str, Any]) -> None:
        told = differences(facts, self._training_fingerprint())
        self._config_changed = bool(told)
        if not told:
            return
        if self.strict_resume:
            raise ValueError(
                f"{checkpoint} was written by another training than this one ({told}). Resume with the same teacher and "
                "objectives; or give strict_resume=False to go on with the new ones."
            )
        logger.warning(f"Going on from {checkpoint}, which was written by another training ({told}).")
