# SPDX-License-Identifier: Apache-2.0
"""The forward pass of a model: whose it is under a wrapper, what it takes, and in which form it answers."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.utils import ModelOutput

from ..protocols import FakeQuantized

EMBEDDINGS = ("image_embeds", "text_embeds", "audio_embeds", "embeddings")
"""Outputs of models that give a vector for each example, in the place of logits."""
SHIFT = "prepare_decoder_input_ids_from_labels"
"""The method with which most classes make what their decoder reads; Whisper has none."""
TEACHER_PREFIX = "teacher_"
"""Columns that start with it are the teacher's alone: `teacher_input_ids` is fed to it as `input_ids`."""


def base_of(model: Any) -> Any:
    """The Transformers model within a PEFT wrapper, or `model` itself where there is none."""
    peft = sys.modules.get("peft")  # who has a PeftModel has imported it
    return model.get_base_model() if peft is not None and isinstance(model, peft.PeftModel) else model


def body_of(model: nn.Module) -> tuple[str, nn.Module]:
    """Name and module of the pretrained base model under a head; `""` and the model itself where there is none."""
    name = getattr(model, "base_model_prefix", "")
    return (name, getattr(model, name)) if name and hasattr(model, name) else ("", model)


def forward_columns(model: nn.Module) -> set[str]:
    """Names of what the forward pass of `model` takes."""
    return set(inspect.signature(base_of(model).forward).parameters)


def takes(model: nn.Module, name: str) -> bool:
    """Whether the forward pass of `model` can be called with an argument of this name."""
    parameters = inspect.signature(base_of(model).forward).parameters
    return name in parameters or any(p.kind == inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def return_dict_kwargs(model: nn.Module) -> dict[str, Any]:
    """Arguments that make a model return its outputs by name where its configuration asks for tuples."""
    config = base_of(model).config
    tuples = not getattr(config, "return_dict", True) or getattr(config, "torchscript", False)
    return {"return_dict": True} if tuples else {}


def as_output(output: Any) -> Any:
    """The output of a model with its parts as attributes, where a model of the user's own returns a plain dict."""
    return ModelOutput(output) if isinstance(output, Mapping) and not isinstance(output, ModelOutput) else output


def without_gradient(output: Mapping[str, Any], needs: Collection[str]) -> bool:
    """Whether a required output is present, but detached from the graph."""
    for need in ("logits", "hidden_states", "attentions"):
        value = output.get(need) if need in needs or (need == "logits" and "outputs" in needs) else None
        parts = [value] if isinstance(value, torch.Tensor) else [part for part in value or () if part is not None]
        if parts and not any(part.requires_grad for part in parts):
            return True
    return False


def output_kwargs(needs: frozenset[str], indices: Mapping[str, Collection[int] | None]) -> dict[str, Any]:
    """Arguments that make a model return what objectives need: all hidden states, or those of `indices` alone."""
    arguments: dict[str, Any] = {f"output_{name}": True for name in ("hidden_states", "attentions") if name in needs}
    # Transformers 4 has no way to select; delete the condition when it is no longer supported.
    if "hidden_states" in needs and indices["hidden_states"] and int(transformers.__version__.split(".")[0]) >= 5:
        arguments["output_hidden_states"] = sorted(indices["hidden_states"])
    return arguments


def no_logits(output: Mapping[str, Any]) -> bool:
    """Whether an output holds no predictions under any of the names that the heads of Transformers have for them."""
    return all(output.get(name) is None for name in ("logits", "start_logits", *EMBEDDINGS))


def accepts_num_items(model: Any) -> bool:
    """Whether `Trainer` would give a model the number of items in the batch: it says so, or takes any argument."""
    said = getattr(model, "accepts_loss_kwargs", None)
    if said is not None:
        return bool(said)
    parameters = inspect.signature(base_of(model).forward).parameters.values()
    return any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def hide_training_queries(model: nn.Module) -> Any:
    """Lets a detector return those queries alone that it has in evaluation too; the handle undoes it, if there is one.

    In training RT-DETR and its relatives put queries of noised labels before them, which serve their own loss alone, and
    LW-DETR more groups of queries behind them.
    """
    config = base_of(model).config
    if not hasattr(config, "num_denoising") and not hasattr(config, "group_detr"):
        return None

    def cut(module: nn.Module, args: Any, output: Any) -> Any:
        noised = getattr(output, "denoising_meta_values", None)
        first = 0 if noised is None else noised["dn_num_split"][0]
        for name in ("logits", "pred_boxes"):
            if isinstance(output, ModelOutput) and output.get(name) is not None:
                output[name] = output[name][:, first : first + config.num_queries]
        return output

    return base_of(model).register_forward_hook(cut, prepend=True)


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Puts models into eval mode while it lasts; every module then has its former mode again."""
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def hooked(handles: Iterable[Any]) -> Iterator[None]:
    """Takes hooks off at the end, which are given by their handles."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def statistics_kept(model: nn.Module) -> Iterator[None]:
    """Lets every BatchNorm of a model use the batch while it lasts, in training mode, and keep its running statistics."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


@contextlib.contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """Turns the fake quantizers of a model off while it lasts; their ranges do not follow what passes."""
    modules = [m for m in model.modules() if isinstance(m, FakeQuantized) and m.fake_quantize_enabled]
    for module in modules:
        module.fake_quantize_enabled = False
    try:
        yield
    finally:
        for module in modules:
            module.fake_quantize_enabled = True


def decoder_inputs(model: Any, labels: Tensor) -> Tensor:
    """What a decoder reads that is to write `labels`, `(batch, seq)`: a start, and all of them but the last."""
    own = getattr(model, SHIFT, None)
    if own is not None:
        return own(labels=labels)
    start, pad = model.config.decoder_start_token_id, model.config.pad_token_id
    shifted = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == -100, start if pad is None else pad)
