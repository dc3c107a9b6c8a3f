# SPDX-License-Identifier: Apache-2.0
"""Runs a model once, to see what it returns: on rows of the user's own, or on an example made up of its configuration."""

from __future__ import annotations

import contextlib
import copy
import random
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.utils import find_labels

from .forwards import TEACHER_PREFIX, as_output, base_of, evaluating, forward_columns, return_dict_kwargs
from .masks import Batch
from .tasks import decodes

_ALONG = {
    "input_ids": ("attention_mask", "token_type_ids", "position_ids"),
    "labels": ("decoder_input_ids", "decoder_attention_mask"),
}


_GIVEN: ContextVar[tuple[Batch, Any] | None] = ContextVar("a batch, and the student that reads it", default=None)


class NoExample(ValueError):
    """There is no batch that a model could be tried on."""


@contextlib.contextmanager
def tried_on(batch: Batch | None, student: Any) -> Iterator[None]:
    """While it lasts, [`probe`] runs models on `batch`, of which `student` reads the columns that are not the teacher's."""
    token = _GIVEN.set(None if batch is None else (batch, base_of(student)))
    try:
        yield
    finally:
        _GIVEN.reset(token)


def is_given() -> bool:
    """Whether models are tried on a batch of the user's own."""
    return _GIVEN.get() is not None


def given_to(model: Any) -> dict[str, Any] | None:
    """What `model` reads of the batch of [`tried_on`], without labels; `None` where there is none."""
    given = _GIVEN.get()
    if given is None:
        return None
    base, (batch, student) = base_of(model), given
    return model_inputs(base, batch, set(find_labels(type(base))), as_teacher=base is not student)


def probe(model: Any, **request: bool) -> Any:
    """The output of `model` in eval mode for the batch of [`tried_on`], or for a made-up one.

    Modules, their modes and the random state are as before, also where the model fails. `request` may be
    `output_hidden_states=True` or `output_attentions=True`.

    Raises:
        NoExample: the model does not run on it.
    """
    base = base_of(model)
    try:
        given = given_to(model)
        return _run(model, _made_up(base) if given is None else given, request)
    except Exception as error:
        raise NoExample(
            f"{type(base).__name__} does not run on {'the batch it is tried on' if is_given() else 'a made-up example'} "
            f"({type(error).__name__}: {error}), so what it returns is not known before training. Give the trainer a batch "
            "that it runs on, as your collator makes it: example_inputs=batch."
        ) from error


def _run(model: Any, inputs: Mapping[str, Any], request: Mapping[str, bool]) -> Any:
    base = base_of(model)
    if not inputs:
        raise ValueError("the batch has none of its inputs")
    # A model that lies on disk has no device; where it runs, hooks move the input.
    device = torch.device("cpu") if base.device.type == "meta" else base.device
    inputs = {
        name: value.to(device, base.dtype if value.is_floating_point() else None) if torch.is_tensor(value) else value
        for name, value in inputs.items()
    }
    # What records the states of layers puts other functions in their place, and leaves them there after an error.
    forwards = {module: vars(module).get("forward") for module in model.modules()}
    try:
        with torch.no_grad(), evaluating(model), random_state_kept():
            return as_output(model(**inputs, **return_dict_kwargs(model), **request))
    finally:
        for module, forward in forwards.items():
            vars(module).pop("forward", None)
            if forward is not None:
                module.forward = forward


def model_inputs(model: Any, batch: Batch, labels: Collection[str], *, as_teacher: bool) -> dict[str, Any]:
    """What the forward pass of a model takes of a batch, but for `labels`; of an encoder-decoder, what its decoder reads.

    A teacher reads columns with its prefix in the place of the student's.
    """
    columns = _columns(model, batch) - set(labels)
    own = {name.removeprefix(TEACHER_PREFIX): v for name, v in batch.items() if name.startswith(TEACHER_PREFIX)}
    own = own if as_teacher else {}
    # What lies along the student's tokens does not along those of a teacher that has its own.
    foreign = {name for text in own.keys() & _ALONG.keys() for name in _ALONG[text]}
    read = {**{name: value for name, value in batch.items() if name not in foreign}, **own}
    inputs = {name: value for name, value in read.items() if name in columns}
    if "use_cache" in columns:
        inputs["use_cache"] = False
    if (
        read.get("labels") is not None
        and not inputs.keys() & {"decoder_input_ids", "decoder_inputs_embeds"}
        and decodes(model)
    ):
        shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        labelled = read["labels"]
        inputs |= {"labels": labelled} if shift is None else {"decoder_input_ids": shift(labels=labelled)}
    return inputs


def _columns(model: Any, batch: Batch) -> set[str]:
    """The inputs of a model; a signature of `**inputs` alone does not tell, and stands for all of the batch."""
    columns = forward_columns(model)
    if model.main_input_name not in columns:
        columns |= {name for name in batch if not name.startswith(TEACHER_PREFIX)}
    return columns


def first_rows(dataset: Any, collate: Callable[[list[Any]], Any], columns: Collection[str] | None) -> Batch | None:
    """A batch of the first rows of a dataset with places; `None` where it has none, or they make no batch.

    Of rows by name the `columns` are kept, or all. Nothing that draws at random is moved on.
    """
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        return None
    with contextlib.suppress(Exception), random_state_kept(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it has to say it says in training
        rows = [dataset[i] for i in range(min(2, len(dataset)))]
        if columns is not None:
            rows = [{k: v for k, v in r.items() if k in columns} if isinstance(r, Mapping) else r for r in rows]
        batch = copy.copy(collate)(rows)
        return batch if isinstance(batch, Mapping) and batch else None
    return None


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """While it lasts, drawing at random leaves the generators of Python, NumPy and PyTorch as they are."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _made_up(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """A batch of 1 for a model of text, images or sound, as its configuration describes them."""
    config, name = model.config, model.main_input_name
    if name == "input_ids":
        ids = torch.full((1, 4), min(3, config.vocab_size - 1))
        if getattr(config, "is_encoder_decoder", False):
            ids[0, -1] = config.eos_token_id or 0  # some sequence classifiers read the state at the end token
            return {"input_ids": ids, "decoder_input_ids": ids}
        return {"input_ids": ids}
    if name == "pixel_values":
        size = getattr(config, "image_size", 224)
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        return {name: torch.zeros(1, config.num_channels, height, width)}
    if name == "input_values" and hasattr(config, "frequency_stride"):  # patches of a spectrum
        return {name: torch.zeros(1, config.max_length, config.num_mel_bins)}
    if name == "input_values":
        return {name: torch.zeros(1, 4000)}
    if name == "input_features" and hasattr(config, "max_source_positions"):
        frames = torch.zeros(1, config.num_mel_bins, 2 * config.max_source_positions)
        decoded = {"decoder_input_ids": torch.zeros(1, 4, dtype=torch.long)}
        return {name: frames, **(decoded if "decoder_input_ids" in forward_columns(model) else {})}
    told = model.dummy_inputs  # where a class describes its own
    if name not in told:
        raise ValueError(f"it takes {name!r}")
    return dict(told)
