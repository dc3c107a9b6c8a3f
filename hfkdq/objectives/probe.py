# SPDX-License-Identifier: Apache-2.0
"""What a model really returns, found by trying it on one small example.

Signatures do not tell: Transformers 5 takes `output_hidden_states` through `**kwargs`, and attention
implementations silently return nothing. Knows no objective.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from ..architecture import evenly_spaced_layers
from ..facts import read_facts
from ..forwards import as_output, by_name


def probe(model: PreTrainedModel, **request: bool) -> Any:
    """The output of `model` in eval mode for one small made-up example.

    Args:
        model (`PreTrainedModel`): a text model on `input_ids`, a vision model on `pixel_values`, or a speech model on
            `input_values` or `input_features`; an encoder-decoder too. Its mode, its gradients and the random state
            stay as they are.
        request (`bool`): `output_hidden_states=True`, `output_attentions=True`.

    Returns:
        `ModelOutput` with a batch of 1.

    Raises:
        ValueError: another kind of model.
    """
    mode = model.training
    model.eval()
    try:
        with torch.no_grad():
            return as_output(model(**_example(model), **by_name(model), **request))
    finally:
        model.train(mode)


def _example(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    config, name = model.config, model.main_input_name
    # A model that lies on disk has no device; where it runs, hooks move the input.
    device = torch.device("cpu") if model.device.type == "meta" else model.device
    if name == "input_ids":
        ids = torch.full((1, 4), min(3, config.vocab_size - 1), device=device)
        if getattr(config, "is_encoder_decoder", False):
            ids[0, -1] = config.eos_token_id or 0  # some sequence classifiers read the state at the end token
            return {"input_ids": ids, "decoder_input_ids": ids}
        return {"input_ids": ids}
    if name == "pixel_values":
        size = getattr(config, "image_size", 224)
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        return {"pixel_values": torch.zeros(1, config.num_channels, height, width, device=device, dtype=model.dtype)}
    if name == "input_values":
        return {"input_values": torch.zeros(1, 4000, device=device, dtype=model.dtype)}
    if name == "input_features" and hasattr(config, "max_source_positions"):
        frames = torch.zeros(1, config.num_mel_bins, 2 * config.max_source_positions, device=device, dtype=model.dtype)
        return {"input_features": frames, "decoder_input_ids": torch.zeros(1, 4, dtype=torch.long, device=device)}
    raise ValueError(f"{type(model).__name__} takes {name!r}; this release distils models of text, images and audio.")


def hidden_states(model: PreTrainedModel) -> tuple[torch.Tensor, ...]:
    """Embeddings and the output of every layer, for one small example.

    Raises:
        ValueError: the model returns none.
    """
    states = getattr(probe(model, output_hidden_states=True), "hidden_states", None)
    if not states:
        raise ValueError(
            f"{type(model).__name__} returns no hidden states under that name, so they cannot be compared. Of "
            "encoder-decoders this release distils the logits alone: LogitKD()."
        )
    return tuple(states)


def attentions(model: PreTrainedModel) -> tuple[torch.Tensor, ...]:
    """Attention probabilities of every layer for one small example, after a switch to eager attention if needed.

    Raises:
        ValueError: the model returns none, with eager attention neither.
    """
    maps = _attention_maps(model)
    if maps is None:
        try:
            model.set_attn_implementation("eager")
        except Exception as error:
            raise ValueError(_no_attentions(model)) from error
        maps = _attention_maps(model)
    if maps is None:
        raise ValueError(_no_attentions(model))
    return maps


def _attention_maps(model: PreTrainedModel) -> tuple[torch.Tensor, ...] | None:
    with warnings.catch_warnings():  # That there are none is what is asked here.
        warnings.simplefilter("ignore")
        maps = getattr(probe(model, output_attentions=True), "attentions", None)
    layers = getattr(model.config, "num_hidden_layers", None)
    if not maps or any(m is None for m in maps) or (layers is not None and len(maps) != layers):
        return None
    return tuple(maps)


def _no_attentions(model: PreTrainedModel) -> str:
    return (
        f"{type(model).__name__} with attn_implementation={model.config._attn_implementation!r} gives no attention "
        'probabilities. Load it with attn_implementation="eager" if it has that, or leave AttentionKD out. Of '
        "encoder-decoders this release distils the logits alone: LogitKD()."
    )


def layer_map(
    layers: Mapping[int, int] | str | None, student: PreTrainedModel, student_layers: int, teacher_layers: int
) -> dict[int, int]:
    """Resolves what a user said of layers into `{student layer: teacher layer}`, numbered from 1.

    Args:
        layers (`dict` or `str`, *optional*): the map itself; `"uniform"` for layer `i` of `S` to `round(i * T / S)` of
            `T`; `None` for the layers the student was copied from, or uniform where that is not recorded.
        student (`PreTrainedModel`): the student, whose configuration may say where its layers came from.
        student_layers (`int`): number of layers of the student.
        teacher_layers (`int`): number of layers of the teacher.

    Raises:
        ValueError: an unknown strategy, an empty map, or a layer out of range (0 stands for the embeddings); or a
            student that drops layers at random while it is trained.
    """
    dropped = getattr(student.config, "layerdrop", 0.0)
    if dropped:
        raise ValueError(
            f"The student drops layers at random in training (config.layerdrop={dropped}), so its layers cannot be "
            "compared with the teacher's one by one. Set student.config.layerdrop = 0."
        )
    if layers is None:
        origin = read_facts(student).get("student", {})
        kept = origin.get("layers", [])
        if len(kept) == student_layers and origin.get("teacher_layers") == teacher_layers:
            return dict(enumerate(kept, start=1))
        layers = "uniform"
    if layers == "uniform":
        return dict(enumerate(evenly_spaced_layers(student_layers, teacher_layers), start=1))
    if isinstance(layers, str):
        raise ValueError(f"layers={layers!r} is no strategy. Use 'uniform' or a dict such as {{1: 2, 2: 4}}.")
    bad = {s: t for s, t in layers.items() if not (0 <= s <= student_layers and 0 <= t <= teacher_layers)}
    if bad or not layers:
        raise ValueError(
            f"layers={layers!r} must map student layers 0 to {student_layers} to teacher layers 0 to {teacher_layers} "
            f"(0 is the embeddings){'; out of range: ' + repr(bad) if bad else ', but is empty'}."
        )
    return dict(layers)
