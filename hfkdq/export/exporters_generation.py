# SPDX-License-Identifier: Apache-2.0
"""The parts that a generating model is exported as, with their caches as tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutput

from .inputs import beside_tokens
from .protocol import PAST
from .runner import DECODER, DECODER_WITH_PAST, ENCODER, ENCODER_MASK, SINGLE

# Of the traced inputs: several tokens after several others, so that neither number is taken for a constant.
_PAST_LENGTH, _LENGTH = 5, 3
Entry = dict[str, Tensor]


@dataclass(frozen=True)
class Part:
    """One file: its name without ending, the owner of its weights, the function that is traced, and its inputs."""

    name: str
    model: nn.Module
    forward: Callable[..., Any]
    inputs: dict[str, Any]


@torch.no_grad()
def generation_parts(model: PreTrainedModel, batch: Mapping[str, Tensor], task: str) -> list[Part]:
    """The files of a task that generates: a decoder with its cache, or an encoder and its decoder without and with one."""
    if not model.config.is_encoder_decoder:
        return [_decoder(model, batch)]
    encoder = model.get_encoder()  # type: ignore[operator]
    given = {name: value for name, value in batch.items() if not name.startswith("decoder_")}
    accepted = inspect.signature(encoder.forward).parameters
    given = {name: value for name, value in given.items() if name in accepted}
    encode = encoder.forward

    def encoded(**inputs: Tensor) -> Entry:
        output = encode(**inputs)
        own = {} if output.get("attention_mask") is None else {ENCODER_MASK: output.attention_mask}
        return {"last_hidden_state": output.last_hidden_state, **own}

    states = encoded(**given)
    mask = states.get(ENCODER_MASK, given.get("attention_mask"))
    shared = {} if mask is None else {ENCODER_MASK: mask}
    ids = batch["decoder_input_ids"]
    first = {"input_ids": ids, **shared, "encoder_hidden_states": states["last_hidden_state"]}
    parts = [
        Part(ENCODER, encoder, encoded, given),
        Part(DECODER, model, _starting(model, caches=task.endswith(PAST)), first),
    ]
    if task.endswith(PAST):
        present = parts[1].forward(**{**first, "input_ids": ids[:, :1].expand(-1, _PAST_LENGTH)})["present"]
        later = {"input_ids": ids[:, :_LENGTH], **shared, "past_key_values": present}
        parts.append(Part(DECODER_WITH_PAST, model, _continuing(model), later))
    return parts


def _decoder(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Part:
    """A decoder by itself, whose cache may be empty: one file for the prompt and for what follows."""
    call = model.forward

    def forward(past_key_values: list[Entry], **inputs: Tensor) -> dict[str, Any]:
        outputs = call(**inputs, past_key_values=_filled(past_key_values), use_cache=True)
        return {"logits": outputs.logits, "present": _tensors(outputs.past_key_values)}

    ids, mask = batch["input_ids"], batch["attention_mask"]
    seen = mask[:, :1].expand(-1, _PAST_LENGTH + _LENGTH)
    inputs: dict[str, Any] = {"input_ids": ids[:, :_LENGTH], "attention_mask": seen}
    if "position_ids" in inspect.signature(call).parameters:
        inputs["position_ids"] = torch.arange(_PAST_LENGTH, _PAST_LENGTH + _LENGTH).repeat(len(ids), 1)
    for name in beside_tokens(batch):
        inputs[name] = batch[name][:, :1].expand(-1, _LENGTH)
    # Of its own accord a layer with a sliding window would forget some; the mask hides them, however long the cache.
    outputs = call(input_ids=ids[:, :1].expand(-1, _PAST_LENGTH), past_key_values=DynamicCache(), use_cache=True)
    inputs["past_key_values"] = _tensors(outputs.past_key_values)
    return Part(SINGLE, model, forward, inputs)


def _starting(model: PreTrainedModel, caches: bool) -> Callable[..., Any]:
    """The decoder of an encoder-decoder on its first tokens."""
    call = model.forward

    def forward(
        input_ids: Tensor, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor | None = None
    ) -> dict[str, Any]:
        given = _encoded(encoder_hidden_states, encoder_attention_mask)
        outputs = call(decoder_input_ids=input_ids, use_cache=caches, **given)
        logits = {"logits": outputs.logits}
        return {**logits, "present": _pairs(outputs.past_key_values)} if caches else logits

    return forward


def _continuing(model: PreTrainedModel) -> Callable[..., Any]:
    """The decoder of an encoder-decoder on later tokens; what it keeps of the encoder does not change."""
    call, width = model.forward, model.get_encoder().config.hidden_size  # type: ignore[operator]

    def forward(
        input_ids: Tensor, past_key_values: list[dict[str, Entry]], encoder_attention_mask: Tensor | None = None
    ) -> dict[str, Any]:
        own = _filled([entry["decoder"] for entry in past_key_values])
        crossed = _filled([entry["encoder"] for entry in past_key_values])
        keys = past_key_values[0]["encoder"]["key"]
        # Only their number is looked at: their keys and values are in the cache.
        given = _encoded(keys.new_zeros(keys.shape[0], keys.shape[2], width), encoder_attention_mask)
        cache = EncoderDecoderCache(own, crossed)
        outputs = call(decoder_input_ids=input_ids, past_key_values=cache, use_cache=True, **given)
        present = [{"decoder": entry["decoder"]} for entry in _pairs(outputs.past_key_values)]
        return {"logits": outputs.logits, "present": present}

    return forward


def _encoded(states: Tensor, mask: Tensor | None) -> dict[str, Any]:
    """What a decoder is given of its encoder; some models look for the mask in the one place, some in the other."""
    encoded = BaseModelOutput(last_hidden_state=states)  # type: ignore[arg-type]
    encoded.attention_mask = mask
    return {"encoder_outputs": encoded, **({} if mask is None else {"attention_mask": mask})}


def _filled(entries: list[Entry]) -> DynamicCache:
    """A cache that holds these tensors, without the concatenation that adding them would trace."""
    cache = DynamicCache()
    for entry in entries:
        layer = DynamicLayer()
        layer.lazy_initialization(entry["key"], entry["value"])  # type: ignore[call-arg]
        layer.keys, layer.values = entry["key"], entry["value"]
        cache.layers.append(layer)
    return cache


def _tensors(cache: Any) -> list[Entry]:
    return [{"key": layer.keys, "value": layer.values} for layer in cache.layers]


def _pairs(cache: Any) -> list[dict[str, Entry]]:
    both = zip(_tensors(cache.self_attention_cache), _tensors(cache.cross_attention_cache), strict=True)
    return [{"decoder": own, "encoder": crossed} for own, crossed in both]


def part_axes(name: str, part: str) -> Mapping[int, str]:
    """The axes that vary of an input or output of a part, under Optimum's names."""
    encoded = "encoder_sequence_length"
    own, past = ("sequence_length", "past_sequence_length")
    if part in (DECODER, DECODER_WITH_PAST):
        own, past = "decoder_sequence_length", "past_decoder_sequence_length"
    if name.startswith(("past_key_values", "present")):
        grown = own if part == DECODER else f"{past} + {own}"
        length = encoded if ".encoder." in name else past if name.startswith("past") else grown
        return {0: "batch_size", 2: length}
    if name == "input_features":
        return {0: "batch_size"}
    if part == ENCODER or name.startswith("encoder_"):
        return {0: "batch_size", 1: encoded}
    if name == "attention_mask" and part == SINGLE:
        return {0: "batch_size", 1: f"{past} + {own}"}
    return {0: "batch_size", 1: own}
