# SPDX-License-Identifier: Apache-2.0
"""The log of the loss terms: their sums since the last log, and the check that losses, gradients and weights are finite."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from transformers.utils import logging

from ..teachers import Teacher

logger = logging.get_logger(__name__)
_ADVICE = (
    "Training was stopped. Look at the batch, the objectives and their weights, and lower the learning rate; "
    "train(resume_from_checkpoint=True) goes on from the last checkpoint, if there is one."
)


class LossLog:
    """Means of the loss terms between two logs; sums them up on the device without waiting for it."""

    def __init__(self) -> None:
        self.start, self._step = 0, 0  # `start` is the optimizer step after which the present sums began
        self.sums: torch.Tensor | None = None  # of the terms, and last of the loss, since the last log: `(terms + 1,)`
        self._finished: torch.Tensor | None = None
        self._resumed: tuple[int, torch.Tensor] | None = None

    def clear(self, resumed: tuple[int, torch.Tensor] | None = None) -> None:
        """Forgets all sums; the next micro batch goes on with `resumed`, start and sums of a checkpoint."""
        self.sums, self._resumed = None, resumed

    def add(self, values: torch.Tensor, step: int) -> tuple[int, torch.Tensor] | None:
        """Adds the values of a micro batch, `(terms + 1,)`, while `step` optimizer steps are finished. Gives start and sum
        of the losses of the checkpoint that this micro batch goes on from, if it is the first to."""
        resumed, self._resumed = self._resumed, None
        if resumed is not None or self.sums is None:
            self.start, self.sums = resumed or (step, torch.zeros_like(values))
            self._step, self._finished = self.start, self.sums
        if step != self._step:
            self._step, self._finished = step, self.sums
        self.sums = self.sums + values
        return None if resumed is None else (resumed[0], resumed[1][-1])

    def finished(self, step: int) -> torch.Tensor | None:
        """The sums over whole optimizer steps, while `step` of them are finished."""
        return self._finished if self.sums is not None and step == self._step else self.sums

    def close(
        self, names: Sequence[str], teachers: Collection[Teacher], accelerator: Accelerator, step: int
    ) -> dict[str, float]:
        """The mean of every term since the last log, over optimizer steps and processes; empty where nothing was
        added. Raises `RuntimeError`: a term or a teacher's logits were not finite."""
        sums, self.sums = self.sums, None
        if sums is None:
            return {}
        bad = [torch.as_tensor(t.first_bad_step, device=sums.device).to(sums).reshape(1) for t in teachers]
        row = torch.cat([sums[:-1], *bad])
        rows = accelerator.gather(row.unsqueeze(0)).tolist()  # the one synchronisation of a logging step
        columns = list(zip(*rows, strict=True))
        for teacher, found in zip(teachers, columns[len(names) :], strict=True):
            teacher.raise_if_bad(int(max(found)))
        totals = [sum(column) for column in columns[: len(names)]]
        check_finite(names, totals, accelerator, step)
        steps = max(step - self.start, 1)
        return {name: float(f"{s / len(rows) / steps:.5g}") for name, s in zip(names, totals, strict=True)}


def check_finite(names: Sequence[str], values: Sequence[float], accelerator: Accelerator, step: int) -> None:
    """Stops a training of which a term is not finite; under fp16 it warns, as one step may overflow there. Raises
    `RuntimeError`: naming the terms."""
    bad = [f"{name} is {value}" for name, value in zip(names, values, strict=True) if not math.isfinite(value)]
    if not bad:
        return
    told = f"At step {step + 1} {', '.join(bad)}, so there is nothing to learn from it."
    if accelerator.scaler is None:
        raise RuntimeError(f"{told} {_ADVICE}")
    logger.warning_once(f"{told} If that goes on, train in bf16 or float32.")  # type: ignore[attr-defined]


def check_gradient(norm: float | None, accelerator: Accelerator, step: int) -> None:
    """Raises `RuntimeError` where the norm of the gradient is not finite, except under fp16."""
    if norm is not None and not math.isfinite(norm) and accelerator.scaler is None:
        told = f"The gradient was {norm} before step {step}, so the weights are of no use from there on."
        raise RuntimeError(f"{told} {_ADVICE}")


def check_weights(model: Any) -> None:
    """Raises `RuntimeError` where the last step left weights that are not finite, which no loss has shown yet."""
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    fine = torch.stack([weight.isfinite().all().cpu() for weight in trained.values()]).tolist()
    bad = [name for name, is_fine in zip(trained, fine, strict=True) if not is_fine]
    if bad:
        told = f"After training {len(bad)} of {len(fine)} weights are not finite, such as {bad[0]}."
        raise RuntimeError(f"{told} {_ADVICE}")
