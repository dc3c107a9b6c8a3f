# SPDX-License-Identifier: Apache-2.0
"""Corrections of post-training quantization: smoothed inputs and corrected biases."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from .layers import QuantizedConv1D, QuantizedEmbedding, QuantizedLinear
from .naming import quantized_modules
from .quantized_module import QuantizedModule
from .records import set_enabled_

Run = Callable[[], Iterable[None]]
_Smoothable = QuantizedLinear | QuantizedConv1D


@contextmanager
def _hooked(modules: Iterable[nn.Module], hook: Callable[[Any, Any, Any], None], model: nn.Module) -> Iterator[None]:
    """While it lasts, the model computes in floating point and every module reports its input and output."""
    handles = [module.register_forward_hook(hook) for module in modules]
    set_enabled_(model, False)
    try:
        yield
    finally:
        set_enabled_(model, True)
        for handle in handles:
            handle.remove()


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
    names = {
        module: name
        for name, module in quantized.items()
        if isinstance(module, _Smoothable) and module.activation_quantizer and id(module.weight) not in tables
    }
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
    r"""Adds to every bias what quantization takes from the mean output of its channel, in place. \\(b \leftarrow b +
    E[W x + b] - E[\hat W \hat x + b]\\) over the calibration data, x the input in the model in floating point, so that
    no layer corrects the error of another (Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
    Correction", 2019, with means that are measured). Layers without a bias are left alone. `model` is a prepared one
    with ranges, in eval mode. Returns the number of biases that were corrected."""
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
