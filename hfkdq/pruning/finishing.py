# SPDX-License-Identifier: Apache-2.0
"""Takes what is pruned out of the shapes of a model, records it, and tries that on a copy before anything is done."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from ..facts import read_facts, record_fact, refresh_facts
from ..modeling import Probe, differing, has_recorded_shapes, load_checkpoint, record_shapes
from ..schema import brief
from ..specs import PruningSpec
from .criteria import ImportanceStatistics
from .left_unpruned import describe_left, left_unpruned, share_reached
from .masks import Masks
from .removal import described_config, remove_layers_, remove_units_
from .targets import WeightTarget, find_targets


def mask_without_data(model: PreTrainedModel, spec: PruningSpec) -> Masks:
    """The masks of `spec`; where its criterion looks at data, a generator chooses."""
    criterion = "magnitude" if spec.criterion == "magnitude" else "random"
    spec = dataclasses.replace(spec, criterion=criterion, cut="remove")
    targets = find_targets(model, spec)
    masks = Masks(targets, spec, ImportanceStatistics(targets, spec))
    masks.grow_to(spec.sparsity or 0.0)
    return masks


def rehearse(model: PreTrainedModel, spec: PruningSpec) -> None:
    """Prunes a copy of `model`, and compares it masked, with the units taken out, and loaded again. Raises
    `NoExample`: there is no batch that it could be run on. Raises `ValueError`: they compute different things."""
    if not spec.removes or not spec.sparsity:
        return
    probe = Probe(model)
    twin = probe.twin
    step = "masked"
    try:
        masks = mask_without_data(twin, spec)
        masks.apply_()
        masked = probe.outputs(twin)
        step = "removed"
        finish_(twin, masks, 0)
        removed = probe.outputs(twin)
        wrong = differing(removed, masked, ~masks.pruned[0].cpu() if spec.structure == "hidden" else None)
        if wrong is None:
            step = "loaded again"
            by_shapes = partial(load_checkpoint, model_class=type(twin))
            load = by_shapes if has_recorded_shapes(twin.config) else type(twin).from_pretrained
            wrong = differing(probe.reloaded(twin, load), removed)
    except Exception as error:  # whatever a class raises that cannot run so
        wrong = f"{type(error).__name__}: {brief(error)}"
    if wrong is not None:
        raise ValueError(
            f"structure={spec.structure!r} does not fit {type(model).__name__}: tried on a copy, with units {step} it does not "
            f"compute what it should ({wrong}). Nothing is changed. Use cut='mask', or another structure: 'weight' fits any model."
        )


def finish_(model: PreTrainedModel, masks: Masks, before: int) -> None:
    """Removes the pruned units from the model, for good, and records it."""
    spec, targets = masks.spec, masks.targets
    left = left_unpruned(model, spec, targets)
    told = {"left_unpruned": describe_left(model, left)} if left else {}
    reached = share_reached(targets, left)
    units = sum(target.units for target in targets)
    masks.apply_()
    gone = sum(masks.counts())
    if isinstance(targets[0], WeightTarget):
        zeros = [target.reduce(lambda part: part.values.detach().abs()) == 0 for target in targets]
        gone = sum(int(entries.sum()) for entries in zeros)
    masks.lift_()
    if spec.removes and gone:
        if spec.structure == "layer":
            remove_layers_(model, targets, masks.pruned)
        else:
            config, _ = described_config(
                model, spec, targets, [t.units - c for t, c in zip(targets, masks.counts(), strict=True)]
            )
            counts = remove_units_(model, targets, masks.pruned)
            facts = read_facts(model)
            for name, value in vars(config).items():
                if vars(model.config).get(name) != value and name != "hfkdq":
                    setattr(model.config, name, value)
            if facts:
                model.config.hfkdq = facts
            record_shapes(model, counts)
        refresh_facts(model)
    record_pruning(model, spec, gone / units * reached, before, **told)


def record_pruning(model: PreTrainedModel, spec: PruningSpec, achieved: float, before: int, **more: Any) -> None:
    """Records what was done, with what was recorded of prunings before."""
    fact: dict[str, Any] = {
        "spec": spec.to_dict(),
        "achieved_sparsity": achieved,
        "parameters_before": before,
        "parameters_after": count_parameters(model),
        **more,
    }
    former = read_facts(model).get("pruning")
    if former is not None:
        fact["earlier"] = [*former.pop("earlier", []), former]
    record_fact(model, "pruning", fact)


def count_parameters(model: PreTrainedModel) -> int:
    """Parameters that the model is saved with: what only training needs (projections, scales) is not among them."""
    saved = model.state_dict().keys()
    return sum(parameter.numel() for name, parameter in model.named_parameters() if name in saved)
