# SPDX-License-Identifier: Apache-2.0
"""A model that learns beside the student, in the same optimizer, and teaches it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.utils import ModelOutput

from ..modeling.forwards import TEACHER_PREFIX, forward_columns
from ..objectives.base import Objective
from ..objectives.projections import Projections
from .base import Teacher
from .frozen import fingerprint


class PeerParameters(nn.Module):
    """The parameters of peers, as if they were the student's, so that optimizer, clipping and processes see them.

    Only the parameters ride in the student: what looks through its modules, as quantization and pruning do, finds no
    layers of another model there. Its state dict neither holds nor misses them.
    """

    NAME: ClassVar[str] = "hfkdq_companions"

    def __init__(self, models: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for owner, model in models.items():
            for name, parameter in model.named_parameters():
                self.register_parameter(f"{owner}/{name.replace('.', '/')}", parameter)
        self.outputs: list[Any] = []
        self.register_load_state_dict_post_hook(_forget_missing)  # type: ignore[no-untyped-call]

    def install(self, student: nn.Module) -> None:
        """Lets the student have the parameters, and return what was put into `outputs` beside its own.

        DistributedDataParallel finds out from what a forward pass returns which parameters have no part in it.
        """
        student.add_module(self.NAME, self)
        self._hook = student.register_forward_hook(self._append)

    def _append(self, student: nn.Module, args: Any, output: Any) -> Any:
        if not self.outputs or not isinstance(output, Mapping):
            return output
        others, self.outputs = [dict(other) for other in self.outputs], []
        return {**output, self.NAME: others}  # the classes of Transformers take no further entry

    def remove(self, student: nn.Module) -> None:
        """Takes them out of the student again."""
        if getattr(student, self.NAME, None) is self:
            delattr(student, self.NAME)
            self._hook.remove()

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        """Nothing: every peer has a state dict of its own."""
        return {} if destination is None else destination


def _forget_missing(module: nn.Module, incompatible: Any) -> None:
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if PeerParameters.NAME not in key]


class CoTrainedModel(Teacher):
    """A co-trained teacher during a training.

    Args:
        model (`PreTrainedModel`): the peer.
        objectives (list of `Objective`): what it learns, attached to it and the student.
        device (`torch.device`): where the training runs.
    """

    learns = True

    def __init__(self, model: Any, objectives: list[Objective], device: torch.device) -> None:
        self.model = model.to(device)
        self.objectives = objectives
        self.name = type(model).__name__
        self.fingerprint = f"{fingerprint(model)}, trained along with the student"
        self.columns = forward_columns(model)
        self.projections: Projections | None = getattr(model, Projections.NAME, None)

    def install(self) -> None:
        """Gives the model the learned maps of its objectives, for a training."""
        if self.projections is not None:
            self.projections.install(self.model)

    def remove(self) -> None:
        """Takes them out again, so that it is as it was built, and ready to be used."""
        self.model.eval()
        if self.projections is not None:
            self.projections.remove(self.model)

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What it is fed of a batch, labels included; a column with the prefix `teacher_` comes first."""
        own = {name: value for name, value in batch.items() if name in self.columns}
        return own | {n: batch[TEACHER_PREFIX + n] for n in self.columns if TEACHER_PREFIX + n in batch}

    def state(self) -> dict[str, torch.Tensor]:
        maps = {} if self.projections is None else self.projections.maps.state_dict()
        return {**self.model.state_dict(), **{f"{Projections.NAME}.{key}": value for key, value in maps.items()}}

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        prefix = f"{Projections.NAME}."
        maps = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        self.model.load_state_dict({key: value for key, value in tensors.items() if not key.startswith(prefix)})
        if self.projections is not None:
            self.projections.maps.load_state_dict(maps)


def without_graph(output: Any) -> Any:
    """An output whose tensors pass no gradient on."""
    if isinstance(output, torch.Tensor):
        return output.detach()
    if isinstance(output, Mapping):
        return ModelOutput({key: without_graph(value) for key, value in output.items() if key != "loss"})
    if isinstance(output, (tuple, list)):
        return type(output)(without_graph(value) for value in output)
    return output
