# SPDX-License-Identifier: Apache-2.0
"""A smaller student of the teacher's own class, its layers copied from the teacher."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .facts import record_fact
from .modeling.bypass import bypass_
from .modeling.checkpoints import without_pooler
from .modeling.examples import tried_on
from .modeling.layers import CountedStack, evenly_spaced_layers, find_layer_stacks
from .modeling.masks import Batch
from .modeling.numbering import refit_
from .modeling.probing import config_with
from .modeling.proof import NotWritten, Probe, differing
from .modeling.recorded_shapes import has_recorded_shapes, load_checkpoint
from .schema import brief

logger = logging.get_logger(__name__)


def make_student(
    teacher: PreTrainedModel,
    num_layers: int | None = None,
    *,
    layers: Sequence[int] | None = None,
    num_decoder_layers: int | None = None,
    decoder_layers: Sequence[int] | None = None,
    example_inputs: Batch | None = None,
) -> PreTrainedModel:
    """A model like `teacher` with fewer layers, all weights copied from it.

    The student has the class, dtype, device and attention implementation of the teacher, shares no tensor with it,
    and is in eval mode, as `from_pretrained` gives models. Which layers it has is recorded in
    `student.config.hfkdq["student"]`. Neither the teacher nor the random number generator is touched.

    With `num_layers`, layer `i` of `S` (counted from 1) is layer `round(i * T / S)` of the teacher's `T`, halves
    rounded up: evenly spaced, the last one always among them; where a layer has no other place (the first of ModernBERT) or no
    configuration says so, the nearest that can be. Starting from copied layers is the way of Sanh et al.,
    "DistilBERT, a distilled version of BERT" (2019). Of an encoder-decoder, encoder and decoder are cut apart, and what is
    not said stays whole: Gandhi et al., "Distil-Whisper" (2023), keep the encoder and two layers of the decoder. Layers after
    each of which heads of their own predict, as in RT-DETR's decoder, keep these. To choose layers by what they matter, or to
    cut width, use [`prune`].

    Args:
        teacher (`PreTrainedModel`): an encoder, a decoder or an encoder-decoder.
        num_layers (`int`, *optional*): how many layers the student gets, of an encoder-decoder its encoder; between 1
            and the teacher's number.
        layers (sequence of `int`, *optional*): the numbers of the teacher layers to copy, counted from 1, in
            increasing order. Give either this or `num_layers`.
        num_decoder_layers (`int`, *optional*): as `num_layers`, of the decoder of an encoder-decoder.
        decoder_layers (sequence of `int`, *optional*): as `layers`, of the decoder of an encoder-decoder.
        example_inputs (`dict`, *optional*): a batch as your collator makes it, on which student and teacher are compared
            where none that is made up from the configuration fits.

    Returns:
        `PreTrainedModel`: the student.

    Raises:
        TypeError: `teacher` is no `PreTrainedModel`.
        ValueError: both or neither of a number and its layers, one of them out of range, layers that would compute
            something else in the student, no batch to compare them on, a teacher without a clear stack of layers, or one with other tensors than its class has by itself (adapters, quantizers).

    Example:
        ```python
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from hfkdq import make_student
        >>> config = BertConfig(hidden_size=32, num_attention_heads=2, intermediate_size=64, num_hidden_layers=4)
        >>> student = make_student(BertForSequenceClassification(config), num_layers=2)
        >>> student.config.hfkdq["student"]
        {'teacher_layers': 4, 'layers': [2, 4]}

        ```
    """
    if not isinstance(teacher, PreTrainedModel):
        raise TypeError(
            f"make_student copies a Transformers PreTrainedModel, got {type(teacher).__name__}. "
            "Unwrap the model first; merge adapters with merge_and_unload(). A student of a module of your own is a smaller "
            "one that you build: any two models with the same outputs are teacher and student."
        )
    stacks = find_layer_stacks(teacher, with_heads=True)
    first, second = (num_layers, layers), (num_decoder_layers, decoder_layers)
    if len(stacks) == 1 and second != (None, None):
        raise ValueError(
            f"{type(teacher).__name__} has one stack of layers ({stacks[0].name}); num_decoder_layers and decoder_layers are "
            "for encoder-decoders. Use num_layers or layers."
        )
    if len(stacks) > 1 and first == second == (None, None):
        raise ValueError("Say what to keep: num_layers of the encoder, num_decoder_layers of the decoder, or both.")
    kept, even = [], []
    for stack, (number, chosen) in zip(stacks, (first, second), strict=False):
        total = len(stack)
        if len(stacks) > 1 and number is None and chosen is None:
            kept.append(list(range(1, total + 1)))
        else:
            kept.append(_evenly_spaced(number, total) if chosen is None else _checked(chosen, number, total))
        if chosen is None and not stack.is_sayable([layer - 1 for layer in kept[-1]]):
            kept[-1] = _nearest(stack, kept[-1])
        even.append(chosen is None)
    kept += [list(range(1, len(stack) + 1)) for stack in stacks[2:]]
    with tried_on(example_inputs, teacher):
        try:
            student = _proved(teacher, stacks, kept)
        except _Unfit:
            nearest = [_nearest(s, own) if free else own for s, own, free in zip(stacks, kept, even, strict=False)]
            if nearest == kept[: len(even)]:
                raise
            kept[: len(even)] = nearest
            student = _proved(teacher, stacks, kept)
    fact: dict[str, Any] = {"teacher_layers": len(stacks[0]), "layers": kept[0]}
    if len(stacks) > 1:
        fact |= {"teacher_decoder_layers": len(stacks[1]), "decoder_layers": kept[1]}
    record_fact(student, "student", fact)
    return student.eval()


class _Unfit(ValueError):
    """Layers hold other tensors than their places in the student have, or compute something else there."""


def _proved(teacher: PreTrainedModel, stacks: Sequence[CountedStack], kept: Sequence[list[int]]) -> PreTrainedModel:
    """A model of the layers `kept` of each stack, with the weights of the teacher, that computes what these do."""
    student = _copied(teacher, stacks, kept)
    _prove(teacher, student, stacks, kept)
    return student


def _copied(teacher: PreTrainedModel, stacks: Sequence[CountedStack], kept: Sequence[list[int]]) -> PreTrainedModel:
    fields: dict[str, Any] = {}
    for stack, numbers in zip(stacks, kept, strict=True):
        fields |= stack.fields([number - 1 for number in numbers])
    # Built on the CPU, so that its generator is the only one to put back.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        try:
            student = type(teacher)._from_config(
                config_with(teacher.config, **fields), dtype=teacher.dtype, **without_pooler(teacher)
            )
        except Exception as error:  # whatever a class raises for a number of layers that it does not take
            raise ValueError(
                f"Transformers makes no {type(teacher).__name__} of {' and '.join(str(len(own)) for own in kept)} layers "
                f"({type(error).__name__}: {brief(error)}). Choose another number."
            ) from error
    student.to(teacher.device)
    _copy_weights(teacher, student, stacks, kept)
    for stack, numbers in zip(stacks, kept, strict=True):
        for layer, number in zip(stack.in_model(student), numbers, strict=True):
            refit_(layer, stack.layers[number - 1], layer)
    if getattr(teacher, "generation_config", None) is not None:
        student.generation_config = copy.deepcopy(teacher.generation_config)
    return student


def _nearest(stack: CountedStack, numbers: list[int]) -> list[int]:
    """As many layers, as near to `numbers` as may be, with those that can stand nowhere else."""
    bound = stack.bound_to()
    if len(bound) > len(numbers):
        raise ValueError(
            f"{stack.name} needs {len(numbers)} layers and more: {', '.join(str(place + 1) for place in bound)} hold tensors "
            "that no other place has."
        )
    costs = [[float(abs(layer + 1 - number)) for layer in range(len(stack))] for number in numbers]
    chosen = stack.choose(costs, bound) or [number - 1 for number in numbers]
    return [layer + 1 for layer in chosen]


def _prove(
    teacher: PreTrainedModel, student: PreTrainedModel, stacks: Sequence[CountedStack], kept: Sequence[list[int]]
) -> None:
    """Compares a student, as it is and as it is loaded again, with the teacher whose other layers hand on their input, or,
    where each has heads of its own, are not there. Raises `ValueError`: they compute different things."""
    name = type(teacher).__name__
    probe = Probe(teacher)
    for stack, numbers in zip(stacks, kept, strict=True):
        if stack.heads:
            _cut_(probe.twin, stack, numbers, student)
            continue
        for place, layer in enumerate(stack.in_model(probe.twin)):
            bypass_(layer, place + 1 not in numbers)
    by_shapes = partial(load_checkpoint, model_class=type(student))
    copied, plain = probe.twin_of(student), not has_recorded_shapes(student.config)
    try:
        expected, found = probe.outputs(probe.twin), probe.outputs(copied)
        if [value.shape for value in found] != [
            value.shape for value in expected
        ]:  # some are of all layers side by side
            for stack, numbers in zip(stacks, kept, strict=True):
                if not stack.heads:
                    _cut_(probe.twin, stack, numbers, student)
            expected = probe.outputs(probe.twin)
        wrong = None if any(stack.beside for stack in stacks) else differing(found, expected)
        wrong = wrong or differing(probe.reloaded(copied, type(copied).from_pretrained if plain else by_shapes), found)
        wrong = wrong and f"compute what these layers of the teacher do ({wrong})"
    except NotWritten:
        raise
    except Exception as error:  # whatever a class raises that cannot run so
        wrong = f"run ({type(error).__name__}: {brief(error)})"
    if wrong is not None:
        raise _Unfit(
            f"A {name} of layers {', '.join(map(str, kept))} would not {wrong}: what a layer computes follows from its number, or the "
            "model does more than hand its output on to the next. Choose layers that keep their order in the pattern of the "
            "configuration, such as a whole period, or build a smaller model of the class yourself: any two with the same "
            "outputs are teacher and student."
        )
    writes = copied.can_generate() and student.config.is_encoder_decoder
    if writes and not probe.writes(copied, use_cache=True) and probe.writes(copied, use_cache=False):
        student.generation_config.use_cache = False  # type: ignore[union-attr]
        logger.warning(
            f"Transformers' cache takes the decoder of {name} for as deep as its encoder, and generate() fails with it. The student's "
            "generation_config says use_cache=False; with num_decoder_layers no larger than num_layers it would be faster."
        )
    if not plain:
        logger.warning(
            f"No configuration of {name} describes layers {', '.join(map(str, kept))}: from_pretrained will refuse what is "
            "saved of the student, and hfkdq.load_pruned loads it."
        )


def _cut_(teacher: PreTrainedModel, stack: CountedStack, numbers: list[int], student: PreTrainedModel) -> None:
    """Takes the layers out of a teacher that are not among `numbers`, with their heads."""
    for name in (stack.name, *stack.heads):
        owner, _, last = name.rpartition(".")
        layers = teacher.get_submodule(name)
        setattr(teacher.get_submodule(owner), last, nn.ModuleList([layers[i - 1] for i in numbers]))  # type: ignore[index]
    stack.renumber_(teacher, student)


def _evenly_spaced(count: int | None, total: int) -> list[int]:
    """Numbers of `count` of `total` layers, if there can be so many."""
    if not isinstance(count, int) or not 1 <= count <= total:
        raise ValueError(
            f"num_layers={count!r}: the teacher has {total} layers, so the student can have 1 to {total}. "
            "Pass num_layers, or choose the layers yourself with layers=[...]."
        )
    return evenly_spaced_layers(count, total)


def _checked(layers: Sequence[int], num_layers: int | None, total: int) -> list[int]:
    """`layers` as a list, if they are increasing teacher layers and the only choice made."""
    if num_layers is not None:
        raise ValueError(f"Got num_layers={num_layers!r} and layers={layers!r}. Pass one of them.")
    kept = list(layers)
    in_range = all(isinstance(layer, int) and 1 <= layer <= total for layer in kept)
    if not kept or not in_range or kept != sorted(set(kept)):
        raise ValueError(
            f"layers={layers!r} must be numbers of teacher layers, 1 to {total}, each larger than the one before, "
            f"such as layers=[1, {total}]."
        )
    return kept


def _copy_weights(
    teacher: PreTrainedModel, student: PreTrainedModel, stacks: Sequence[CountedStack], kept: Sequence[list[int]]
) -> None:
    """Copies the teacher's tensors, those of layer `kept[stack][i]` to layer `i` of each stack."""
    places = {
        f"{name}.{number - 1}.": f"{name}.{place}."
        for stack, numbers in zip(stacks, kept, strict=True)
        for name in (stack.name, *stack.heads)
        for place, number in enumerate(numbers)
    }
    prefixes = tuple(f"{name}." for stack in stacks for name in (stack.name, *stack.heads))
    beside = {name for stack in stacks for name in stack.beside}
    source = teacher.state_dict()
    weights = {}
    for name, tensor in source.items():
        if name.startswith(prefixes):
            old = next((prefix for prefix in places if name.startswith(prefix)), None)
            if old is None:
                continue
            name = places[old] + name.removeprefix(old)
        elif name in beside:
            # An entry for each layer, for each place between two (YOLOS), or for every state.
            depth, left = len(stacks[0]), [number - 1 for number in kept[0]]
            dim, size = next((dim, size) for dim, size in enumerate(tensor.shape) if abs(size - depth) < 2)
            chosen = {depth - 1: left[:-1], depth: left, depth + 1: [0, *(place + 1 for place in left)]}[size]
            tensor = tensor.index_select(dim, torch.tensor(chosen, dtype=torch.long, device=tensor.device))
        weights[name] = tensor
    expected = student.state_dict()
    for stack in stacks:
        for name in expected.keys() - weights.keys():  # what the first layer holds for all (T5: position biases)
            if name.startswith(f"{stack.name}.0.") and name in source:
                weights[name] = source[name]
    wrong = sorted(weights.keys() ^ expected.keys())
    bound = {stack.name: stack.bound_to() for stack in stacks} if wrong else {}
    told = "; ".join(f"{', '.join(str(i + 1) for i in places)} of {name}" for name, places in bound.items() if places)
    if told:
        raise _Unfit(
            f"{wrong[0]} is not where the student has its layer: some layers of {type(teacher).__name__} hold tensors that no "
            f"other place has. Choose layers among which are {told}."
        )
    if wrong:
        raise ValueError(
            f"The teacher and a plain {type(student).__name__} differ in {len(wrong)} tensors, such as "
            f"{', '.join(wrong[:3])}. Make the student from the plain floating-point model, before adapters or "
            "quantizers are added to it."
        )
    student.load_state_dict(weights)
