# SPDX-License-Identifier: Apache-2.0
"""Whether training arguments make what they promise: reporters, an optimizer and a schedule, for a network of one weight."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from .parts import refusing


def try_training(given: TrainingArguments) -> None:
    """Makes what a Trainer makes when its training begins, and throws it away.

    Args:
        given (`TrainingArguments`): what is tried; `output_dir` is made if it is not there.

    Raises:
        ValueError: something cannot be made, or would pass a setting over; one line says what was given.
    """
    model = nn.Linear(1, 1)
    args: Any = copy.copy(given)
    if args.optim_target_modules is not None:
        args.optim_target_modules = "all-linear"  # the names are those of another model
    trainer = refusing(lambda: Trainer(model, args, eval_dataset=()), "training")
    if args.deepspeed:  # which has an optimizer and a schedule of its own
        return
    where = f"training.optim {args.optim.value} with optim_args {args.optim_args!r} (which are name=value,name=value)"
    optimizer = refusing(trainer.create_optimizer, where)
    for entry in (args.optim_args or "").replace(" ", "").split(","):
        name = entry.partition("=")[0]
        if name and _is_passed_over(name, copy.copy(args), model):
            raise ValueError(f"{where}: this optimizer takes no {name}. Leave it out.")

    settings = dict(args.lr_scheduler_kwargs or {})
    function: Any = TYPE_TO_SCHEDULER_FUNCTION[args.lr_scheduler_type]
    known = inspect.signature(function).parameters
    taken = [
        name for name in known if name not in ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")
    ]

    def schedule(more: dict[str, Any]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the optimizer has made no step
            made = get_scheduler(args.lr_scheduler_type, optimizer, 1, 4, {**settings, **more})
            for _ in range(4 if isinstance(made, LambdaLR) else 0):
                made.step()

    where = f"training.lr_scheduler_type {args.lr_scheduler_type.value} takes"
    told = f"and lr_scheduler_kwargs is {settings}"
    refusing(lambda: schedule({}), f"{where} {', '.join(taken) or 'none'}, {told}")
    try:
        schedule({"": None})
    except Exception:
        return  # what is not known is refused, so that all that was given is read
    if settings:
        raise ValueError(f"{where} none, {told}. Leave it out.")


def _is_passed_over(name: str, args: TrainingArguments, model: nn.Module) -> bool:
    """Whether an optimizer reads no setting of this name: any text is as good as none."""
    made = []
    for args.optim_args in (f"{name}=?", None):
        try:
            made.append(repr(Trainer.get_optimizer_cls_and_kwargs(args, model)))
        except Exception:
            return False
    return made[0] == made[1]
