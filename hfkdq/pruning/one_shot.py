# SPDX-License-Identifier: Apache-2.0
"""Pruning a model at once to the full sparsity of a spec, neurons physically removed.

Knows no schedule and no Trainer.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from ..facts import record_fact, refresh_facts
from ..specs import PruningSpec
from .masks import Masks, check_widths
from .removal import remove_neurons_
from .targets import NeuronTarget, find_targets


def prune(model: PreTrainedModel, spec: PruningSpec) -> PreTrainedModel:
    """Prunes `model` in place, without training.

    Weights with the smallest magnitude become zero, within each linear layer. Neurons with the smallest L2 norm of
    all their weights are cut out of the feed-forward layers, and the width in the configuration becomes what is left
    of it, `max(1, round(width * (1 - sparsity)))`, so that `from_pretrained` loads the saved model like any other.
    What was done is recorded in `model.config.hfkdq["pruning"]`: `spec`, `achieved_sparsity` (measured, share of the
    weights or neurons that were up for pruning), `parameters_before` and `parameters_after` (of the model as it is saved).

    Args:
        model (`PreTrainedModel`): the model to prune.
        spec (`PruningSpec`): what to prune; its schedule (`begin`, `end`) plays no part here.

    Returns:
        `PreTrainedModel`: the same model.

    Raises:
        TypeError: `model` is no `PreTrainedModel`.
        ValueError: the spec does not fit the model. The model is then as it was.

    Example:
        ```python
        >>> from transformers import BertConfig, BertModel
        >>> from hfkdq import PruningSpec
        >>> from hfkdq.pruning import prune
        >>> config = BertConfig(hidden_size=32, num_attention_heads=2, intermediate_size=64, num_hidden_layers=2)
        >>> prune(BertModel(config), PruningSpec(sparsity=0.25, structure="neuron")).config.intermediate_size
        48

        ```
    """
    targets = find_targets(model, spec)
    check_widths(targets, spec)
    before = _count_parameters(model)
    masks = Masks(targets)
    masks.grow_to(spec.sparsity)
    masks.apply_()
    units = sum(mask.numel() for mask in masks.pruned)
    if spec.structure == "neuron":
        gone = sum(int(mask.sum()) for mask in masks.pruned)
        remove_neurons_(model, [target.block for target in targets if isinstance(target, NeuronTarget)], masks.pruned)
        refresh_facts(model)
    else:
        gone = sum(int((target.scores() == 0).sum()) for target in targets)
    fact = {
        "spec": spec.to_dict(),
        "achieved_sparsity": gone / units,
        "parameters_before": before,
        "parameters_after": _count_parameters(model),
    }
    record_fact(model, "pruning", fact)
    return model


def _count_parameters(model: PreTrainedModel) -> int:
    # What only training needs (projections, scales) lies in the model but not in its state dict.
    saved = model.state_dict().keys()
    return sum(parameter.numel() for name, parameter in model.named_parameters() if name in saved)
