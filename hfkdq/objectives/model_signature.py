# SPDX-License-Identifier: Apache-2.0
"""Names and shapes of the outputs of a model, found by running it on one small example.

Its Python signature does not tell: Transformers 5 takes `output_hidden_states` through `**kwargs`, and attention
implementations silently return nothing.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from ..modeling.forwards import as_output, base_of, evaluating, return_dict_kwargs


def probe(model: PreTrainedModel, **request: bool) -> Any:
    """The output of `model` in eval mode for a made-up batch of 1; mode, gradients and random state stay as they are.

    `request` may be `output_hidden_states=True` or `output_attentions=True`.

    Raises:
        ValueError: a model that reads neither text, images nor audio.
    """
    with torch.no_grad(), evaluating(model):
        return as_output(model(**_example(model), **return_dict_kwargs(model), **request))


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


class ModelSignature:
    """Class, configuration and shapes of the outputs of a model, without the model where they were written down.

    Args:
        model_class (`str`): name of the model's class.
        config (`PretrainedConfig`): its configuration.
        shapes (`dict`, *optional*): by the name of an output, its shape for one example, or for `"hidden_states"` and
            `"attentions"` a list of them.
        model (`PreTrainedModel`, *optional*): the model, which is run once for every output that is asked of.
        temperature (`float`, *optional*): the temperature of outputs that were cached as their likeliest classes.
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
            with contextlib.suppress(Exception):  # that it has no eager attention is said below
                self._model.set_attn_implementation("eager")
            maps = _attention_maps(self._model)
        if maps is None:
            raise ValueError(
                f"{self.model_class} with attn_implementation={self._model.config._attn_implementation!r} gives no attention "
                'probabilities. Load it with attn_implementation="eager" if it has that, or leave AttentionKD out. Of '
                "encoder-decoders this release distils the logits alone: LogitKD()."
            )
        return tuple(tuple(m.shape) for m in maps)

    def to_dict(self) -> dict[str, Any]:
        """Class, configuration and the shapes known so far, ready for JSON."""
        return {"model_class": self.model_class, "config": self.config.to_dict(), "shapes": self._shapes}


def signature_of(model: Any) -> ModelSignature:
    """The signature of a model, or `model` itself where it is one."""
    if isinstance(model, ModelSignature):
        return model
    base = base_of(model)
    return ModelSignature(type(base).__name__, base.config, model=model)


def _attention_maps(model: PreTrainedModel) -> tuple[torch.Tensor, ...] | None:
    with warnings.catch_warnings():  # That there are none is what is asked here.
        warnings.simplefilter("ignore")
        maps = getattr(probe(model, output_attentions=True), "attentions", None)
    layers = getattr(model.config, "num_hidden_layers", None)
    if not maps or any(m is None for m in maps) or (layers is not None and len(maps) != layers):
        return None
    return tuple(maps)
