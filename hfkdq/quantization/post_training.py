# SPDX-License-Identifier: Apache-2.0
"""Quantization without training, with smoothed inputs and corrected biases, and loading a quantized model back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..modeling import load_checkpoint, load_config
from ..modeling.batches import Batches, make_batches, on_device
from ..modeling.forwards import evaluating, hooked
from ..modeling.own_modules import as_pretrained_, own_class
from ..modeling.placement import refuse_sharded
from ..specs import QuantizationSpec
from . import records
from .convert import prepare_qat_, strip_quantizers_
from .layers import QuantizedConv1D, QuantizedEmbedding, QuantizedLinear
from .naming import quantized_modules, spec_of_former
from .quantized_module import QuantizedModule
from .schedule import learned_parameters

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
    refuse_sharded(model)
    if records.quantized_spec(as_pretrained_(model)) is not None:
        name = type(model).__name__
        raise ValueError(f"{name} already has fake quantizers. Remove them first with strip_quantizers_(model).")
    if smoothing is not None and not 0.0 <= smoothing <= 1.0:
        raise ValueError(f"smoothing must be in [0, 1], got {smoothing!r}. SmoothQuant uses 0.5.")
    prepare_qat_(model, spec)
    try:
        if learned_parameters(model):
            raise ValueError(
                "The spec has learned ranges or scales, which come from a loss, and there is no training here. Use 'moving_average', "
                "'min_max', 'percentile' or 'mse', or train with QATCallback."
            )
        if records.activation_quantizers(model) or smoothing is not None or bias_correction:
            _use_data(model, calibration, (batch_size, data_collator, processing_class), smoothing, bias_correction)
    except BaseException:
        strip_quantizers_(model)
        raise
    records.record_ranges(model)
    unseen = [name for name, quantizer in records.activation_quantizers(model).items() if not quantizer.initialized]
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
        for quantizer in records.activation_quantizers(model).values():
            quantizer.train()  # the quantizers observe, all else stays in eval mode
        for _ in _run(model, batches, "Calibrating"):
            pass
        for quantizer in records.activation_quantizers(model).values():
            quantizer.eval()
        try:
            records.activation_ranges(model)
        except RuntimeError as error:
            raise ValueError(f"The model does not stay finite on the calibration data. {error}") from error
        if corrects:
            correct_biases_(model, lambda: _run(model, batches, "Correcting biases"))


def _run(model: PreTrainedModel, batches: Batches, what: str) -> Iterator[None]:
    for batch in on_device(model, batches, what):
        with torch.no_grad():
            model(**batch)
        yield


def load_quantized(
    path: str, model: nn.Module | type[PreTrainedModel] | None = None, **kwargs: Any
) -> PreTrainedModel:
    """Loads a checkpoint together with the fake quantizers that its configuration records.

    The same logits as the model that was saved, bit for bit. `from_pretrained` of Transformers gives the same model once
    hfkdq is imported, where it can load such shapes, and without hfkdq the same weights in floating point.

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
    recorded = records.recorded_quantization(config)
    if recorded is None:
        raise ValueError(
            f"The configuration of {path} records no quantization by hfkdq. Load it with from_pretrained, and "
            "quantize it with quantize(model, spec, calibration)."
        )
    return restore_recorded_(load_checkpoint(path, config, own, **{"dtype": "auto", **kwargs}), *recorded)


def restore_recorded_(model: PreTrainedModel, spec: QuantizationSpec, record: dict[str, Any]) -> PreTrainedModel:
    """Gives a freshly loaded model the fake quantizers that [`recorded_quantization`] read, in place."""
    records.warn_of_other_weights(model, record)
    return records.restore_record_(prepare_qat_(model, spec_of_former(model, spec, record)), record).eval()


Run = Callable[[], Iterable[None]]
_Smoothable = QuantizedLinear | QuantizedConv1D


@contextmanager
def _hooked(modules: Iterable[nn.Module], hook: Callable[[Any, Any, Any], None], model: nn.Module) -> Iterator[None]:
    """While it lasts, the model computes in floating point and every module reports its input and output."""
    handles = [module.register_forward_hook(hook) for module in modules]
    records.set_enabled_(model, False)
    try:
        with hooked(handles):
            yield
    finally:
        records.set_enabled_(model, True)


def smooth_(model: nn.Module, run: Run, strength: float) -> int:
    r"""Moves what is hard to quantize from activations to weights, in place. Input feature j of a linear layer is
    divided by \\(s_j = \max|X_j|^\alpha / \max|W_j|^{1 - \alpha}\\), and its weights multiplied, before both are
    quantized (Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
    2023). Layers that share an input share the factors. The division stays with the layer; in the paper it is moved
    into a norm before it, which needs one that nothing else reads, as BERT has not. `model` is a prepared one in eval
    mode, `run` runs it over the calibration data, a step for every batch, and `strength` is alpha, in [0, 1]. Returns
    the number of layers that were smoothed. Raises `ValueError`: a scale of the weights that come out does not fit
    into `storage_dtype`."""
    quantized = quantized_modules(model)
    tables = {id(module.weight) for module in quantized.values() if isinstance(module, QuantizedEmbedding)}
    linear = {module: name for name, module in quantized.items() if isinstance(module, _Smoothable)}
    names = {m: name for m, name in linear.items() if m.activation_quantizer and id(m.weight) not in tables}
    modules = list(names)
    largest: dict[nn.Module, Tensor] = {}
    shared: dict[int, list[_Smoothable]] = {}
    first: dict[int, Tensor] = {}

    def look(module: _Smoothable, args: Any, output: Any) -> None:
        values = args[0].detach().float().abs().reshape(-1, args[0].shape[-1]).amax(dim=0)
        largest[module] = torch.maximum(largest[module], values) if module in largest else values
        if not done and module not in {member for group in shared.values() for member in group}:
            first[id(args[0])] = args[0]  # kept alive, so that its identity is not given away
            shared.setdefault(id(args[0]), []).append(module)

    done = False
    with _hooked(modules, look, model):
        for _ in run():
            done = True
            first.clear()
    for group in shared.values():
        outputs = [1 if isinstance(module, QuantizedConv1D) else 0 for module in group]
        sizes = [m.weight.detach().float().abs().amax(dim=dim) for m, dim in zip(group, outputs, strict=True)]
        weights = torch.stack(sizes).amax(dim=0)
        inputs = torch.stack([largest[module] for module in group]).amax(dim=0)
        factors = inputs.pow(strength) / weights.pow(1.0 - strength)
        # A feature that is never used, or never weighted, has nothing to move.
        usable = (inputs > 0) & (weights > 0) & factors.isfinite()
        for module in group:
            module.smoothing.factors = torch.where(usable, factors.clamp(min=1e-5), 1.0)
            module.weight_quantizer.start_codebook(module.effective_weight())
            module.weight_quantizer.check_storage(module.effective_weight(), names[module])
    return sum(map(len, shared.values()))


def correct_biases_(model: nn.Module, run: Run) -> int:
    r"""Adds to every bias what quantization takes from the mean output of its channel, in place.

    \\(b \leftarrow b + E[W x + b] - E[\hat W \hat x + b]\\) over the calibration data, x the input in the model in
    floating point, so that no layer corrects the error of another (Nagel et al., "Data-Free Quantization Through Weight
    Equalization and Bias Correction", 2019, with means that are measured). Layers without a bias are left alone.

    `model` is a prepared one with ranges, in eval mode. Returns the number of biases that were corrected.
    """
    modules = [m for m in quantized_modules(model).values() if isinstance(getattr(m, "bias", None), Tensor)]
    missing: dict[QuantizedModule, Tensor] = {}
    counts: dict[QuantizedModule, int] = {}

    def look(module: QuantizedModule, args: Any, output: Tensor) -> None:
        module.fake_quantize_enabled = True
        try:
            quantized = type(module).forward(module, *args)
        finally:
            module.fake_quantize_enabled = False
        error = (output - quantized).double()
        channels = (error.movedim(1, -1) if isinstance(module, (nn.Conv1d, nn.Conv2d)) else error).flatten(0, -2)
        missing[module] = missing.get(module, torch.zeros(())) + channels.sum(dim=0)
        counts[module] = counts.get(module, 0) + len(channels)

    with torch.no_grad(), _hooked(modules, look, model):
        for _ in run():
            pass
    with torch.no_grad():
        for module, total in missing.items():
            bias = cast(Tensor, module.bias)
            bias.add_((total / counts[module]).to(bias.dtype))
    return len(missing)
