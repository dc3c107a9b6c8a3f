# SPDX-License-Identifier: Apache-2.0
"""Pruning a model at once to the full sparsity of a spec, and taking what is pruned out of its shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedModel

from ..facts import read_facts
from ..modeling import NoStructure
from ..modeling.batches import Batches, first_batch, make_batches
from ..modeling.examples import tried_on
from ..modeling.own_modules import config_name
from ..modeling.placement import refuse_sharded
from ..specs import PruningSpec
from .criteria import ImportanceStatistics, check_criterion
from .finishing import count_parameters, finish_, record_pruning, rehearse, tell_left_unpruned
from .importance import collect_importance_
from .masks import Masks, check_counts, units_kept
from .removal import described_config
from .targets import LayerTarget, PruningTarget, find_targets
from .vocabulary import prune_vocabulary

STRUCTURES = ("neuron", "head", "channel", "layer", "hidden")
"""Those whose units leave the shapes of a model."""


def prune(
    model: PreTrainedModel,
    spec: PruningSpec,
    calibration: Batches | None = None,
    *,
    teacher_model: PreTrainedModel | None = None,
    batch_size: int = 8,
    data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
    processing_class: Any = None,
    example_inputs: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Prunes `model` in place, without training.

    What goes by `spec.structure` goes out of the shapes of the model, and its configuration says what is left of it,
    so that `from_pretrained` loads the saved model like any other. What a configuration cannot describe is refused,
    unless `spec.plain_checkpoint` is false: then [`load_pruned`] loads it. Single weights become zero.
    What was done is recorded in `model.config.hfkdq["pruning"]`: `spec`, `achieved_sparsity` (measured, share of the
    units that were up for pruning, and of the weights in `left_unpruned`, which were meant and not known how to prune), `parameters_before` and `parameters_after` (of the model as it is saved), and
    `earlier`, the same of each pruning before, if there was one.

    Args:
        model (`PreTrainedModel`): the model to prune.
        spec (`PruningSpec`): what to prune; its schedule (`begin`, `end`, `rounds`) plays no part here.
        calibration (iterable of `dict` or `datasets.Dataset`, *optional*): batches of model inputs, or examples to make
            them from; with labels for the criteria `"taylor"` and `"fisher"`. Needed by all criteria but `"magnitude"`
            and `"random"`, and by `cut="mean"`. For `structure="vocab"` the corpus: texts, or a `Dataset` with a column
            `"text"`.
        teacher_model (`PreTrainedModel`, *optional*): for the criterion `"teacher"`; by default the model itself.
        batch_size (`int`, defaults to 8): examples in a batch, for a `Dataset`.
        data_collator (`Callable`, *optional*): makes a batch of examples, for a `Dataset`.
        processing_class (*optional*): a tokenizer that pads, for a `Dataset` without a `data_collator`; for
            `structure="vocab"` the tokenizer, which is changed along with the model.
        example_inputs (`dict`, *optional*): a batch as your collator makes it, on which a copy is tried where none that is
            made up from the configuration fits; by default the first one of `calibration`. What goes out of the shapes
            of a model of your own is found by following it.

    Returns:
        `PreTrainedModel`: the same model.

    Raises:
        TypeError: `model` is no `PreTrainedModel`.
        ValueError: the spec does not fit the model, a copy pruned so computes something else, there is no batch to try it
            on, data are missing, or processes hold parts of the model. The model is then as it was.

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
    refuse_sharded(model)
    if spec.structure == "vocab":
        return _prune_vocabulary(model, spec, calibration, processing_class)
    batches = None
    if calibration is not None:
        batches = make_batches(model, calibration, batch_size, data_collator, processing_class)
    with tried_on(first_batch(batches) if example_inputs is None else example_inputs, model):
        targets = targets_of(model, spec)
        check_prunable(model, spec, targets)
        rehearse(model, spec)
        tell_left_unpruned(model, spec, targets)
    importance = ImportanceStatistics(targets, spec)
    masks = Masks(targets, spec, importance)
    if importance.needs_gradients or importance.needs_activations:
        if spec.criterion == "movement":
            raise ValueError(
                "criterion='movement' is learned while the model is trained: use PruningCallback. Without training "
                "'taylor' uses the same product of weight and gradient."
            )
        if batches is None:
            raise ValueError(
                f"criterion={spec.criterion!r} with cut={spec.cut!r} looks at data: give calibration, batches of model inputs or "
                "a datasets.Dataset. criterion='magnitude' with cut='remove' needs none."
            )
        collect_importance_(model, importance, batches, teacher_model)
    before = count_parameters(model)
    masks.grow_to(spec.sparsity or 0.0)
    finish_(model, masks, before)
    return model


def targets_of(model: PreTrainedModel, spec: PruningSpec) -> list[PruningTarget]:
    """As `find_targets`; where the model lacks the structure, the error names those that it has."""
    try:
        return find_targets(model, spec)
    except NoStructure as error:
        found = [other for other in STRUCTURES if other != spec.structure and _fits(model, spec, other)]
        found.append("weight")
        names = " or ".join(f"structure={structure!r}" for structure in found)
        raise ValueError(f"{error} What fits this model: {names}.") from error


def _fits(model: PreTrainedModel, spec: PruningSpec, structure: str) -> bool:
    """Whether as many units of another structure could go, which is tried on a copy."""
    other = PruningSpec(sparsity=spec.sparsity or 0.5, structure=structure, plain_checkpoint=spec.plain_checkpoint)
    try:
        check_prunable(model, other, find_targets(model, other))
        rehearse(model, other)
    except ValueError:
        return False
    return True


def check_prunable(model: PreTrainedModel, spec: PruningSpec, targets: list[PruningTarget]) -> None:
    """Refuses what cannot be done, before anything is done. Raises `ValueError`: a target would be left empty, has
    groups that would break, has no bias for means, or the configuration could not describe the result."""
    check_counts(targets, spec)
    check_criterion(targets, spec)
    for target in targets:
        if isinstance(target, LayerTarget) and target.stack.beside:
            raise ValueError(
                f"{', '.join(target.stack.beside)} of {type(model).__name__} has an entry for every place between two layers, so "
                "no layer can be bypassed. make_student(teacher, layers=[...]) copies some of the layers."
            )
    if spec.removes and "sharing" in read_facts(model):
        raise ValueError(
            "Layers of this model share their weights, so their units cannot be removed one layer at a time. Call "
            "unshare_layers_(model), prune, and share_layers(model) again; structure='weight' works on shared layers."
        )
    if not spec.removes or not spec.plain_checkpoint or spec.structure == "layer" or not spec.sparsity:
        return
    if spec.ranking == "global":
        raise ValueError(
            f"ranking='global' leaves layers with different numbers of units, which {config_name(model.config)} cannot say. "
            "Use ranking='local', or plain_checkpoint=False and load the result with hfkdq.load_pruned."
        )
    _, problem = described_config(
        model, spec, targets, [units_kept(t.units, spec.sparsity, spec.multiple_of) for t in targets]
    )
    if problem is not None:
        raise ValueError(problem)


def _prune_vocabulary(model: PreTrainedModel, spec: PruningSpec, corpus: Any, tokenizer: Any) -> PreTrainedModel:
    """`structure="vocab"`: the rarest tokens of a corpus, model and tokenizer together."""
    if corpus is None or tokenizer is None:
        raise ValueError(
            "structure='vocab' removes the tokens that a corpus does not use, from the model and from its tokenizer: "
            "prune(model, spec, corpus, processing_class=tokenizer)."
        )
    before, tokens = count_parameters(model), len(tokenizer)
    largest = None if spec.sparsity is None else units_kept(tokens, spec.sparsity)
    column = "text" if "text" in (getattr(corpus, "column_names", None) or ()) else None
    prune_vocabulary(model, tokenizer, corpus, column=column, max_size=largest)
    record_pruning(model, spec, 1.0 - len(tokenizer) / tokens, before)
    return model
