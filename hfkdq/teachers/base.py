# SPDX-License-Identifier: Apache-2.0
"""The two sides of a teacher, how a user gives it and how it answers in a training, and by what it is known again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import torch
from accelerate import Accelerator
from torch import nn
from transformers.utils import logging

from ..modeling.forwards import TEACHER_PREFIX, base_of
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
    owned = ((path, name) for path, m in model.named_modules() for name in m._non_persistent_buffers_set)
    transient = {f"{path}.{name}" if path else name for path, name in owned}
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


logger = logging.get_logger(__name__)
_COLUMN = "input_ids"


def vocabulary_size(model: Any) -> int | None:
    """How many token ids a model has embeddings for; `None` for one that reads no tokens."""
    base = base_of(model)
    if getattr(base, "main_input_name", None) != _COLUMN:
        return None
    try:
        table = base.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    rows = getattr(table, "num_embeddings", None)
    return rows if isinstance(rows, int) else None


def check_vocabulary(teacher: Any, name: str, dataset: Any, student: Any = None) -> None:
    """Refuses a teacher called `name` that lacks embeddings for token ids of a data set.

    Not needed where `student` has embeddings for no more ids than the teacher. Of data sets that are no
    `datasets.Dataset` nothing is known before the training.

    Raises:
        ValueError: an id that the teacher has no embedding for.
    """
    size, own = vocabulary_size(teacher), None if student is None else vocabulary_size(student)
    if size is None or (own is not None and own <= size):
        return
    column = TEACHER_PREFIX + _COLUMN
    column = column if column in (getattr(dataset, "column_names", None) or ()) else _COLUMN
    largest = _largest(dataset, column)
    if largest is None:
        if own is not None and dataset is not None:
            logger.warning(
                f"{name} has {size:,} token ids and the student {own:,}; whether all ids in train_dataset are below {size:,} could "
                "not be looked up. One that is not ends the training."
            )
    elif largest >= size:
        raise ValueError(
            f"{name} ({type(base_of(teacher)).__name__}) has {size:,} token ids, and {column} of the data set goes up to {largest:,}, so "
            "it cannot read these rows. Take a teacher with the tokenizer that made them; for one with another tokenizer, "
            f"add its own ids as the column {TEACHER_PREFIX + _COLUMN}."
        )


def _largest(dataset: Any, column: str) -> int | None:
    """The largest number in a column of a data set; `None` where nothing tells without running its code."""
    if not isinstance(dataset, datasets.Dataset) or column not in dataset.column_names or not len(dataset):
        return None
    if dataset.format["type"] == "custom":
        return None
    tables = dataset.with_format("arrow", columns=[column]).iter(batch_size=10_000)
    found = [pc.max(_flat(table[column].combine_chunks())).as_py() for table in tables]
    return max((number for number in found if isinstance(number, int)), default=None)


def _flat(array: Any) -> Any:
    is_list = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    while any(test(array.type) for test in is_list):
        array = pc.list_flatten(array)
    return array
