# SPDX-License-Identifier: Apache-2.0
"""BatchNorm in quantization-aware training: frozen statistics, and folding into the convolution before."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import PreTrainedModel

from ..modeling.forwards import evaluating, hooked


class _Frozen:
    """A BatchNorm that uses and keeps its running statistics in training too."""

    def train(self, mode: bool = True) -> Any:
        return super().train(False)  # type: ignore[misc]


class FrozenBatchNorm1d(_Frozen, nn.BatchNorm1d):
    """An `nn.BatchNorm1d` whose statistics stay."""


class FrozenBatchNorm2d(_Frozen, nn.BatchNorm2d):
    """An `nn.BatchNorm2d` whose statistics stay."""


_NORMS: dict[type[nn.Module], type[nn.Module]] = {nn.BatchNorm1d: FrozenBatchNorm1d, nn.BatchNorm2d: FrozenBatchNorm2d}


def freeze_batch_norm_(model: nn.Module) -> None:
    """Makes every BatchNorm of `model` use its running statistics from now on, in training too; in place."""
    for module in model.modules():
        if type(module) in _NORMS:
            module.__class__ = _NORMS[type(module)]
            module.train()


def thaw_batch_norm_(model: nn.Module) -> None:
    """Undoes [`freeze_batch_norm_`]."""
    plain = {frozen: norm for norm, frozen in _NORMS.items()}
    for module in model.modules():
        if type(module) in plain:
            module.__class__ = plain[type(module)]
            module.train(model.training)


@torch.no_grad()
def fold_batch_norm_(model: PreTrainedModel, example: dict[str, Tensor] | None = None) -> int:
    r"""Moves every BatchNorm that directly follows a convolution into it, in place, but those that are used twice.

    The weights become \\(w \gamma / \sqrt{\sigma^2 + \epsilon}\\) and the norm adds what is left,
    \\(\beta - \mu \gamma / \sqrt{\sigma^2 + \epsilon}\\); its statistics are then 0 and 1, and stay. The model computes
    the same in eval mode and keeps its parameters and their names, so that its checkpoint is an ordinary one. Training
    sees the weights that are deployed (Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", 2018, section 3.2).

    Args:
        model (`PreTrainedModel`): a model without fake quantizers.
        example (`dict`, *optional*): a batch to run once, which shows what follows what. Black images by default.

    Returns:
        `int`: how many norms were folded.

    Raises:
        ValueError: there is no BatchNorm behind a convolution, or the model needs an `example`.
    """
    pairs = _pairs(model, example)
    for conv, norm in pairs:
        factor = norm.weight / (norm.running_var + norm.eps).sqrt()
        shift = norm.bias - norm.running_mean * factor
        if conv.bias is not None:
            shift = shift + conv.bias * factor
            conv.bias.zero_()
        conv.weight.mul_(factor.reshape(-1, *[1] * (conv.weight.ndim - 1)))
        norm.weight.fill_(1.0).requires_grad_(False)
        norm.bias.copy_(shift)
        norm.running_mean.zero_()
        norm.running_var.fill_(1.0 - norm.eps)
    freeze_batch_norm_(model)
    return len(pairs)


def _pairs(model: PreTrainedModel, example: dict[str, Tensor] | None) -> list[tuple[Any, Any]]:
    """Convolutions and the norms that take their output, each run once, since what is shared cannot be folded."""
    produced: dict[int, tuple[nn.Module, Tensor]] = {}
    pairs: list[tuple[nn.Module, nn.Module]] = []
    runs: Counter[nn.Module] = Counter()

    def after(module: nn.Module, args: Any, output: Tensor) -> None:
        runs[module] += 1
        produced[id(output)] = (module, output)  # kept alive, so that its identity is not given away

    def before(module: nn.Module, args: Any) -> None:
        runs[module] += 1
        found = produced.get(id(args[0])) if args else None
        if found is not None:
            pairs.append((found[0], module))

    handles = []
    for module in model.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d)) and not is_parametrized(module):
            handles.append(module.register_forward_hook(after))
        elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) and module.affine and module.track_running_stats:
            handles.append(module.register_forward_pre_hook(before))
    with hooked(handles), evaluating(model):
        model(**(example if example is not None else _black_image(model)))
    read = Counter(conv for conv, _ in pairs)
    pairs = [(conv, norm) for conv, norm in pairs if read[conv] == runs[conv] == runs[norm] == 1]
    if not pairs:
        raise ValueError(f"{type(model).__name__} has no BatchNorm that directly follows a convolution to fold into.")
    return pairs


def _black_image(model: PreTrainedModel) -> dict[str, Tensor]:
    config = model.config
    if model.main_input_name != "pixel_values":
        raise ValueError(
            f"{type(model).__name__} takes {model.main_input_name}. Show what follows what with a batch: "
            "fold_batch_norm_(model, example)."
        )
    size = getattr(config, "image_size", None) or 64
    height, width = (size, size) if isinstance(size, int) else size
    return {"pixel_values": torch.zeros(1, getattr(config, "num_channels", 3), height, width, device=model.device)}
