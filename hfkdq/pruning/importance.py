# SPDX-License-Identifier: Apache-2.0
"""Runs a model over calibration data to collect importance statistics: gradients of a loss, norms of activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.utils import logging

from ..losses import masked_mean
from ..modeling.batches import Batches, on_device
from ..modeling.forwards import evaluating
from ..modeling.masks import output_mask
from .criteria import ImportanceStatistics

logger = logging.get_logger(__name__)

_PREDICTIONS = ("logits", "start_logits", "end_logits", "pred_boxes")


def collect_importance_(
    model: PreTrainedModel, importance: ImportanceStatistics, batches: Batches, teacher: PreTrainedModel | None = None
) -> None:
    """Collects importance statistics over batches. Weights, gradients, modes and random state stay as they were.
    Activations and gradients that are not finite, as a model in float16 may have on single batches, are left out with
    a warning. Padding counts among the activations; among the predictions of the criterion `"teacher"` it does not.
    Both models run in eval mode, and frozen parameters count too. The criteria `"taylor"` and `"fisher"` need batches
    with labels; the teacher of `"teacher"` is by default the model itself. Raises `ValueError`: no batch, one that is
    not finite, no loss where one is needed, modules that no batch reaches or that are finite for none, or a teacher
    whose predictions do not fit or are not finite."""
    generator = torch.Generator().manual_seed(importance.spec.seed)
    teacher = model if teacher is None else teacher
    parameters = {id(part.values): part.values for target in importance.targets for part in target.parts}
    trained = {key: value for key, value in parameters.items() if isinstance(value, torch.nn.Parameter)}
    frozen = [value for value in trained.values() if importance.needs_gradients and not value.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        # A DataLoader draws a seed even where it does not shuffle.
        with evaluating(model, teacher), importance.watching(), torch.random.fork_rng(devices=[]):
            for batch in on_device(model, batches, "Measuring what matters"):
                with torch.set_grad_enabled(importance.needs_gradients):
                    loss = _loss(model, teacher, importance, batch, generator)
                if loss is not None:
                    found = _gradients(loss, list(trained.values()))
                    importance.observe_gradients(dict(zip(trained, found, strict=True)))
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
    _check_collected(importance)


def _gradients(loss: Tensor, parameters: list[Tensor]) -> Sequence[Tensor | None]:
    """The gradient of each parameter, or `None` where the loss does not depend on it; `.grad` is left alone."""
    return torch.autograd.grad(loss, parameters, allow_unused=True) if loss.requires_grad else [None] * len(parameters)


def _loss(
    model: PreTrainedModel, teacher: PreTrainedModel, importance: ImportanceStatistics, batch: dict[str, Any],
    generator: torch.Generator,
) -> Tensor | None:  # fmt: skip
    """Runs the model on a batch; the loss, if its gradient is needed."""
    if importance.spec.criterion == "teacher":
        return _sampled_label_loss(model, teacher, batch, generator)
    loss = getattr(model(**batch), "loss", None)
    if not importance.needs_gradients:
        return None
    if loss is None:
        raise ValueError(
            f"criterion={importance.spec.criterion!r} needs the gradient of a loss, and {type(model).__name__} gives none for "
            f"{', '.join(batch)}. Add labels to the calibration data, or use criterion='teacher', which needs none."
        )
    return loss


def _check_collected(importance: ImportanceStatistics) -> None:
    missing = importance.missing()
    lost = [where for key, where in missing.items() if key in importance.not_finite]
    if lost:
        raise ValueError(
            f"Nothing finite came to {', '.join(lost[:3])} from any batch of the calibration data, so it cannot be told what "
            "matters there. Look for broken weights, or load the model in float32 or bfloat16."
        )
    if missing:
        raise ValueError(
            f"The calibration data did not reach everything that structure={importance.spec.structure!r} prunes: "
            f"{', '.join(list(missing.values())[:3])} never ran, or no gradient came to it. Leave it out with "
            "exclude_modules, or give data that use it."
        )
    if importance.not_finite:
        logger.warning(
            "Some activations or gradients were not finite, and their batches have been left out of the measurement. In "
            "float32 or bfloat16 the model may stay finite."
        )


def _sampled_label_loss(
    model: PreTrainedModel, teacher: PreTrainedModel, batch: dict[str, Any], generator: torch.Generator
) -> Tensor:
    """Cross-entropy to labels sampled from the teacher's predictions; of numbers and boxes, squares around sampled
    ones. A divergence has no gradient where model and teacher are equal, as they are before the first cut. Drawn
    labels have: the mean of its square is the Fisher information of what the teacher says."""
    found = model(**batch)
    with torch.no_grad():
        expected = found if teacher is model else teacher(**batch)
    total = None
    for name in _PREDICTIONS:
        said, target = getattr(found, name, None), getattr(expected, name, None)
        if said is None or target is None:
            continue
        if said.shape != target.shape:
            shapes = tuple(target.shape), tuple(said.shape)
            raise ValueError(f"The teacher's {name} are of shape {shapes[0]}, the model's {shapes[1]}.")
        said, target = said.float(), target.detach().float()
        losses = _losses_to_sampled(model, name, said, target, generator)
        total = masked_mean(losses, output_mask(model, batch, losses.shape)) + (0.0 if total is None else total)
    if total is None:
        raise ValueError(
            f"{type(model).__name__} gives none of {', '.join(_PREDICTIONS)} that criterion='teacher' could compare. "
            "Use 'taylor', with labels."
        )
    return total


def _losses_to_sampled(model: Any, name: str, said: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
    """One loss per position: to a class, to yes or no for every class, or to numbers."""
    problem = getattr(model.config, "problem_type", None) if name == "logits" else None
    if not bool(target.isfinite().logical_or(target == -torch.inf).all()):
        raise ValueError(
            f"The teacher's {name} are not finite for a batch of the calibration data. Look for broken weights, or load it "
            "in float32 or bfloat16."
        )
    if name == "pred_boxes" or problem == "regression" or (name == "logits" and target.shape[-1] == 1):
        sampled = target + torch.randn(target.shape, generator=generator).to(target.device)
        return 0.5 * (said - sampled).square().sum(dim=-1)
    if problem == "multi_label_classification":
        sampled = torch.bernoulli(target.sigmoid().cpu(), generator=generator).to(said.device)
        return functional.binary_cross_entropy_with_logits(said, sampled, reduction="none").mean(dim=-1)
    if name == "logits" and said.dim() == 4:  # images have their classes second
        said, target = said.movedim(1, -1), target.movedim(1, -1)
    shares = target.softmax(dim=-1).flatten(0, -2).cpu()
    sampled = torch.multinomial(shares, 1, generator=generator).squeeze(-1).to(said.device)
    return functional.cross_entropy(said.flatten(0, -2), sampled, reduction="none").view(said.shape[:-1])
