# SPDX-License-Identifier: Apache-2.0
"""Fake quantizers of activations, to unsigned integers: observed and learned ranges."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..specs import QuantizationScheme
from . import grids
from .scales import observed_bounds, scale_of, smallest_and_largest
from .weights import Stateless, recomputing


class ActivationQuantizer(Stateless):
    r"""Simulates unsigned activations of b bits:
    \\(\hat x = s \, (\mathrm{clamp}(\mathrm{round}(x / s) + z, 0, 2^b - 1) - z)\\).

    Until a training batch or `set_range` has given it a range it passes its input through. It writes nothing to a
    state dict and expects nothing from one, so that a checkpoint of the model around it is an ordinary one. With
    `activation_mapping="power_law"` it is \\(sign(x)|x|^p\\) that is quantized so, and expanded again.

    Args:
        scheme (`QuantizationScheme`): how.

    Attributes:
        initialized (`bool`): whether there is a range.
        frozen (`bool`): whether the range stays as it is in training.
    """

    state_names: tuple[str, ...] = ()

    def __init__(self, scheme: QuantizationScheme) -> None:
        super().__init__()
        if scheme.activation_bits is None:
            raise ValueError("activation_bits is None: there is nothing to quantize.")
        self.scheme = scheme
        self.initialized = self.frozen = False
        self.maximum_code = int(2**scheme.activation_bits) - 1

    @property
    def middle(self) -> int:
        """The zero point of symmetric activations."""
        return (self.maximum_code + 1) // 2

    def qparams(self) -> tuple[Tensor, Tensor]:
        """Scale (float32) and zero point (int32), both of shape `()`."""
        raise NotImplementedError

    def set_range(self, scale: float, zero_point: int) -> None:
        """Takes over a range found earlier; `qparams` gives exactly these values from now on."""
        raise NotImplementedError

    def _update(self, values: Tensor) -> None:
        raise NotImplementedError

    def forward(self, values: Tensor) -> Tensor:
        if self.training and not self.frozen and values.numel() and not recomputing():
            self._update(values.detach().float())
        return self._quantize(values) if self.initialized else values

    def _quantize(self, values: Tensor) -> Tensor:
        scale, zero_point = self.qparams()
        if self.scheme.activation_mapping == "linear":
            return grids.fake_quantize(values, scale, zero_point, 0, self.maximum_code)
        with torch.no_grad():
            mapped = self.grid.domain(values.detach().float())
            codes = (mapped * (1.0 / scale)).round() + zero_point
            inside = (codes >= 0) & (codes <= self.maximum_code)
            quantized = grids.expand((codes.clamp(0, self.maximum_code) - zero_point) * scale, self.scheme.power)
        return grids.straight_through(values, quantized, inside.to(values.dtype))

    def ends(self) -> tuple[float, float]:
        """The least and the largest value that it gives."""
        scale, zero_point = self.qparams()
        ends = (torch.tensor([0, self.maximum_code], device=scale.device) - zero_point) * scale.detach()
        if self.scheme.activation_mapping != "linear":
            ends = grids.expand(ends, self.scheme.power)
        low, high = ends.tolist()
        return low, high

    @property
    def grid(self) -> grids.Grid:
        bits = self.scheme.activation_bits or 0
        return grids.Grid(bits, self.scheme.activation_symmetric, self.scheme.activation_mapping, self.scheme.power)

    def _qparams_of(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point for the range [low, high], which includes 0."""
        scale, zero_point = scale_of(low, high, self.grid)
        return scale, torch.full_like(scale, self.middle) if zero_point is None else zero_point

    def state_tensors(self) -> list[Tensor]:
        """The state for `load_state`, as scalars in the order of `state_names`."""
        return [getattr(self, name).detach() for name in self.state_names]

    def load_state(self, state: dict[str, float]) -> None:
        """Continues from the values of `state_tensors`, given by their names."""
        with torch.no_grad():
            for name in self.state_names:
                getattr(self, name).fill_(state[name])
        self.initialized = True

    def _bounds(self, values: Tensor) -> tuple[Tensor, Tensor]:
        return observed_bounds(values, self.grid, self.scheme.range_estimator, self.scheme.percentile)


class ObservedQuantizer(ActivationQuantizer):
    r"""An [`ActivationQuantizer`] whose range follows what it sees in training mode. \\(s = (max - min) / (2^b - 1)\\)
    and \\(z = \mathrm{round}(-min / s)\\), where min and max include 0 and come from the first batch, then from each
    next one: for `"min_max"` the widest seen, else an exponential moving average of the batch's bounds, its minimum
    and maximum, its percentiles, or those of least squared error."""

    state_names = ("minimum", "maximum", "scale", "zero_point")
    minimum: Tensor
    maximum: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, scheme: QuantizationScheme, device: torch.device | None = None) -> None:
        super().__init__(scheme)
        for name in self.state_names:
            dtype = torch.int32 if name == "zero_point" else torch.float32
            self.register_buffer(name, torch.zeros((), dtype=dtype, device=device), persistent=False)

    def qparams(self) -> tuple[Tensor, Tensor]:
        return self.scale, self.zero_point

    def set_range(self, scale: float, zero_point: int) -> None:
        low, high = -zero_point * scale, (self.maximum_code - zero_point) * scale
        self.load_state({"minimum": low, "maximum": high, "scale": scale, "zero_point": zero_point})

    @torch.no_grad()
    def _update(self, values: Tensor) -> None:
        low, high = self._bounds(values)
        if self.initialized and self.scheme.range_estimator == "min_max":
            low, high = torch.minimum(self.minimum, low), torch.maximum(self.maximum, high)
        elif self.initialized:
            low = torch.lerp(self.minimum, low, self.scheme.averaging_constant)
            high = torch.lerp(self.maximum, high, self.scheme.averaging_constant)
        self.minimum.copy_(low)
        self.maximum.copy_(high)
        scale, zero_point = self._qparams_of(low, high)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)
        self.initialized = True


class LearnedQuantizer(ActivationQuantizer):
    r"""An [`ActivationQuantizer`] whose scale and offset are trained with the loss.

    With the offset \\(\beta\\) in the unit of the input, \\(z = \mathrm{round}(-\beta / s)\\). Inside the range
    \\(\partial \hat x / \partial s = \mathrm{round}(x / s) - x / s\\) and \\(\partial \hat x / \partial \beta = 0\\);
    where the code q is clipped to 0 or \\(2^b - 1\\) they are \\(q - z - \beta / s\\), which is q up to the rounding of
    z, and 1. Symmetric activations have no offset. Both gradients are multiplied by \\(1 / \sqrt{(2^b - 1) N}\\) with the
    N features of the input, so that the update does not depend on how a batch is cut into micro batches. The first
    training batch sets the range.

    After Esser et al., "Learned Step Size Quantization" (2020), and Bhalgat et al., "LSQ+: Improving low-bit
    quantization through learnable offsets and better initialization" (2020).
    """

    state_names = ("scale", "offset")

    def __init__(self, scheme: QuantizationScheme, device: torch.device | None = None) -> None:
        super().__init__(scheme)
        self.scale = nn.Parameter(torch.ones((), device=device))
        # Symmetric activations have an offset that follows the scale, and DDP allows no parameter without gradient.
        offset = torch.zeros((), device=device)
        if scheme.activation_symmetric:
            self.register_buffer("offset", offset, persistent=False)
        else:
            self.offset = nn.Parameter(offset)

    def qparams(self) -> tuple[Tensor, Tensor]:
        scale = grids.constant(self.scale.data).clamp(min=grids.SMALLEST_SCALE)
        if self.scheme.activation_symmetric:
            return scale, torch.full_like(scale, self.middle, dtype=torch.int32)
        zero_point = (-grids.constant(self.offset.data) / scale).round().clamp(0, self.maximum_code)
        return scale, zero_point.to(torch.int32)

    def set_range(self, scale: float, zero_point: int) -> None:
        self.load_state({"scale": scale, "offset": -zero_point * scale})

    @torch.no_grad()
    def _update(self, values: Tensor) -> None:
        if not self.initialized:
            low, high = self._bounds(values)
            self.scale.copy_(self._qparams_of(low, high)[0])
            self.offset.copy_(low)
            self.initialized = True
        # An optimizer may step out of the valid range; a projection brings it back without stopping the gradient.
        self.scale.data.clamp_(min=grids.SMALLEST_SCALE)
        self.offset.data.clamp_(min=-self.maximum_code * self.scale.data, max=torch.zeros_like(self.scale.data))

    def _quantize(self, values: Tensor) -> Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return super()._quantize(values)
        with torch.autocast(values.device.type, enabled=False):
            factor = 1.0 / math.sqrt(values.shape[-1] * self.maximum_code)
            scale, offset = grids.scale_gradient(self.scale, factor), grids.scale_gradient(self.offset, factor)
            with torch.no_grad():
                if self.scheme.activation_symmetric:  # the middle stays, so what the offset stands for does not count
                    zero_point, offset = torch.full_like(self.scale, self.middle), torch.zeros_like(self.scale)
                else:
                    zero_point = (-self.offset / self.scale).round()
            return grids.learned_fake_quantize(values, scale, offset, zero_point, self.maximum_code)


class PACTQuantizer(ActivationQuantizer):
    r"""An [`ActivationQuantizer`] whose clipping bound \\(\alpha\\) is trained with the loss.

    \\(y = \mathrm{clamp}(x, 0, \alpha)\\), quantized with \\(s = \alpha / (2^b - 1)\\), and
    \\(\partial y / \partial \alpha = 1\\) where \\(x > \alpha\\), else 0, after Choi et al., "PACT: Parameterized
    Clipping Activation for Quantized Neural Networks" (2018). Where the first training batch has negative values, the
    range is \\([-\alpha - s, \alpha]\\) with \\(s = \alpha / (2^{b-1} - 1)\\), and the gradient below it that of
    its end. That batch also gives \\(\alpha\\), its largest size. The paper's decay of \\(\alpha\\) is the weight decay of the optimizer.
    """

    state_names = ("alpha", "signed")
    signed: Tensor

    def __init__(self, scheme: QuantizationScheme, device: torch.device | None = None) -> None:
        super().__init__(scheme)
        self.alpha = nn.Parameter(torch.ones((), device=device))
        signed = torch.full((), float(scheme.activation_symmetric), device=device)
        self.register_buffer("signed", signed, persistent=False)

    def _steps(self) -> Tensor:
        return torch.where(self.signed > 0, float(self.middle - 1), float(self.maximum_code))

    def qparams(self) -> tuple[Tensor, Tensor]:
        alpha = grids.constant(self.alpha.data).clamp(min=grids.SMALLEST_SCALE)
        scale = grids.constant(alpha / grids.constant(self._steps()))
        return scale, (self.signed * self.middle).to(torch.int32)

    def set_range(self, scale: float, zero_point: int) -> None:
        signed = float(zero_point > 0)
        steps = self.middle - 1 if signed else self.maximum_code
        alpha = torch.tensor(scale) * steps
        # Rounding may put the product one step off the bound that the scale came from.
        near = [alpha, alpha.nextafter(torch.zeros(())), alpha.nextafter(torch.tensor(torch.inf))]
        alpha = next((value for value in near if value / steps == torch.tensor(scale)), alpha)
        self.load_state({"alpha": float(alpha), "signed": signed})

    @torch.no_grad()
    def _update(self, values: Tensor) -> None:
        if not self.initialized:
            low, high = smallest_and_largest(values)
            if not self.scheme.activation_symmetric:
                self.signed.copy_(low < 0)
            self.alpha.copy_(torch.maximum(-low, high))
            self.initialized = True
        self.alpha.data.clamp_(min=grids.SMALLEST_SCALE)

    def _quantize(self, values: Tensor) -> Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return super()._quantize(values)
        with torch.autocast(values.device.type, enabled=False):
            quantized = grids.fake_quantize(values.detach().float(), *self.qparams(), 0, self.maximum_code)
            # There is one code more below zero than above.
            lowest = -self.alpha * self.signed * (self.middle / (self.middle - 1))
            return grids.straight_through(values.float().clamp(lowest, self.alpha), quantized).to(values.dtype)


def make_activation_quantizer(scheme: QuantizationScheme, device: Any = None) -> ActivationQuantizer | None:
    """The quantizer that `scheme` asks for at the input of a module, `None` for weight-only schemes."""
    if scheme.activation_bits is None:
        return None
    kinds = {"learned": LearnedQuantizer, "pact": PACTQuantizer}
    return kinds.get(scheme.range_estimator, ObservedQuantizer)(scheme, device)
