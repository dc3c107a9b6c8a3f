# SPDX-License-Identifier: Apache-2.0
"""A smaller student of the teacher's own class, its layers copied from the teacher.

Knows nothing of training: whether the student is distilled, pruned or quantized afterwards is not its business.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from transformers import PretrainedConfig, PreTrainedModel

from .architecture import PER_LAYER_FIELDS, LayerStack, evenly_spaced_layers, find_layer_stack
from .facts import record_fact


def make_student(
    teacher: PreTrainedModel, num_layers: int | None = None, *, layers: Sequence[int] | None = None
) -> PreTrainedModel:
    """A model like `teacher` with fewer layers, all weights copied from it.

    The student has the class, dtype, device and attention implementation of the teacher, shares no tensor with it,
    and is in eval mode, as `from_pretrained` gives models. Which layers it has is recorded in
    `student.config.hfkdq["student"]`. Neither the teacher nor the random number generator is touched.

    With `num_layers`, layer `i` of `S` (counted from 1) is layer `round(i * T / S)` of the teacher's `T`, halves
    rounded up: evenly spaced, the last one always among them. Starting from copied layers is the way of Sanh et al.,
    "DistilBERT, a distilled version of BERT" (2019).

    Args:
        teacher (`PreTrainedModel`): an encoder or decoder with one stack of layers.
        num_layers (`int`, *optional*): how many layers the student gets, between 1 and the teacher's number.
        layers (sequence of `int`, *optional*): the numbers of the teacher layers to copy, counted from 1, in
            increasing order. Give either this or `num_layers`.

    Returns:
        `PreTrainedModel`: the student.

    Raises:
        TypeError: `teacher` is no `PreTrainedModel`.
        ValueError: both or neither of `num_layers` and `layers`, one of them out of range, a teacher without one
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
    stack = find_layer_stack(teacher)
    kept = _evenly_spaced(num_layers, len(stack)) if layers is None else _checked(layers, num_layers, len(stack))
    config = _student_config(teacher.config, kept)
    # Built on the CPU, so that its generator is the only one to put back.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        student = type(teacher)._from_config(config, dtype=teacher.dtype)
    student.to(teacher.device)
    _copy_weights(teacher, student, stack, kept)
    if getattr(teacher, "generation_config", None) is not None:
        student.generation_config = copy.deepcopy(teacher.generation_config)
    record_fact(student, "student", {"teacher_layers": len(stack), "layers": kept})
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


def _student_config(config: PretrainedConfig, kept: list[int]) -> PretrainedConfig:
    """A copy of `config` for the layers `kept`, without what was recorded of the teacher."""
    total = config.num_hidden_layers
    config = copy.deepcopy(config)
    vars(config).pop("hfkdq", None)
    config.num_hidden_layers = len(kept)
    for name in PER_LAYER_FIELDS:
        values = vars(config).get(name)
        if isinstance(values, (list, tuple)) and len(values) == total:
            setattr(config, name, [values[layer - 1] for layer in kept])
    return config


def _copy_weights(teacher: PreTrainedModel, student: PreTrainedModel, stack: LayerStack, kept: list[int]) -> None:
    """Copies the teacher's tensors, those of layer `kept[i]` to layer `i`."""
    prefix = f"{stack.name}."
    target = {str(layer - 1): str(index) for index, layer in enumerate(kept)}
    weights = {}
    for name, tensor in teacher.state_dict().items():
        if name.startswith(prefix):
            layer, _, rest = name.removeprefix(prefix).partition(".")
            if layer not in target:
                continue
            name = f"{prefix}{target[layer]}.{rest}"
        elif name.endswith("mid_position_embeddings"):  # of YOLOS: one for each place between two layers
            tensor = tensor[[layer - 1 for layer in kept[:-1]]]
        weights[name] = tensor
    differing = sorted(weights.keys() ^ student.state_dict().keys())
    if differing:
        raise ValueError(
            f"The teacher and a plain {type(student).__name__} differ in {len(differing)} tensors, such as "
            f"{', '.join(differing[:3])}. Make the student from the plain floating-point model, before adapters or "
            "quantizers are added to it."
        )
    student.load_state_dict(weights)
