# SPDX-License-Identifier: Apache-2.0
"""Names and shapes of the outputs of a model, found by running it once. Its Python signature does not tell:
Transformers 5 takes `output_hidden_states` through `**kwargs`, and attention implementations silently return
nothing."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from ..modeling.examples import is_given, probe
from ..modeling.forwards import base_of, takes
from ..modeling.tasks import class_names, is_listed


class ModelSignature:
    """Name of the class, configuration and shapes of the outputs of a model, without the `model` where they were written
    down; it is run once for every output that is asked of. `shapes` has by the name of an output its shape for a batch,
    or for `"hidden_states"` and `"attentions"` a list of them; `temperature` is that of outputs that were cached as
    their likeliest classes."""

    def __init__(
        self, model_class: str, config: Any, shapes: Mapping[str, Any] | None = None, model: Any = None,
        temperature: float | None = None,
    ) -> None:  # fmt: skip
        self.model_class, self.config, self.temperature = model_class, config, temperature
        self._shapes, self._model = dict(shapes or {}), model

    @property
    def names(self) -> tuple[str, ...]:
        """The name of its class and, where there is a model, of those that this inherits from."""
        return (self.model_class,) if self._model is None else tuple(class_names(base_of(self._model)))

    @property
    def is_apart(self) -> bool:
        """Whether its shapes were written down for another batch than the one that models are tried on now."""
        return self._model is None and is_given()

    def is_listed(self, *tables: str) -> bool:
        """Whether Transformers lists one of its classes in one of its tables, such as `"CTC"`."""
        return any(is_listed(name, *tables) for name in self.names)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of the output `name` for the batch that it was tried on; `None` where the model gives no such tensor."""
        if name not in self._shapes and self._model is not None:
            output = probe(self._model)
            output = output if isinstance(output, Mapping) else {"logits": getattr(output, "logits", None)}
            self._shapes.update({k: tuple(v.shape) for k, v in output.items() if isinstance(v, torch.Tensor)})
        shape = self._shapes.get(name)
        return None if shape is None else tuple(shape)

    def states(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the embeddings and of the output of every layer. Raises `ValueError`: the model returns none, or
        they were not written down."""
        if "hidden_states" not in self._shapes and self._model is not None:
            is_asked = takes(self._model, "output_hidden_states")
            states = getattr(probe(self._model, output_hidden_states=True), "hidden_states", None) if is_asked else ()
            self._shapes["hidden_states"] = [tuple(state.shape) for state in states or ()]
        states = self._shapes.get("hidden_states")
        if not states:
            raise ValueError(
                f"{self.model_class} returns no hidden states under that name, so they cannot be compared. A model of your own "
                "returns them as hidden_states where its forward pass is called with output_hidden_states=True. Of "
                "encoder-decoders this release distils the logits alone: LogitKD(). Cached outputs hold them if "
                "cache_teacher_outputs was asked to: hidden_states=[layers]."
            )
        return tuple(tuple(state) for state in states)

    def maps(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the attention probabilities of every layer, after a switch to eager attention if needed. Raises
        `ValueError`: the model returns none, with eager attention neither; or there is no model to run."""
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
        is_asked = takes(model, "output_attentions")
        maps = getattr(probe(model, output_attentions=True), "attentions", None) if is_asked else None
    layers = getattr(model.config, "num_hidden_layers", None)
    if not maps or any(m is None for m in maps) or (layers is not None and len(maps) != layers):
        return None
    return tuple(maps)
