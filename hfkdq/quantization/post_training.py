# SPDX-License-Identifier: Apache-2.0
"""Quantization without training, and loading a quantized model back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..modeling import load_checkpoint, load_config
from ..modeling.batches import Batches, make_batches, on_device
from ..modeling.forwards import evaluating
from ..modeling.own_modules import as_pretrained_, own_class
from ..specs import QuantizationSpec
from .convert import prepare_qat_, strip_quantizers_
from .corrections import correct_biases_, smooth_
from .naming import spec_of_former
from .ranges import learned_parameters
from .records import (
    activation_quantizers,
    activation_ranges,
    quantized_spec,
    record_ranges,
    recorded_quantization,
    restore_record_,
    warn_of_other_weights,
)

logger = logging.get_logger(__name__)


def quantize(
    model: PreTrainedModel,
    spec: QuantizationSpec,
    calibration: Batches | Dataset | None = None,
    *,
    batch_size: int = 8,
    data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
    processing_class: Any = None,
    smoothing: float | None = None,
    bias_correction: bool = False,
) -> PreTrainedModel:
    """Quantizes a trained model in place: fake quantizers, with the ranges that calibration data shows.

    Args:
        model (`PreTrainedModel`): the model to change; its weights stay what they are.
        spec (`QuantizationSpec`): what to quantize, and how.
        calibration (iterable of `dict` or `datasets.Dataset`, *optional*): batches of model inputs, or examples to make
            them from. Needed unless `spec.activation_bits` is `None`; some hundred examples are usual.
        batch_size (`int`, defaults to 8): examples in a batch, for a `Dataset`.
        data_collator (`Callable`, *optional*): makes a batch of examples, for a `Dataset`.
        processing_class (*optional*): a tokenizer that pads, for a `Dataset` without a `data_collator`.
        smoothing (`float`, *optional*): strength in [0, 1] with which large activations are moved into the weights of
            linear layers, as SmoothQuant does; 0.5 is usual. See [`smooth_`].
        bias_correction (`bool`, defaults to `False`): add to the biases what quantization takes from the mean of each
            output. The one thing that changes parameters of the model. See [`correct_biases_`].

    Returns:
        `PreTrainedModel`: the same model, in the mode it came in.

    Raises:
        ValueError: calibration data that are missing, empty or not finite, an estimator that learns, which needs
            training, or a model that already has fake quantizers. The model is left as it was.

    Example:
        ```python
        from hfkdq import QuantizationSpec, quantize

        quantize(model, QuantizationSpec(), train.select(range(256)), processing_class=tokenizer)
        model.save_pretrained("int8")
        ```
    """
    if quantized_spec(as_pretrained_(model)) is not None:
        raise ValueError(
            f"{type(model).__name__} already has fake quantizers. Remove them first with strip_quantizers_(model)."
        )
    if smoothing is not None and not 0.0 <= smoothing <= 1.0:
        raise ValueError(f"smoothing must be in [0, 1], got {smoothing!r}. SmoothQuant uses 0.5.")
    prepare_qat_(model, spec)
    try:
        if learned_parameters(model):
            raise ValueError(
                "The spec has learned ranges or scales, which come from a loss, and there is no training here. Use 'moving_average', "
                "'min_max', 'percentile' or 'mse', or train with QATCallback."
            )
        if activation_quantizers(model) or smoothing is not None or bias_correction:
            _use_data(model, calibration, (batch_size, data_collator, processing_class), smoothing, bias_correction)
    except BaseException:
        strip_quantizers_(model)
        raise
    record_ranges(model)
    unseen = [name for name, quantizer in activation_quantizers(model).items() if not quantizer.initialized]
    if unseen:
        logger.warning(
            f"No calibration data reached the inputs of {len(unseen)} modules, such as {', '.join(unseen[:3])}: they stay in "
            "floating point. Calibrate with more data, or name the modules in exclude_modules."
        )
    return model


def _use_data(model: PreTrainedModel, calibration: Any, how: Any, smoothing: float | None, corrects: bool) -> None:
    """Everything that looks at the calibration data, one pass after the other."""
    if calibration is None:
        raise ValueError(
            "Quantized activations, smoothing and bias correction need calibration data: batches of model inputs or a "
            "datasets.Dataset."
        )
    batches = make_batches(model, calibration, *how)
    if not isinstance(calibration, Dataset) and (smoothing is not None or corrects):
        batches = list(batches)  # read several times
    with evaluating(model):
        if smoothing is not None:
            smooth_(model, lambda: _run(model, batches, "Smoothing"), smoothing)
        for quantizer in activation_quantizers(model).values():
            quantizer.train()  # the quantizers observe, all else stays in eval mode
        for _ in _run(model, batches, "Calibrating"):
            pass
        for quantizer in activation_quantizers(model).values():
            quantizer.eval()
        _check_ranges(model)
        if corrects:
            correct_biases_(model, lambda: _run(model, batches, "Correcting biases"))


def _run(model: PreTrainedModel, batches: Batches, what: str) -> Iterator[None]:
    """Runs the model over all batches, a step for each."""
    for batch in on_device(model, batches, what):
        with torch.no_grad():
            model(**batch)
        yield


def _check_ranges(model: PreTrainedModel) -> None:
    try:
        activation_ranges(model)
    except RuntimeError as error:
        raise ValueError(f"The model does not stay finite on the calibration data. {error}") from error


def load_quantized(
    path: str, model: nn.Module | type[PreTrainedModel] | None = None, **kwargs: Any
) -> PreTrainedModel:
    """Loads a checkpoint together with the fake quantizers that its configuration records.

    The same logits as the model that was saved, bit for bit; `from_pretrained` loads the same weights without them.

    Args:
        path (`str`): a folder that `save_pretrained` or a Trainer wrote, or a model id on the Hub.
        model (`PreTrainedModel` or its class, or `nn.Module`, *optional*): a class of your own, or a model of it, that is
            not registered with an Auto class. A model stays as it is; another of its class is returned.
        kwargs (*optional*): passed to `from_pretrained`; `dtype` is that of the file by default.

    Returns:
        `PreTrainedModel`: the quantized model, in eval mode.

    Raises:
        TypeError: `model` is neither.
        ValueError: the configuration records no quantization, or names no class of Transformers.

    Example:
        ```python
        from hfkdq import load_quantized

        model = load_quantized("out/checkpoint-500")
        ```
    """
    own = own_class(model)
    config = load_config(path, None if own is None else own.config_class, **kwargs)
    recorded = recorded_quantization(config)
    if recorded is None:
        raise ValueError(
            f"The configuration of {path} records no quantization by hfkdq. Load it with from_pretrained, and "
            "quantize it with quantize(model, spec, calibration)."
        )
    loaded = load_checkpoint(path, config, own, **{"dtype": "auto", **kwargs})
    spec, record = recorded
    warn_of_other_weights(loaded, record)
    return restore_record_(prepare_qat_(loaded, spec_of_former(loaded, spec, record)), record).eval()
