# SPDX-License-Identifier: Apache-2.0
"""What a model is fed: the tensors of a batch by name, their axes that vary, and inputs where there are no data."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..modeling.forwards import EMBEDDINGS, decoder_inputs, forward_columns
from ..modeling.masks import Batch
from ..modeling.tasks import TASKS, decodes
from .defaults import neutral
from .dummies import tokenizer_outputs
from .protocol import PAST

Tensors = dict[str, Tensor]
_TEXT = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "input_values")
# What classes of one's own take after the custom of Transformers, and can do without.
_USUAL = (*_TEXT, "inputs_embeds", "head_mask", "past_key_values", "cache_position", "encoder_outputs", "pixel_values",
          "pixel_mask", "input_features", "self", "interpolate_pos_encoding")  # fmt: skip
FUTURE = "future_values"
# Enough to trace with, and more than one, which is taken for a constant.
_TRACED_ROWS = 3
_IMAGE = {0: "batch_size", 2: "height", 3: "width"}


def model_inputs(model: nn.Module, batch: Batch) -> Tensors:
    """The tensors of a batch that the forward pass takes, on the CPU, without labels; arrays and lists become tensors.

    What a decoder reads is made of the labels, where it is to write them and nothing else says it.

    `ValueError` if one is no array of numbers.
    """
    parameters = inspect.signature(model.forward).parameters.values()
    any_name = all(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    accepted = set(batch) if any_name else forward_columns(model)
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        accepted = accepted - {FUTURE}  # a label, where no decoder reads it
    found = {}
    for name, value in batch.items():
        if name not in accepted or is_label(name) or not isinstance(value, (Tensor, np.ndarray, list, tuple)):
            continue
        try:
            rows = list(value) if isinstance(value, (list, tuple)) else []
            tensor = torch.stack(rows) if rows and isinstance(rows[0], Tensor) else torch.as_tensor(value)
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(
                f"{name} of a batch is no array of numbers: {error}. Pad its rows to one length, or pass the "
                "processing_class= or data_collator= that does."
            ) from error
        found[name] = tensor.detach().cpu().float() if tensor.is_floating_point() else tensor.cpu()
    labels = batch.get("labels")
    if "decoder_input_ids" in accepted and isinstance(labels, (Tensor, np.ndarray)) and _lacks_decoder(model, found):
        found["decoder_input_ids"] = decoder_inputs(model, torch.as_tensor(labels).cpu())
    return found


def _lacks_decoder(model: Any, found: Tensors) -> bool:
    """Whether a model that writes a text after another input is not told what its decoder reads."""
    given = found.keys() & {"decoder_input_ids", "decoder_inputs_embeds"}
    return not given and decodes(model)


def is_label(name: str) -> bool:
    """Whether an argument of a forward pass is what a loss is computed with."""
    return name.endswith(("label", "labels", "label_ids")) or name in ("start_positions", "end_positions")


def is_own(model: nn.Module) -> bool:
    """Whether the forward pass of a model is none of Transformers."""
    return not str(getattr(type(model).forward, "__module__", "")).startswith("transformers.")


def own_inputs(model: nn.Module) -> dict[str, inspect.Parameter]:
    """Arguments that the forward pass of a class of one's own takes for tensors, beyond those of its base in Transformers."""
    if not is_own(model):
        return {}
    theirs = [cls for cls in type(model).__mro__ if cls.__module__.startswith("transformers.models.")]
    passes = [vars(cls)["forward"] for cls in theirs if "forward" in vars(cls)]
    known = {*_USUAL, *(name for call in passes for name in inspect.signature(call).parameters)}
    ours = {
        name: parameter
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        and not (name in known or is_label(name) or name.startswith(("output_", "return_", "use_", "decoder_")))
    }
    return {name: one for name, one in ours.items() if one.default in (None, inspect.Parameter.empty)}


def brought_names(model: nn.Module, processing_class: Any) -> list[str]:
    """The inputs of `model` that its tokenizer or processor makes."""
    names = list(getattr(processing_class, "model_input_names", None) or ())
    extractor = getattr(processing_class, "feature_extractor", processing_class)
    if getattr(extractor, "return_attention_mask", True) is False and "input_ids" not in names:
        names = [name for name in names if name != "attention_mask"]
    accepted = forward_columns(model)
    return [name for name in names if name in accepted]


def with_inputs(processing_class: Any, names: Iterable[str]) -> Any:
    """The same, or a copy of a tokenizer that makes `token_type_ids` too, where they are among the named inputs of a file."""
    made = getattr(processing_class, "model_input_names", None)
    missing = isinstance(processing_class, PreTrainedTokenizerBase) and "token_type_ids" in {*names} - {*(made or ())}
    if not missing:
        return processing_class
    copied = copy.copy(processing_class)
    copied.model_input_names = [*(made or ()), "token_type_ids"]
    copied.init_kwargs = {**processing_class.init_kwargs, "model_input_names": copied.model_input_names}
    return copied


def usual_names(model: nn.Module) -> list[str]:
    """The inputs that a file has even where no data bring them, as the tokenizer of such a model does."""
    accepted = forward_columns(model)
    return [name for name in tokenizer_outputs(model) if name in accepted] if "input_ids" in accepted else []


def completed(batch: Tensors, names: Iterable[str]) -> Tensors:
    """A batch with those of the named inputs that it lacks and for which there is a value that says nothing."""
    arrays = {name: value.numpy() for name, value in batch.items()}
    values = {name: neutral(name, arrays) for name in names if name not in batch}
    return {**batch, **{name: torch.from_numpy(value.copy()) for name, value in values.items() if value is not None}}


def made_up(model: nn.Module, batches: Sequence[Tensors], names: Sequence[str]) -> list[Tensors]:
    """Random batches made valid, with all of the named inputs: no padding inside, an end token last, masks that hide.

    `ValueError` if the model takes an input of its own that cannot be made up.
    """
    own, config = own_inputs(model), getattr(model, "config", None)
    if (getattr(config, "type_vocab_size", None) or 0) > 1 and "token_type_ids" in forward_columns(model):
        names = [*names, "token_type_ids"]
    found = []
    for batch in batches:
        full = completed(batch, names)
        all_seen = completed({k: v for k, v in batch.items() if k != "attention_mask"}, ["attention_mask"])
        hides = all_seen.get("attention_mask")
        masks = [name for name in own if name.endswith("mask") and name not in full and hides is not None]
        extra = {} if hides is None else dict.fromkeys(masks, hides)
        found.append(_valid(config, {**full, **extra}, list(batch)))
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = [one for one in inspect.signature(model.forward).parameters.values() if one.kind not in kinds]
    required = [one.name for one in parameters if one.default is one.empty and not is_label(one.name)]
    missing = [name for name in [*own, *required] if any(name not in batch for batch in found)]
    if missing:
        raise ValueError(
            f"{type(model).__name__} takes {', '.join(dict.fromkeys(missing))}, for which there is nothing to export it with. Pass a batch "
            "of what it takes as inputs=, or calibration=."
        )
    return found


def _valid(config: Any, batch: Tensors, random: Sequence[str]) -> Tensors:
    """A batch of random inputs as data would be; those beyond `random` say nothing yet."""
    batch = {name: value.clone() for name, value in batch.items()}
    for name in set(batch) - set(random):
        if name.endswith("mask"):  # the last example is shorter than the others
            batch[name][-1, ..., (batch[name].shape[-1] + 1) // 2 :] = 0
        elif name == "token_type_ids" and (getattr(config, "type_vocab_size", None) or 0) > 1:
            batch[name][..., batch[name].shape[-1] // 2 :] = 1
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    pad, end = (_token(config, text, name) for name in ("pad_token_id", "eos_token_id"))
    vocabulary = getattr(text, "vocab_size", None)
    for name in ("input_ids", "decoder_input_ids"):
        if name not in batch or not isinstance(vocabulary, int):
            continue
        ids = batch[name]
        usable = next((token for token in range(vocabulary - 1, 0, -1) if token not in (pad, end)), 0)
        for special in (pad, end):
            if special is not None:
                ids[ids == special] = usable
        mask = batch.get("attention_mask") if name == "input_ids" else None
        mask = torch.ones_like(ids) if mask is None or mask.shape != ids.shape else mask
        if end is not None and end != pad and end < vocabulary and name == "input_ids":
            ids.scatter_(-1, (mask.sum(-1, keepdim=True) - 1).clamp(min=0), end)
        ids[mask == 0] = pad if pad is not None and pad < vocabulary else 0
    return batch


def _token(config: Any, text: Any, name: str) -> int | None:
    value = getattr(config, name, None)
    value = getattr(text, name, None) if value is None else value
    value = value[0] if isinstance(value, (list, tuple)) and value else value
    return value if isinstance(value, int) and value >= 0 else None


def beside_tokens(batch: Mapping[str, Tensor]) -> list[str]:
    """What a batch has for each token of a text beside its id, mask and position, as its type."""
    ids = batch.get("input_ids")
    own = ("input_ids", "attention_mask", "position_ids")
    return [] if ids is None else [name for name, one in batch.items() if name not in own and one.shape == ids.shape]


def to_trace(batches: Sequence[Tensors]) -> Tensors:
    """The batch that a model is traced with: several rows, so that their number is not taken for a constant."""
    batch = max(batches, key=lambda one: min(len(next(iter(one.values()))), 2))
    rows = len(next(iter(batch.values())))
    return {
        name: torch.cat([value, value]) if rows == 1 else value[:_TRACED_ROWS] if len(value) == rows else value
        for name, value in batch.items()
    }


def axes_of(name: str, batches: Sequence[Tensors], task: str, any_size: bool) -> dict[int, str]:
    """The axes that vary of an input, or of an output that no batch has, and their names."""
    choices = {1: "num_choices"} if task == "multiple-choice" else {}
    if name.startswith("pixel_") and any_size:
        return {0: "batch_size", 1: "height", 2: "width"} if name == "pixel_mask" else _IMAGE
    if name == "decoder_input_ids":
        return {0: "batch_size", 1: "decoder_sequence_length"}
    if name in _TEXT:
        return {0: "batch_size", **choices, len(choices) + 1: "sequence_length"}
    values = [batch[name] for batch in batches if name in batch]
    if not values or values[0].ndim == 0:
        return {0: "batch_size", **choices}
    vary = {axis: f"{name}_{axis}" for axis in range(1, values[0].ndim) if len({v.shape[axis] for v in values}) > 1}
    lengths = [{batch[text].shape[-1] for text in _TEXT if text in batch} for batch in batches if name in batch]
    as_long = {
        axis: "sequence_length"
        for axis in range(1, values[0].ndim)
        if all(value.shape[axis] in known for value, known in zip(values, lengths, strict=True))
    }
    return {0: "batch_size", **vary, **as_long}


def generates(model: nn.Module, task: str) -> bool:
    """Whether the files are parts of a model that generates, and not the model as it is called."""
    text = task.removesuffix(PAST) in ("text2text-generation", "automatic-speech-recognition")
    return task.endswith(PAST) or (text and bool(getattr(model.config, "is_encoder_decoder", False)))


def takes_any_size(model: nn.Module, task: str) -> bool:
    """Whether images may have any height and width: convolutions do not mind, tables of positions do."""
    return task == "object-detection" or not any("Attention" in type(module).__name__ for module in model.modules())


def file_outputs(model: nn.Module, output: Any, task: str) -> Tensors:
    """The tensors of what a model returned that its file has: those of the task, or all of a forward pass of one's own."""
    if not isinstance(output, Mapping):
        raise TypeError(
            f"{type(model).__name__} returns a {type(output).__name__}. To be exported a model returns its outputs by name, as "
            'a dictionary such as {"logits": logits} does.'
        )
    tensors = {name: value for name, value in output.items() if isinstance(value, Tensor) and name != "loss"}
    wanted: tuple[str, ...] = next((known.outputs for known in TASKS if known.name == task.removesuffix(PAST)), ())
    if "last_hidden_state" in wanted and "last_hidden_state" in tensors:
        wanted += EMBEDDINGS  # which a tower with a projection (CLIP's) is for
    chosen = {name: value for name, value in tensors.items() if name in wanted}
    return tensors if is_own(model) or not chosen else chosen
