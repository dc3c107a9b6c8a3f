# SPDX-License-Identifier: Apache-2.0
"""A smaller student of the teacher's own class, its layers copied from the teacher."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from .facts import record_fact
from .modeling import CountedStack, config_with, evenly_spaced_layers, fields_of_depth, find_layer_stacks


def make_student(
    teacher: PreTrainedModel,
    num_layers: int | None = None,
    *,
    layers: Sequence[int] | None = None,
    num_decoder_layers: int | None = None,
    decoder_layers: Sequence[int] | None = None,
) -> PreTrainedModel:
    """A model like `teacher` with fewer layers, all weights copied from it.

    The student has the class, dtype, device and attention implementation of the teacher, shares no tensor with it,
    and is in eval mode, as `from_pretrained` gives models. Which layers it has is recorded in
    `student.config.hfkdq["student"]`. Neither the teacher nor the random number generator is touched.

    With `num_layers`, layer `i` of `S` (counted from 1) is layer `round(i * T / S)` of the teacher's `T`, halves
    rounded up: evenly spaced, the last one always among them. Starting from copied layers is the way of Sanh et al.,
    "DistilBERT, a distilled version of BERT" (2019). Of an encoder-decoder, encoder and decoder are cut apart, and what is
    not said stays whole: Gandhi et al., "Distil-Whisper" (2023), keep the encoder and two layers of the decoder. To choose
    layers by what they matter, or to cut width, use [`prune`].

    Args:
        teacher (`PreTrainedModel`): an encoder, a decoder or an encoder-decoder.
        num_layers (`int`, *optional*): how many layers the student gets, of an encoder-decoder its encoder; between 1
            and the teacher's number.
        layers (sequence of `int`, *optional*): the numbers of the teacher layers to copy, counted from 1, in
            increasing order. Give either this or `num_layers`.
        num_decoder_layers (`int`, *optional*): as `num_layers`, of the decoder of an encoder-decoder.
        decoder_layers (sequence of `int`, *optional*): as `layers`, of the decoder of an encoder-decoder.

    Returns:
        `PreTrainedModel`: the student.

    Raises:
        TypeError: `teacher` is no `PreTrainedModel`.
        ValueError: both or neither of a number and its layers, one of them out of range, a teacher without a
            clear stack of layers, or one with other tensors than its class has by itself (adapters, quantizers).

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
            "Unwrap the model first; merge adapters with merge_and_unload()."
        )
    stacks = find_layer_stacks(teacher)
    first, second = (num_layers, layers), (num_decoder_layers, decoder_layers)
    if len(stacks) == 1 and second != (None, None):
        raise ValueError(
            f"{type(teacher).__name__} has one stack of layers ({stacks[0].name}); num_decoder_layers and decoder_layers are "
            "for encoder-decoders. Use num_layers or layers."
        )
    if len(stacks) > 1 and first == second == (None, None):
        raise ValueError("Say what to keep: num_layers of the encoder, num_decoder_layers of the decoder, or both.")
    kept = []
    for stack, (number, chosen) in zip(stacks, (first, second), strict=False):
        if len(stacks) > 1 and number is None and chosen is None:
            kept.append(list(range(1, len(stack) + 1)))
        else:
            kept.append(_evenly_spaced(number, len(stack)) if chosen is None else _checked(chosen, number, len(stack)))
    fields: dict[str, Any] = {}
    for stack, numbers in zip(stacks, kept, strict=True):
        fields |= fields_of_depth(teacher.config, len(stack), [number - 1 for number in numbers], stack.field)
    # Built on the CPU, so that its generator is the only one to put back.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        student = type(teacher)._from_config(config_with(teacher.config, **fields), dtype=teacher.dtype)
    student.to(teacher.device)
    _copy_weights(teacher, student, stacks, kept)
    if getattr(teacher, "generation_config", None) is not None:
        student.generation_config = copy.deepcopy(teacher.generation_config)
    fact: dict[str, Any] = {"teacher_layers": len(stacks[0]), "layers": kept[0]}
    if len(stacks) > 1:
        fact |= {"teacher_decoder_layers": len(stacks[1]), "decoder_layers": kept[1]}
    record_fact(student, "student", fact)
    return student.eval()


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
        f"{stack.name}.{number - 1}.": f"{stack.name}.{place}."
        for stack, numbers in zip(stacks, kept, strict=True)
        for place, number in enumerate(numbers)
    }
    prefixes = tuple(f"{stack.name}." for stack in stacks)
    beside = {name for stack in stacks for name in stack.beside}
    source = teacher.state_dict()
    weights = {}
    for name, tensor in source.items():
        if name.startswith(prefixes):
            old = next((prefix for prefix in places if name.startswith(prefix)), None)
            if old is None:
                continue
            name = places[old] + name.removeprefix(old)
        elif name in beside:  # of YOLOS: one for each place between two layers
            tensor = tensor[[number - 1 for number in kept[0][:-1]]]
        weights[name] = tensor
    expected = student.state_dict()
    for stack in stacks:
        for name in expected.keys() - weights.keys():  # what the first layer holds for all (T5: position biases)
            if name.startswith(f"{stack.name}.0.") and name in source:
                weights[name] = source[name]
    differing = sorted(weights.keys() ^ expected.keys())
    if differing:
        raise ValueError(
            f"The teacher and a plain {type(student).__name__} differ in {len(differing)} tensors, such as "
            f"{', '.join(differing[:3])}. Make the student from the plain floating-point model, before adapters or "
            "quantizers are added to it."
        )
    student.load_state_dict(weights)
