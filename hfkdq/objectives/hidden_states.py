# SPDX-License-Identifier: Apache-2.0
"""Distillation of hidden states, with learned projections where the widths differ.

The projections ride in the student while it is trained, so that gradients, clipping, devices and processes are
handled as for any weight; they never reach its files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from ..losses import masked_mean, mean_squared_error
from .base import Batch, Objective, attended_mask, batch_size
from .probe import hidden_states, layer_map


class _Projection(nn.Module):
    """Linear, but no `nn.Linear`: what quantizes or prunes the linear layers of the student must not see it."""

    def __init__(self, width: int, teacher_width: int) -> None:
        super().__init__()
        linear = nn.Linear(width, teacher_width)
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return functional.linear(states, self.weight, self.bias)


class Projections(nn.Module):
    """Linear maps from the student's width to the teacher's, computed within the student's forward pass.

    Results are appended to the `hidden_states` that the student returns while training. The state dict of the
    student neither holds nor misses them; the trainer keeps them in a file of their own.
    """

    NAME: ClassVar[str] = "hfkdq_projections"

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.ModuleDict()
        self.layers: list[int] = []
        # FSDP and DeepSpeed save and load by the student's state dict, where they must see the projections.
        self.in_state_dict = False
        self.register_load_state_dict_post_hook(_forget_missing)  # type: ignore[no-untyped-call]

    def add(self, layer: int, width: int, teacher_width: int, like: torch.Tensor) -> int:
        """Adds a projection of hidden state `layer`; returns its place among the projections."""
        # The data order and dropout of the run must not depend on how many projections it has.
        with torch.random.fork_rng(devices=[]):
            self.maps[str(len(self.layers))] = _Projection(width, teacher_width).to(like.device)
        self.layers.append(layer)
        return len(self.layers) - 1

    def install(self, student: nn.Module) -> None:
        """Puts the projections into the student, in place of others; does nothing where they are in already."""
        present = getattr(student, self.NAME, None)
        if present is not self:
            if present is not None:
                present.remove(student)
            student.add_module(self.NAME, self)
            self._hook = student.register_forward_hook(self._append)

    def remove(self, student: nn.Module) -> None:
        """Takes the projections out of the student; they keep their weights."""
        if getattr(student, self.NAME, None) is self:
            delattr(student, self.NAME)
            self._hook.remove()

    def _append(self, student: nn.Module, args: Any, output: Any) -> Any:
        states = getattr(output, "hidden_states", None)
        if student.training and states:
            output.hidden_states = (
                *states,
                *(p(states[i]) for p, i in zip(self.maps.values(), self.layers, strict=True)),
            )
        return output

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        """Nothing unless `in_state_dict`: `maps.state_dict()` has the weights."""
        if self.in_state_dict:
            return super().state_dict(*args, destination=destination, **kwargs)
        return {} if destination is None else destination


def _forget_missing(module: nn.Module, incompatible: Any) -> None:
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if Projections.NAME not in key]


@dataclass(frozen=True, kw_only=True)
class HiddenStateKD(Objective):
    """Mean squared error between hidden states of matched layers.

    `mean over pairs (s, t) of MSE(W_s h_student[s], h_teacher[t])`, mean over the positions attended to. `W_s` is
    learned where the widths differ, and absent where they are equal. Romero et al., "FitNets" (2015); Jiao et al.,
    "TinyBERT" (2020).

    Args:
        layers (`dict` or `str`, *optional*): `{student layer: teacher layer}`, numbered from 1, 0 for the embeddings;
            or `"uniform"`. By default the layers that `make_student` copied, or uniform.
        weight (`float` or schedule, defaults to 1.0): factor of this term.

    Raises:
        ValueError: at `attach`, a layer out of range, models that return no hidden states, or states over different
            numbers of positions.

    Example:
        ```python
        >>> from hfkdq import HiddenStateKD
        >>> HiddenStateKD(layers={1: 2, 2: 4}).needs
        frozenset({'hidden_states'})

        ```
    """

    needs: ClassVar[frozenset[str]] = frozenset({"hidden_states"})

    layers: Mapping[int, int] | str | None = None

    def attach(self, student: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
        super().attach(student, teacher)
        states, targets = hidden_states(student), hidden_states(teacher)
        pairs = layer_map(self.layers, student, len(states) - 1, len(targets) - 1)
        places: dict[tuple[int, int], int] = {}
        needed = []
        for s, t in pairs.items():
            if states[s].shape[:-1] != targets[t].shape[:-1]:
                raise ValueError(
                    f"Hidden state {s} of the student and {t} of the teacher have the shapes {tuple(states[s].shape)} "
                    f"and {tuple(targets[t].shape)} for the same example; all axes but the last must agree. Virtual tokens, for "
                    "example of prompt tuning, add positions."
                )
            if states[s].shape[-1] != targets[t].shape[-1]:
                needed.append((s, t))
        if needed:
            projections = getattr(student, Projections.NAME, None) or Projections()
            for s, t in needed:
                place = projections.add(s, states[s].shape[-1], targets[t].shape[-1], like=states[s])
                places[s, t] = len(states) + place
            projections.install(student)
        self._found.update(pairs=tuple(pairs.items()), places=places)
        self._found.update(hidden_states=(frozenset(pairs), frozenset(pairs.values())))

    def positions(self, batch: Batch) -> torch.Tensor | int:
        mask = attended_mask(batch)
        return batch_size(batch) if mask is None else mask.sum()

    def __call__(self, student_out: Any, teacher_out: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | int]:
        states, targets = student_out.hidden_states, teacher_out.hidden_states
        distance = torch.stack(
            [
                mean_squared_error(states[self._found["places"].get((s, t), s)], targets[t])
                for s, t in self._found["pairs"]
            ]
        ).mean(0)  # (batch, positions)
        return masked_mean(distance, attended_mask(batch)), self.positions(batch)
