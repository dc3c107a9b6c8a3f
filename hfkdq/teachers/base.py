# SPDX-License-Identifier: Apache-2.0
"""The two sides of a teacher, how a user gives it and how it answers in a training, and by what it is known again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from torch import nn

from ..modeling.forwards import base_of
from ..objectives.base import Objective

Indices = Mapping[str, Collection[int] | None]
"""Of `"hidden_states"` and `"attentions"`, the entries that are read; `None` for all."""


class Teacher:
    """A model that a student learns from, during a training."""

    name: str
    """The class of its model."""
    fingerprint: str
    """By this a checkpoint knows it again."""
    columns: set[str]
    """The columns that batches must keep for it."""
    model: Any = None
    """The model; `None` where only its outputs were kept."""
    learns: ClassVar[bool] = False
    """Whether it is trained along with the student, by `objectives`."""
    objectives: Sequence[Objective] = ()
    first_bad_step: int | torch.Tensor = 0
    """The first step since the last look whose output was not finite; 0 for none."""

    def attach(self, student: Any) -> None:
        """Attaches its own `objectives` to its model and the student."""

    def check(self, indices: Indices) -> None:
        """Refuses, before training, hidden states or attentions that it cannot give."""

    def __call__(self, batch: Mapping[str, Any], needs: frozenset[str], indices: Indices, step: int) -> Any:
        """Its output for a batch of optimizer step `step`; the trainer itself runs a teacher that learns."""
        raise NotImplementedError

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The columns of a batch that a teacher that learns is fed, labels included."""
        raise NotImplementedError

    def install(self) -> None:
        """Makes it ready for a training."""

    def remove(self) -> None:
        """Undoes what `install` did."""

    def update(self, student: Any, progress: float) -> None:
        """Follows the student after an optimizer step."""

    def state(self) -> dict[str, torch.Tensor]:
        """Its tensors in a checkpoint."""
        return {}

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Restores it from a checkpoint."""

    def raise_if_bad(self, step: int) -> None:
        """Raises for the first step whose output was not finite; 0 is none."""


class TeacherSource:
    """A teacher as it is given to a trainer, which places it beside its student."""

    changes: ClassVar[bool] = False
    """Whether its weights change while the student is trained."""
    copies_student: ClassVar[bool] = False
    """Whether every new student needs a new one."""
    to_load: bool = False
    """Whether it is a name, still to be loaded."""
    frozen_model: Any = None
    """The model, if it is given and stays as it is."""

    def load(self, init_kwargs: Mapping[str, Any] | None) -> None:
        """Loads a model that was named, with these arguments of `from_pretrained`."""

    def model_for(self, student: Any, student_is_remade: bool) -> Any:
        """The model, or the description of one, that objectives are attached to.

        Raises:
            ValueError: it cannot teach this student, or one that `model_init` makes anew for every training.
        """
        raise NotImplementedError

    def place(self, model: Any, student: Any, accelerator: Accelerator, label_names: list[str]) -> Teacher:
        """The teacher on the device of the training, made of what `model_for` returned."""
        raise NotImplementedError


def refuse_shared_parameters(model: Any, student: Any) -> None:
    """Raises `ValueError` for a teacher that is the student, or has parameters that are trained as the student's."""
    trained = {id(p) for p in student.parameters() if p.requires_grad}
    if model is student or any(id(p) in trained for p in model.parameters()):
        raise ValueError(
            "teacher_model shares its parameters with the student, so it would be trained and frozen at once. "
            "Load it a second time or use copy.deepcopy; to learn from a PEFT student's own base model, give "
            "teacher_model=model.get_base_model()."
        )


_CHUNK = 2**24
_NOT_OF_THE_MODEL = ("transformers_version", "dtype", "torch_dtype")


def fingerprint(model: nn.Module) -> str:
    """Class of a model and a hash of its parameters: names, and shapes and 16 values of those in floats."""
    return _hashed(model, hashlib.sha256(), model.named_parameters(), sample=16)


def weights_fingerprint(model: nn.Module) -> str:
    """Class of a model and a hash of its configuration and of all its weights and persistent buffers in floats.

    All weights are read, at about a gigabyte per second, because a teacher that was trained a little further may differ
    in any of them. Of those that lie on disk under a `device_map`, only names and shapes count.
    """
    config = json.loads(base_of(model).config.to_json_string(use_diff=False))
    kept = {k: v for k, v in config.items() if not k.startswith("_") and k not in _NOT_OF_THE_MODEL}
    transient = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name not in transient]
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    return _hashed(model, digest, [*model.named_parameters(), *buffers])


def _hashed(model: Any, digest: Any, tensors: Iterable[tuple[str, torch.Tensor]], sample: int | None = None) -> str:
    for name, tensor in tensors:
        digest.update(name.encode())
        # When first used, bitsandbytes repacks weights in integers and casts biases up.
        if not tensor.is_floating_point():
            continue
        digest.update(f" {tuple(tensor.shape)}".encode())
        if tensor.device.type == "meta":
            continue
        values = tensor.detach().reshape(-1)[:: 1 if sample is None else max(tensor.numel() // sample, 1)]
        for chunk in torch.split(values, _CHUNK):
            digest.update(chunk.float().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return f"{type(base_of(model)).__name__} {digest.hexdigest()[:16]}"
