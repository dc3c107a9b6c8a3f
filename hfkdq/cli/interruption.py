# SPDX-License-Identifier: Apache-2.0
"""Ends a training at the next step when the terminal or the machine asks for it, with a checkpoint of that step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class Interruption(TrainerCallback):
    """Saves a checkpoint and ends the training after the step in which the process got SIGINT or SIGTERM.

    A second Ctrl-C ends the process at once. Of several processes all end together, where one was asked to.
    """

    NAMES = ("SIGINT", "SIGTERM", "SIGHUP")

    def __init__(self) -> None:
        self.number = 0
        self._is_over = False

    @contextmanager
    def watching(self) -> Iterator[Interruption]:
        """Takes the signals while it lasts."""
        is_main = threading.current_thread() is threading.main_thread()
        numbers = [getattr(signal, name) for name in self.NAMES if is_main and hasattr(signal, name)]
        heard = [one for one in numbers if signal.getsignal(one) is not signal.SIG_IGN]  # nohup has one ignored
        before = {number: signal.signal(number, self._note) for number in heard}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def raise_if_over(self) -> None:
        """Raises `KeyboardInterrupt` after Ctrl-C, and `SystemExit` after another signal, in this process or in another that
        ended the training."""
        if self.number not in (0, signal.SIGINT):
            raise SystemExit(128 + self.number)
        if self._is_over or self.number:
            raise KeyboardInterrupt

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        asked = bool(self.number)
        if args.world_size > 1 and dist.is_initialized():
            flag = torch.tensor(int(asked), device=args.device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            asked = bool(flag.item())
        if asked:
            self._is_over = control.should_save = control.should_training_stop = True

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.on_step_end(args, state, control)  # the last evaluation has no step after it

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._is_over:  # the checkpoint is there, and an evaluation may take long
            control.should_save = control.should_evaluate = False

    def _note(self, number: int, frame: Any) -> None:
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number
