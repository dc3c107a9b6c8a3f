# SPDX-License-Identifier: Apache-2.0
"""Learned projections of hidden states of a student. They are auxiliary modules of the student while it is trained, so
that gradients, clipping, devices and processes are handled as for any weight; they never reach its files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional

from ..facts import AUXILIARY


class Projection(nn.Module):
    """Linear, but no `nn.Linear`: what quantizes or prunes the linear layers of the student must not see it."""

    def __init__(self, width: int, teacher_width: int) -> None:
        super().__init__()
        linear = nn.Linear(width, teacher_width)
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return functional.linear(states, self.weight, self.bias)


class Auxiliary(nn.Module):
    """A module that a student has while it is trained, with a hook on its forward pass. The state dict of the student
    neither holds nor misses it."""

    NAME: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_post_hook(_forget_missing)

    def install(self, student: nn.Module) -> None:
        """Puts the module into the student, in place of another; does nothing where it is in already."""
        present = getattr(student, self.NAME, None)
        if present is not self:
            if present is not None:
                present.remove(student)
            student.add_module(self.NAME, self)
            self._hook = student.register_forward_hook(self._append)

    def remove(self, student: nn.Module) -> None:
        """Takes the module out of the student; it keeps its weights."""
        if getattr(student, self.NAME, None) is self:
            delattr(student, self.NAME)
            self._hook.remove()

    def _append(self, student: nn.Module, args: Any, output: Any) -> Any:
        raise NotImplementedError

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        return {} if destination is None else destination


def _forget_missing(module: Any, incompatible: Any) -> None:
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if module.NAME not in key]


class Projections(Auxiliary):
    """The learned projections of a student, computed within its forward pass: results are appended to the
    `hidden_states` that it returns while training. The trainer keeps them in a file of their own."""

    NAME = f"{AUXILIARY}projections"

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.ModuleDict()
        self.layers: list[int] = []
        # FSDP and DeepSpeed save and load by the student's state dict, where they must see the projections.
        self.in_state_dict = False

    def add(self, layer: int, make: Callable[[], nn.Module], like: torch.device) -> int:
        """Adds a map of hidden state `layer`, made by `make`; returns its place among the maps."""
        # The data order and dropout of the run must not depend on how many projections it has.
        with torch.random.fork_rng(devices=[]):
            self.maps[str(len(self.layers))] = make().to(like)
        self.layers.append(layer)
        return len(self.layers) - 1

    def _append(self, student: nn.Module, args: Any, output: Any) -> Any:
        states = getattr(output, "hidden_states", None)
        if student.training and states:
            more = (p(states[i]) for p, i in zip(self.maps.values(), self.layers, strict=True))
            output.hidden_states = (*states, *more)
        return output

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        """Nothing unless `in_state_dict`: `maps.state_dict()` has the weights."""
        kind = nn.Module if self.in_state_dict else Auxiliary
        return kind.state_dict(self, *args, destination=destination, **kwargs)


def add_projection(student: nn.Module, layer: int, make: Callable[[], nn.Module], states: int) -> int:
    """Puts a projection of hidden state `layer` (0 for the embeddings) into the student. `make` returns the module,
    which holds no `nn.Linear`; `states` is the number of hidden states of the student itself. Returns the index of the
    result in the student's `hidden_states` while it is trained."""
    projections = getattr(student, Projections.NAME, None) or Projections()
    place = projections.add(layer, make, like=next(student.parameters()).device)
    projections.install(student)
    return states + place
