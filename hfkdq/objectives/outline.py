# SPDX-License-Identifier: Apache-2.0
"""What a model really returns, found by trying it on one small example.

Signatures do not tell: Transformers 5 takes `output_hidden_states` through `**kwargs`, and attention
implementations silently return nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..facts import read_facts
from ..modeling import evenly_spaced_layers, find_layer_stack
from ..modeling.forwards import as_output, base_of, return_dict_kwargs
from ..protocols import Bypassable


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
            return as_output(model(**_example(model), **return_dict_kwargs(model), **request))
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


class Outline:
    """Class, configuration and shapes of the outputs of a model, without the model where they were written down.

    Args:
        model_class (`str`): name of the model's class.
        config (`PretrainedConfig`): its configuration.
        shapes (`dict`, *optional*): by the name of an output, its shape for one example, or for `"hidden_states"` and
            `"attentions"` a list of them.
        model (`PreTrainedModel`, *optional*): the model, which is run once for every output that is asked of.
        temperature (`float`, *optional*): of the outputs that were cached as their likeliest classes, at which they
            were.
    """

    def __init__(
        self,
        model_class: str,
        config: Any,
        shapes: Mapping[str, Any] | None = None,
        model: Any = None,
        temperature: float | None = None,
    ) -> None:
        self.model_class, self.config, self.temperature = model_class, config, temperature
        self._shapes, self._model = dict(shapes or {}), model

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of the output `name` for one example; `None` where the model gives no such tensor."""
        if name not in self._shapes and self._model is not None:
            output = probe(self._model)
            output = output if isinstance(output, Mapping) else {"logits": getattr(output, "logits", None)}
            self._shapes.update({k: tuple(v.shape) for k, v in output.items() if isinstance(v, torch.Tensor)})
        shape = self._shapes.get(name)
        return None if shape is None else tuple(shape)

    def states(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the embeddings and of the output of every layer.

        Raises:
            ValueError: the model returns none, or they were not written down.
        """
        if "hidden_states" not in self._shapes and self._model is not None:
            states = getattr(probe(self._model, output_hidden_states=True), "hidden_states", None)
            self._shapes["hidden_states"] = [tuple(state.shape) for state in states or ()]
        states = self._shapes.get("hidden_states")
        if not states:
            raise ValueError(
                f"{self.model_class} returns no hidden states under that name, so they cannot be compared. Of "
                "encoder-decoders this release distils the logits alone: LogitKD(). Cached outputs hold them if "
                "cache_teacher_outputs was asked to: hidden_states=[layers]."
            )
        return tuple(tuple(state) for state in states)

    def maps(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the attention probabilities of every layer, after a switch to eager attention if needed.

        Raises:
            ValueError: the model returns none, with eager attention neither; or there is no model to run.
        """
        if self._model is None:
            raise ValueError(
                "Cached outputs hold no attention probabilities, which are as large as the square of a text. Give the "
                "teacher itself, or leave AttentionKD out."
            )
        maps = _attention_maps(self._model)
        if maps is None:
            try:
                self._model.set_attn_implementation("eager")
            except Exception as error:
                raise ValueError(_no_attentions(self._model)) from error
            maps = _attention_maps(self._model)
        if maps is None:
            raise ValueError(_no_attentions(self._model))
        return tuple(tuple(m.shape) for m in maps)

    def to_dict(self) -> dict[str, Any]:
        """Class, configuration and the shapes known so far, ready for JSON."""
        return {"model_class": self.model_class, "config": self.config.to_dict(), "shapes": self._shapes}


def outline_of(model: Any) -> Outline:
    """The outline of a model, or `model` itself where it is one."""
    if isinstance(model, Outline):
        return model
    base = base_of(model)
    return Outline(type(base).__name__, base.config, model=model)


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
        layers (`dict` or `str`, *optional*): the map itself; for layer `i` of `S` to one of `T`, `"uniform"` for
            `round(i * T / S)`, `"last"` for `T - S + i` and `"skip"` for `i * (T // S)`; `None` for the layers the student
            was copied from, or uniform where that is not recorded.
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
    if layers in ("last", "skip") and student_layers > teacher_layers:
        raise ValueError(
            f"layers={layers!r} needs a teacher with as many layers as the student or more; they have {teacher_layers} "
            f"and {student_layers}. Use 'uniform' or a dict."
        )
    if layers == "last":
        return {i: teacher_layers - student_layers + i for i in range(1, student_layers + 1)}
    if layers == "skip":
        return {i: i * (teacher_layers // student_layers) for i in range(1, student_layers + 1)}
    if isinstance(layers, str):
        raise ValueError(
            f"layers={layers!r} is no strategy. Use 'uniform', 'last', 'skip' or a dict such as {{1: 2, 2: 4}}; "
            "HiddenStateKD also takes 'dynamic'."
        )
    bad = {s: t for s, t in layers.items() if not (0 <= s <= student_layers and 0 <= t <= teacher_layers)}
    if bad or not layers:
        raise ValueError(
            f"layers={layers!r} must map student layers 0 to {student_layers} to teacher layers 0 to {teacher_layers} "
            f"(0 is the embeddings){'; out of range: ' + repr(bad) if bad else ', but is empty'}."
        )
    return dict(layers)


def layers_of(student: PreTrainedModel) -> list[nn.Module]:
    """The layers of the student, or none where it is no single stack of them."""
    try:
        return list(find_layer_stack(base_of(student)).layers)
    except ValueError:
        return []


def mean_over_active_layers(values: torch.Tensor, layers: Sequence[nn.Module], numbers: Sequence[int]) -> torch.Tensor:
    """Mean over the first axis, one entry for each student layer of `numbers` (from 1), of layers that are not bypassed.

    Pruning bypasses layers while it trains; their output is that of the layer before, which has an entry of its own.
    Entries that are left out keep a gradient of zero.
    """
    bypassed = {i for i, layer in enumerate(layers, start=1) if isinstance(layer, Bypassable) and layer.bypassed}
    active = [number not in bypassed for number in numbers]
    if all(active):
        return values.mean(0)
    weights = values.new_tensor(active, dtype=values.dtype).view(-1, *[1] * (values.dim() - 1))
    return (values * weights).sum(0) / weights.sum().clamp(min=1.0)
