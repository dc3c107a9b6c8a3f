# SPDX-License-Identifier: Apache-2.0
"""The recipe that is followed where only a model and data are named: half of the layers, distilled, with 8 bits."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from ..modeling import NoStructure, find_layer_stacks, is_convolutional
from ..modeling.examples import tried_on
from ..modeling.masks import Batch
from ..objectives.base import Objective

TRAINING: dict[str, Any] = {
    "num_train_epochs": 3, "per_device_train_batch_size": 16, "learning_rate": 5e-5, "lr_scheduler_type": "linear",
    "eval_strategy": "epoch", "save_strategy": "epoch", "save_total_limit": 1, "logging_steps": 50, "seed": 42,
}  # fmt: skip


def default_sections(model: PreTrainedModel) -> dict[str, Any]:
    """The sections of a recipe for a model, but for its objectives: half of each stack of layers, where there is one to
    halve, and integers of 8 bits."""
    return {
        **(
            {"student": {name: count // 2 for name, count in counts.items()}}
            if (counts := layer_counts(model))
            else {}
        ),
        "training": dict(TRAINING),
        "quantization": {"weight_bits": 8, "activation_bits": 8},
        "export": {"integer_convolutions": True} if is_convolutional(model) else {},
        "report": {},
    }


def default_objectives(
    student: PreTrainedModel, teacher: PreTrainedModel, example: Batch | None, labelled: float
) -> list[Any]:
    """Those of the task loss, the logits and the hidden states that fit the pair of models, as a recipe has them.

    The task loss is a mean over the rows with labels, of which there is a share `labelled`, in [0, 1]. Its weight is that share of
    a half, so that no row counts more than others: docs/results/teacher.md.

    Raises:
        ValueError: none fits.
    """
    from .parts import OBJECTIVES

    found: list[Any] = []
    wanted: list[list[tuple[str, dict[str, Any]]]] = [
        [("TaskLoss", {"weight": float(f"{0.5 * labelled:.2g}")})] if labelled else [],
        [("LogitKD", {"temperature": 2.0}), ("LogitKD", {"divergence": "mse"})],
        [("HiddenStateKD", {})],
    ]
    for choices in wanted:
        for name, settings in choices:
            if _fits(OBJECTIVES[name](**settings), student, teacher, example):
                found.append({name: settings} if settings else name)
                break
    if not found:
        raise ValueError(
            f"Nothing that {type(student).__name__} returns is known to be learned from a teacher. Write a recipe with the "
            "objectives that you want."
        )
    return found


def layer_counts(model: PreTrainedModel) -> dict[str, int]:
    """How many layers there are in each stack that can lose some, by the argument of `make_student` for it."""
    try:
        stacks = find_layer_stacks(model)
    except NoStructure:
        return {}
    names = ("num_layers", "num_decoder_layers")
    return {name: len(stack) for name, stack in zip(names, stacks, strict=False) if len(stack) > 1}


def _fits(objective: Objective, student: PreTrainedModel, teacher: PreTrainedModel, example: Batch | None) -> bool:
    try:
        with tried_on(example, student):
            objective.attach(student, teacher)
    except ValueError:
        return False
    return True
