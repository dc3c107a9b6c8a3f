# SPDX-License-Identifier: Apache-2.0
"""Takes what is pruned out of the shapes of a model, records it, tries that on a copy first, and loads it again."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..facts import NOTABLE, left_of, read_facts, record_fact, refresh_facts, told_left
from ..modeling.checkpoints import load_config
from ..modeling.heads import find_heads
from ..modeling.layers import find_layer_stacks
from ..modeling.neurons import find_neurons
from ..modeling.own_modules import own_class
from ..modeling.proof import NotWritten, Probe, differing
from ..modeling.recorded_shapes import has_recorded_shapes, load_checkpoint, record_shapes
from ..schema import brief
from ..specs import PruningSpec
from .criteria import ImportanceStatistics
from .masks import Masks
from .progress import UNFINISHED
from .removal import described_config, remove_layers_, remove_units_
from .sharing import restore_sharing_
from .targets import WEIGHTED, PruningTarget, WeightTarget, find_targets, is_zero, weights_of

_NOT_RUN = {
    "masked": "does not run, as its units lie elsewhere than in models of its kind",
    "removed": "does not run, as its code counts on their former number",
    "loaded again": "does not run, as its code makes them anew in their former number",
}
"""What it means that a copy fails, by what was last done to it."""


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
        wrong = wrong and f"does not compute what it should ({wrong})"
    except NotWritten:
        raise
    except Exception as error:  # whatever a class raises that cannot run so
        wrong = f"{_NOT_RUN[step]} ({type(error).__name__}: {brief(error)})"
    if wrong is not None:
        mask = "" if step == "masked" or spec.structure in ("layer", "hidden") else "cut='mask', or "
        raise ValueError(
            f"structure={spec.structure!r} does not fit {type(model).__name__}: tried on a copy, with units {step} it {wrong}. "
            f"Nothing is changed. Use {mask}another structure: 'weight' fits any model."
        )


def finish_(model: PreTrainedModel, masks: Masks, before: int) -> None:
    """Removes the pruned units from the model, for good, and records it."""
    spec, targets = masks.spec, masks.targets
    left = left_unpruned(model, spec, targets)
    told = {"left_unpruned": left_of(left, count_parameters(model))} if left else {}
    reached = share_reached(targets, left)
    units = sum(target.units for target in targets)
    masks.apply_()
    gone = sum(masks.counts())
    if isinstance(targets[0], WeightTarget):
        gone = sum(int(is_zero(target).sum()) for target in targets)
    masks.lift_()
    if spec.removes and gone:
        _remove_(model, masks)
        refresh_facts(model)
    record_pruning(model, spec, gone / units * reached, before, **told)


def _remove_(model: PreTrainedModel, masks: Masks) -> None:
    """Takes the units out of the shapes of the model, which its configuration then says."""
    if masks.spec.structure == "layer":
        remove_layers_(model, masks.targets, masks.pruned)
        return
    kept = [target.units - count for target, count in zip(masks.targets, masks.counts(), strict=True)]
    config, _ = described_config(model, masks.spec, masks.targets, kept)
    counts = remove_units_(model, masks.targets, masks.pruned)
    facts = read_facts(model)
    for name, value in vars(config).items():
        if vars(model.config).get(name) != value and name != "hfkdq":
            setattr(model.config, name, value)
    if facts:
        model.config.hfkdq = facts
    record_shapes(model, counts)


def record_pruning(model: PreTrainedModel, spec: PruningSpec, achieved: float, before: int, **more: Any) -> None:
    """Records what was done, with what was recorded of prunings before."""
    fact = {
        "spec": spec.to_dict(), "achieved_sparsity": achieved, "parameters_before": before,
        "parameters_after": count_parameters(model), **more,
    }  # fmt: skip
    former = read_facts(model).get("pruning")
    if former is not None:
        fact["earlier"] = [*former.pop("earlier", []), former]
    record_fact(model, "pruning", fact)


def count_parameters(model: PreTrainedModel) -> int:
    """Parameters that the model is saved with: what only training needs (projections, scales) is not among them."""
    saved = model.state_dict().keys()
    return sum(parameter.numel() for name, parameter in model.named_parameters() if name in saved)


logger = logging.get_logger(__name__)


def left_unpruned(model: PreTrainedModel, spec: PruningSpec, targets: Sequence[PruningTarget]) -> dict[str, int]:
    """How many weights, parameters with more than one axis, by the name of their module, where they are a notable
    part. They lie in the layers of a stack. Of neurons and heads they are those of neither; of single weights those of
    modules that are no linear layer, no convolution and no experts. Other structures reach all that
    they are for, and so does a spec that names its targets."""
    if spec.structure in ("channel", "layer", "hidden", "vocab") or spec.target_modules is not None:
        return {}
    try:
        layers = tuple(f"{stack.name}." for stack in find_layer_stacks(model))
        units = [*find_neurons(model), *find_heads(model)] if spec.structure in ("neuron", "head") else []
    except ValueError:
        return {}
    known = {id(part.values) for target in targets for part in target.parts}
    known |= {id(entry.values) for group in units for entry in group.slices}
    if not units:  # what is excluded is meant to stay
        reached = (m for m in model.modules() if spec.criterion != "activation" or isinstance(m, WEIGHTED))
        known |= {id(getattr(module, tensor)) for module in reached for tensor in weights_of(module)}
    found: dict[str, int] = {}
    for name, values in model.state_dict(keep_vars=True).items():
        is_weight = isinstance(values, torch.nn.Parameter) and values.dim() > 1 and values.is_floating_point()
        if is_weight and name.startswith(layers) and id(values) not in known:
            owner = name.rpartition(".")[0]
            found[owner] = found.get(owner, 0) + values.numel()
    return found if left_of(found, count_parameters(model))["share"] > NOTABLE else {}


def share_reached(targets: Sequence[PruningTarget], left: dict[str, int]) -> float:
    """The share that targets have of all weights that a spec is for."""
    parts = (part.values for target in targets for part in target.parts)
    reached = {id(values): values.numel() for values in parts if values.dim() > 1}
    return sum(reached.values()) / max(1, sum(reached.values()) + sum(left.values()))


def tell_left_unpruned(model: PreTrainedModel, spec: PruningSpec, targets: Sequence[PruningTarget]) -> None:
    """Warns where there is such a part."""
    left = left_unpruned(model, spec, targets)
    if left:
        share = left_of(left, count_parameters(model))["share"]
        logger.warning(
            f"structure={spec.structure!r} leaves {share:.0%} of the parameters of {type(model).__name__} as they are, "
            f"as it does not know their modules: {told_left(left, dict(model.named_modules()))}. "
            "achieved_sparsity counts them. Name what is to be pruned in target_modules if that is meant."
        )


def load_pruned(path: str, model: nn.Module | type[PreTrainedModel] | None = None, **kwargs: Any) -> PreTrainedModel:
    """Loads a checkpoint with the shapes that its configuration records, layer by layer, and the layers that are shared.

    No code comes from the checkpoint: the class is that of Transformers, or yours, built with smaller tensors. What plain
    `from_pretrained` can load, this loads as well.

    Args:
        path (`str`): a folder that `save_pretrained` or a Trainer wrote, or a model id on the Hub.
        model (`PreTrainedModel` or its class, or `nn.Module`, *optional*): a class of your own, or a model of it as it was
            before it was pruned, that is not registered with an Auto class. A model stays as it is; another of its class
            is returned.
        kwargs (*optional*): passed to `from_pretrained`; `dtype` is that of the file by default.

    Returns:
        `PreTrainedModel`: the model, in eval mode.

    Raises:
        TypeError: `model` is neither.
        ValueError: the record does not fit the class, the configuration names no class of Transformers, or the checkpoint
            is from the middle of a training that prunes layers or the hidden width.

    Example:
        ```python
        from hfkdq import load_pruned

        model = load_pruned("out/pruned")
        ```
    """
    own = own_class(model)
    config = load_config(path, None if own is None else own.config_class, **kwargs)
    unfinished = read_facts(config).get(UNFINISHED)
    if unfinished is not None:
        raise ValueError(
            f"{path} is from the middle of a training that prunes structure={unfinished.get('structure')!r}. Its weights alone are "
            "another model than the one that was trained: go on with trainer.train(resume_from_checkpoint=...), or save the "
            "model when the training has ended."
        )
    return restore_sharing_(load_checkpoint(path, config, own, **{"dtype": "auto", **kwargs}))
