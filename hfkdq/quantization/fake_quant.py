# SPDX-License-Identifier: Apache-2.0
"""Linear layers and embeddings that compute with int8 weights and uint8 activations, simulated in floating point.

Knows single modules only; which modules of a model are quantized, and when, is decided elsewhere.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..specs import QuantizationSpec

WEIGHT_MAX = 127
ACTIVATION_MAX = 255
# Keeps empty channels and ranges from dividing by zero; far below any scale that training produces.
SMALLEST_SCALE = 1e-12


def _constant(tensor: Tensor) -> Tensor:
    """`tensor` as a value that a tracer records as a constant, whatever it was computed from."""
    if not torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return tensor
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's warning of what is wanted here
        return torch.tensor(tensor.tolist(), dtype=tensor.dtype, device=tensor.device)


def _fake_quantize(values: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    """Rounds `values` to the grid, per tensor or per row, with the straight-through gradient."""
    # The fused kernels compute in float32 for bfloat16 and float16 values too, and round once at the end.
    scale, zero_point = _constant(scale), _constant(zero_point)
    if scale.ndim:
        return torch.fake_quantize_per_channel_affine(values, scale, zero_point, 0, low, high)
    return torch.fake_quantize_per_tensor_affine(values, scale, zero_point, low, high)


def _fake_quantize_symmetric(values: Tensor, scale: Tensor) -> Tensor:
    # -128 is never reached, because the scale puts max|w| on 127; ONNX has no int8 grid that leaves it out.
    zero_point = torch.zeros_like(scale, dtype=torch.int32)
    return _fake_quantize(values, scale, zero_point, -WEIGHT_MAX - 1, WEIGHT_MAX)


def _recomputing() -> bool:
    """Whether this forward is a repetition inside a backward pass, as gradient checkpointing makes it."""
    return torch._C._current_graph_task_id() != -1


class _RoundStraightThrough(torch.autograd.Function):
    """Rounds to the nearest integer, ties to even; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.round()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def _round(values: Tensor) -> Tensor:
    rounded: Tensor = _RoundStraightThrough.apply(values)  # type: ignore[no-untyped-call]
    return rounded


def _scale_gradient(values: Tensor, factor: float) -> Tensor:
    """`values`, whose gradient arrives multiplied by `factor`."""
    return values.detach() + (values - values.detach()) * factor


class ActivationQuantizer(nn.Module):
    r"""Simulates affine uint8 activations: \\(\hat x = s \, (\mathrm{clamp}(\mathrm{round}(x / s) + z, 0, 255) - z)\\).

    Until a training batch or `set_range` has given it a range it passes its input through. It writes nothing to a
    state dict and expects nothing from one, so that a checkpoint of the model around it is an ordinary one.

    Attributes:
        initialized (`bool`): whether there is a range.
    """

    state_names: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.initialized = False

    def qparams(self) -> tuple[Tensor, Tensor]:
        """Scale (float32) and zero point (int32), both of shape `()`."""
        raise NotImplementedError

    def set_range(self, scale: float, zero_point: int) -> None:
        """Takes over a range found earlier; `qparams` gives exactly these values from now on."""
        raise NotImplementedError

    def _update(self, values: Tensor) -> None:
        raise NotImplementedError

    def forward(self, values: Tensor) -> Tensor:
        if self.training and values.numel() and not _recomputing():
            self._update(values.detach().float())
        return self._quantize(values) if self.initialized else values

    def _quantize(self, values: Tensor) -> Tensor:
        return _fake_quantize(values, *self.qparams(), 0, ACTIVATION_MAX)

    def state_tensors(self) -> list[Tensor]:
        """What `load_state` needs to continue exactly here, as scalars in the order of `state_names`."""
        return [getattr(self, name).detach() for name in self.state_names]

    def load_state(self, state: dict[str, float]) -> None:
        """Continues from the values of `state_tensors`, given by their names."""
        with torch.no_grad():
            for name in self.state_names:
                getattr(self, name).fill_(state[name])
        self.initialized = True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ActivationQuantizer:
        # Follows its model to another device, never to another precision.
        super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)  # type: ignore[no-untyped-call]
        return self

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        pass


class ObservedQuantizer(ActivationQuantizer):
    r"""An [`ActivationQuantizer`] whose range follows what it sees in training mode.

    \\(s = (max - min) / 255\\) and \\(z = \mathrm{round}(-min / s)\\), where min and max include 0 and come from the
    first batch, then from each next one.

    Args:
        averaging_constant (`float`, *optional*): share of the newest batch in an exponential moving average of minimum
            and maximum; `None` keeps the widest range seen.
        device (`torch.device`, *optional*): where the range lives.
    """

    state_names = ("minimum", "maximum", "scale", "zero_point")
    minimum: Tensor
    maximum: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, averaging_constant: float | None, device: torch.device | None = None) -> None:
        super().__init__()
        self.averaging_constant = averaging_constant
        for name in self.state_names:
            dtype = torch.int32 if name == "zero_point" else torch.float32
            self.register_buffer(name, torch.zeros((), dtype=dtype, device=device), persistent=False)

    def qparams(self) -> tuple[Tensor, Tensor]:
        return self.scale, self.zero_point

    def set_range(self, scale: float, zero_point: int) -> None:
        low, high = -zero_point * scale, (ACTIVATION_MAX - zero_point) * scale
        self.load_state({"minimum": low, "maximum": high, "scale": scale, "zero_point": zero_point})

    @torch.no_grad()
    def _update(self, values: Tensor) -> None:
        low, high = values.aminmax()
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        if self.initialized and self.averaging_constant is not None:
            low = torch.lerp(self.minimum, low, self.averaging_constant)
            high = torch.lerp(self.maximum, high, self.averaging_constant)
        elif self.initialized:
            low, high = torch.minimum(self.minimum, low), torch.maximum(self.maximum, high)
        self.minimum.copy_(low)
        self.maximum.copy_(high)
        self.scale.copy_(((high - low) / ACTIVATION_MAX).clamp(min=SMALLEST_SCALE))
        self.zero_point.copy_((-low / self.scale).round().clamp(0, ACTIVATION_MAX))
        self.initialized = True


class LearnedQuantizer(ActivationQuantizer):
    r"""An [`ActivationQuantizer`] whose scale and offset are trained with the loss.

    With the offset \\(\beta\\) in the unit of the input, \\(z = \mathrm{round}(-\beta / s)\\). Inside the range
    \\(\partial \hat x / \partial s = \mathrm{round}(x / s) - x / s\\) and \\(\partial \hat x / \partial \beta = 0\\);
    where the code q is clipped to 0 or 255 they are \\(q - z - \beta / s\\), which is q up to the rounding of z,
    and 1. Both gradients are multiplied by \\(1 / \sqrt{255 N}\\) with the N features of the input, so that the
    update does not depend on how a batch is cut into micro batches. The first training batch sets the range.

    After Esser et al., "Learned Step Size Quantization" (2020), and Bhalgat et al., "LSQ+: Improving low-bit
    quantization through learnable offsets and better initialization" (2020).

    Args:
        device (`torch.device`, *optional*): where the parameters live.
    """

    state_names = ("scale", "offset")

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), device=device))
        self.offset = nn.Parameter(torch.zeros((), device=device))

    def qparams(self) -> tuple[Tensor, Tensor]:
        scale = _constant(self.scale.data).clamp(min=SMALLEST_SCALE)
        zero_point = (-_constant(self.offset.data) / scale).round().clamp(0, ACTIVATION_MAX)
        return scale, zero_point.to(torch.int32)

    def set_range(self, scale: float, zero_point: int) -> None:
        self.load_state({"scale": scale, "offset": -zero_point * scale})

    @torch.no_grad()
    def _update(self, values: Tensor) -> None:
        if not self.initialized:
            low, high = values.aminmax()
            low, high = low.clamp(max=0.0), high.clamp(min=0.0)
            self.scale.copy_((high - low) / ACTIVATION_MAX)
            self.offset.copy_(low)
            self.initialized = True
        # An optimizer may step out of the valid range; a projection brings it back without stopping the gradient.
        self.scale.data.clamp_(min=SMALLEST_SCALE)
        self.offset.data.clamp_(min=-ACTIVATION_MAX * self.scale.data, max=torch.zeros_like(self.scale.data))

    def _quantize(self, values: Tensor) -> Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return super()._quantize(values)
        with torch.autocast(values.device.type, enabled=False):
            factor = 1.0 / math.sqrt(values.shape[-1] * ACTIVATION_MAX)
            scale, offset = _scale_gradient(self.scale, factor), _scale_gradient(self.offset, factor)
            zero_point = _round(-offset / scale)
            # The same arithmetic as the fused kernel: times the reciprocal, rounded before the zero point is added.
            codes = (_round(values.float() * (1.0 / scale)) + zero_point).clamp(0, ACTIVATION_MAX)
            return ((codes - zero_point) * scale).to(values.dtype)


def make_activation_quantizer(
    spec: QuantizationSpec, device: torch.device | None = None
) -> ActivationQuantizer | None:
    """The quantizer that `spec` asks for at the input of a linear layer, `None` for weight-only specs."""
    if spec.activation_bits is None:
        return None
    if spec.range_estimator == "learned":
        return LearnedQuantizer(device)
    averaging_constant = spec.averaging_constant if spec.range_estimator == "moving_average" else None
    return ObservedQuantizer(averaging_constant, device)


def _symmetric_scale(low: Tensor, high: Tensor) -> Tensor:
    return (torch.maximum(-low, high).float() / WEIGHT_MAX).clamp(min=SMALLEST_SCALE)


def _integer_weight(weight: Tensor, scale: Tensor) -> Tensor:
    rows = scale.view(-1, *[1] * (weight.ndim - 1)) if scale.ndim else scale
    return (weight.detach().float() * (1.0 / rows)).round().clamp(-WEIGHT_MAX, WEIGHT_MAX).to(torch.int8)


class QuantizedLinear(nn.Linear):
    """An `nn.Linear` with symmetric int8 weights per output channel and, if its spec says so, uint8 inputs.

    An existing layer becomes one by changing its class, so that its parameters, and their names, stay what they were.
    """

    quantization_spec: QuantizationSpec
    activation_quantizer: ActivationQuantizer | None
    fake_quantize_enabled = True

    def weight_scale(self) -> Tensor:
        """Scales of the output channels, `max|w| / 127`, float32 of shape `(out_features,)`."""
        return _symmetric_scale(*self.weight.detach().aminmax(dim=1))

    def integer_weight(self) -> Tensor:
        """The int8 codes in [-127, 127] that the forward pass stands for, `(out_features, in_features)`."""
        return _integer_weight(self.weight, self.weight_scale())

    def forward(self, input: Tensor) -> Tensor:
        if not self.fake_quantize_enabled:
            return super().forward(input)
        if self.activation_quantizer is not None:
            input = self.activation_quantizer(input)
        return F.linear(input, _fake_quantize_symmetric(self.weight, self.weight_scale()), self.bias)


class QuantizedEmbedding(nn.Embedding):
    """An `nn.Embedding` with a symmetric int8 table, one scale for all of it; made as [`QuantizedLinear`] is."""

    quantization_spec: QuantizationSpec
    fake_quantize_enabled = True

    def weight_scale(self) -> Tensor:
        """Scale of the table, `max|w| / 127`, float32 of shape `()`."""
        return _symmetric_scale(*self.weight.detach().aminmax())

    def integer_weight(self) -> Tensor:
        """The int8 codes in [-127, 127] that the forward pass stands for, `(num_embeddings, embedding_dim)`."""
        return _integer_weight(self.weight, self.weight_scale())

    def forward(self, input: Tensor) -> Tensor:
        rows = super().forward(input)
        return _fake_quantize_symmetric(rows, self.weight_scale()) if self.fake_quantize_enabled else rows
