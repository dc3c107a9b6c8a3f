# SPDX-License-Identifier: Apache-2.0
"""Layers with several integer weights: recurrent ones as ONNX's own operators, and all experts of a layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ...quantization import QuantizedExperts
from ..operators import onnx_op
from .layers import Lowered
from .weights import stored_weight

OPSET = 14
# ONNX's order of the gates, in the numbers of torch's.
_ORDER = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2)}


class Recurrent(Lowered):
    """An LSTM or GRU as operators of ONNX; integer weights are made floating point when the file is loaded."""

    num_layers: int
    hidden_size: int
    bidirectional: bool
    batch_first: bool

    def __init__(self, layer: nn.LSTM | nn.GRU) -> None:
        super().__init__(layer)
        self.kind = "LSTM" if isinstance(layer, nn.LSTM) else "GRU"
        vars(self).update(_flat_weights=None, _flat_weight_refs=None)
        order = torch.tensor(_ORDER[self.kind])
        self.stored, self.biases = nn.ModuleDict(), nn.ParameterDict()
        quantizers = getattr(layer, "weight_quantizers", {})
        for key, parameter in layer.named_parameters(recurse=False):
            if key.startswith("bias"):
                self.biases[key] = nn.Parameter(parameter.detach().reshape(len(order), -1)[order].flatten())
                continue
            stored: Any = FloatWeight(parameter.detach().reshape(len(order), -1))
            if key in quantizers:
                stored = stored_weight(quantizers[key], parameter)
            for name, rows in list(stored.named_buffers()):
                if name != "codebook" and len(rows) == len(order):
                    setattr(stored, name, rows[order])
            self.stored[key] = stored

    def flatten_parameters(self) -> None:
        """Nothing: model code calls it before a pass."""

    def forward(self, input: Any, hx: Any = None) -> tuple[Tensor, Any]:
        """What the layer gives: all states, and the last ones of every layer and direction."""
        if isinstance(input, PackedSequence):
            raise ValueError(
                f"An {self.kind} of packed sequences cannot be exported: ONNX has no such tensors. Give it the padded batch, "
                "and choose the last states by the mask."
            )
        flat = input.dim() == 2
        values = input.unsqueeze(1) if flat else input.transpose(0, 1) if self.batch_first else input
        given = () if hx is None else hx if isinstance(hx, (tuple, list)) else (hx,)
        starts = [one.unsqueeze(1) if flat else one for one in given]
        last = []
        for index in range(self.num_layers):
            count = 1 + self.bidirectional
            own = [one[count * index : count * (index + 1)] for one in starts]
            states, *ends = self._layer(index, values, own)
            values = states.transpose(1, 2).flatten(2)  # (time, batch, directions * hidden)
            last.append(ends)
        ends = [torch.cat(each) for each in zip(*last, strict=True)]
        if flat:
            values, ends = values.squeeze(1), [one.squeeze(1) for one in ends]
        elif self.batch_first:
            values = values.transpose(0, 1)
        return values, tuple(ends) if len(ends) > 1 else ends[0]

    def _layer(self, index: int, values: Tensor, starts: list[Tensor]) -> tuple[Tensor, ...]:
        """States (time, directions, batch, hidden) of one layer, and the last ones (directions, batch, hidden)."""
        ends = [f"_l{index}", f"_l{index}_reverse"][: 1 + self.bidirectional]
        # (directions, gates * hidden, inputs) each
        weights = [torch.stack([self._values(f"weight_{part}{end}") for end in ends]) for part in ("ih", "hh")]
        rows = weights[0].shape[1]
        biases = [self.biases[f"bias_{part}{end}"] for end in ends for part in ("ih", "hh")] if self.biases else []
        bias = torch.cat(biases).reshape(len(ends), -1) if biases else weights[0].new_zeros(len(ends), 2 * rows)
        # That all texts are as long as the batch; it has to be said where states are given.
        lengths = [torch.ones_like(values[..., 0], dtype=torch.int32).sum(0, dtype=torch.int32)] if starts else []
        attributes: dict[str, Any] = {"linear_before_reset": 1} if self.kind == "GRU" else {}
        return onnx_op(
            self.kind, *(values, *weights, bias, *lengths, *starts), compute=self._compute, opset=OPSET,
            outputs=2 + (self.kind == "LSTM"), hidden_size=self.hidden_size,
            direction="bidirectional" if self.bidirectional else "forward", **attributes,
        )  # fmt: skip

    def _values(self, key: str) -> Tensor:
        values: Tensor = self.stored[key].values()  # type: ignore[operator]
        return values.reshape(len(_ORDER[self.kind]) * self.hidden_size, -1)

    def _compute(self, values: Tensor, weight: Tensor, recurrent: Tensor, bias: Tensor, *rest: Tensor) -> Any:
        size = (len(weight), values.shape[1], self.hidden_size)
        states = 2 if self.kind == "LSTM" else 1
        if torch.compiler.is_exporting():  # which would take the steps one by one, and their number for a constant
            return (values.new_empty(values.shape[0], *size), *(values.new_empty(size) for _ in range(states)))
        order = torch.tensor(_ORDER[self.kind]).argsort()
        flat = []
        for direction in range(len(weight)):
            parts = (weight[direction], recurrent[direction], *bias[direction].chunk(2))
            flat += [part.reshape(len(order), self.hidden_size, -1)[order].reshape(part.shape) for part in parts]
        starts = list(rest[1:]) or [values.new_zeros(size) for _ in range(states)]
        run: Any = torch.lstm if self.kind == "LSTM" else torch.gru
        hx: Any = starts if self.kind == "LSTM" else starts[0]
        output, *ends = run(values, hx, flat, True, 1, 0.0, False, len(weight) > 1, False)
        return (output.unflatten(2, (len(weight), self.hidden_size)).transpose(1, 2), *ends)


class FloatWeight(nn.Module):
    """A weight that is not quantized, (channels, inputs)."""

    stored: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("stored", weight)

    def values(self) -> Tensor:
        return self.stored


def lower_recurrent_(model: nn.Module) -> None:
    """Replaces the LSTMs and GRUs of a model on the CPU, in place: `torch.export` would take their steps one by one."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if type(module) in (nn.LSTM, nn.GRU) and not module.proj_size:
            model.set_submodule(name, Recurrent(module))


class StoredExperts(nn.Module):
    """Mixed into the class of a layer of experts, whose weights it makes of codes at every call."""

    stored: nn.ModuleDict
    shapes: dict[str, tuple[torch.Size, bool]]

    @classmethod
    def of(cls, experts: QuantizedExperts) -> nn.Module:
        """The layer in the place of `experts`, which it shares its other attributes with."""
        stored, shapes = nn.ModuleDict(), {}
        for key, quantizer in experts.weight_quantizers.items():
            weight: Tensor = getattr(experts, key)
            stored[key] = stored_weight(quantizer, weight, quantizer.transposed)  # type: ignore[arg-type]
            shapes[key] = (weight.shape, quantizer.transposed)
        plain = type(experts).plain_class
        experts.detach_quantizers()
        lowered: Any = experts
        lowered.__class__ = type(f"Stored{plain.__name__}", (cls, plain), {})
        for key in shapes:
            del lowered._parameters[key]
        lowered.stored, lowered.shapes = stored, shapes
        return lowered

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for key, (shape, is_transposed) in self.shapes.items():
            rows = self.stored[key].values()  # type: ignore[operator]
            turned = shape if not is_transposed else (*shape[:-2], shape[-1], shape[-2])
            weight = rows.reshape(turned)
            vars(self)[key] = weight.transpose(-1, -2) if is_transposed else weight
        try:
            return super().forward(*args, **kwargs)
        finally:
            for key in self.shapes:
                del vars(self)[key]
