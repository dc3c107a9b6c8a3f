# SPDX-License-Identifier: Apache-2.0
"""A teacher whose outputs were cached: it reads them from the batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from transformers.utils import ModelOutput

from ..losses.divergences import TopLogits
from ..modeling.forwards import TEACHER_PREFIX
from ..teachers import Indices, Teacher, TeacherSource, weights_fingerprint
from .info import CacheInfo, cache_info
from .positions import MASKS


class CachedSource(TeacherSource):
    """The teacher whose outputs a dataset holds."""

    def __init__(self, info: CacheInfo) -> None:
        self.info = info

    def model_for(self, student: Any, student_is_remade: bool) -> Any:
        return self.info.outline

    def place(self, model: Any, student: Any, accelerator: Accelerator, label_names: list[str]) -> Teacher:
        return CachedTeacher(self.info, accelerator.device)


def cached_source(dataset: Any, given: Sequence[TeacherSource]) -> CachedSource | None:
    """The teacher whose outputs a dataset holds, in place of those given to the trainer; `None` where it holds none.
    Raises `ValueError`: the outputs are not those of the teacher that was given, or it is no single frozen model."""
    info = cache_info(dataset)
    if info is None:
        return None
    models = [source.frozen_model for source in given]
    if len(models) > 1 or None in models:
        raise ValueError(
            "train_dataset holds the outputs of one frozen teacher, but teacher_model is another kind of teacher, or "
            "several. Leave teacher_model out, or give the dataset without the outputs: "
            f"remove_columns({sorted(info.columns)})."
        )
    found = weights_fingerprint(models[0]) if models else info.key["teacher"]
    if found != info.key["teacher"]:
        raise ValueError(
            f"The outputs in train_dataset are those of {info.key['teacher']}, but teacher_model is {found}, another model "
            "or the same with other weights. Leave teacher_model out to learn from the cached outputs, or call "
            "cache_teacher_outputs again."
        )
    return CachedSource(info)


class CachedTeacher(Teacher):
    """Returns the outputs that [`CachedCollator`] put into the batch, on `device`, in place of a model."""

    def __init__(self, info: CacheInfo, device: torch.device | str) -> None:
        self.info, self.device = info, torch.device(device)
        self.name = str(info.teacher["model_class"])
        self.fingerprint = str(info.teacher.get("fingerprint", info.key["teacher"]))
        self.outline, self.layers = info.outline, info.layers
        self.columns = {*info.columns, *info.inputs, *MASKS, *(TEACHER_PREFIX + mask for mask in MASKS)}

    def check(self, indices: Indices) -> None:
        """Raises `ValueError` where objectives read a hidden state or an attention map that is not cached."""
        nothing = frozenset[int]()
        maps, read = indices.get("attentions", nothing), indices.get("hidden_states", nothing)
        if maps is None or maps:
            raise ValueError(
                "Cached outputs hold no attention probabilities. Give the teacher itself, or leave out objectives that "
                "need them."
            )
        wanted = range(len(self.outline.states())) if read is None else read
        missing = sorted(set(wanted) - set(self.layers))
        if missing:
            raise ValueError(
                f"The objectives read the hidden states {sorted(wanted)} of {self.name}, but of them {missing} are not "
                f"cached; {list(self.layers)} are. Call cache_teacher_outputs with hidden_states={sorted(wanted)}."
            )

    def __call__(self, batch: Mapping[str, Any], needs: frozenset[str], indices: Indices, step: int) -> Any:
        """The teacher's output for a batch: in float32, those of its cached outputs that are needed. Logits of the
        likeliest classes are [`TopLogits`]; hidden states that are not cached or needed are `None`. Raises
        `ValueError`: the batch brings no cached outputs."""
        found = {o.name: self._read(batch, o.column) for o in self.info.outputs if _wanted(o.name, needs, indices)}
        states: list[torch.Tensor | None] = [None] * (max(self.layers, default=-1) + 1)
        for layer in self.layers:
            states[layer] = found.pop(f"hidden_state_{layer}", None)
        if "top_indices" in found:
            found["logits"] = TopLogits(found.pop("top_log_probabilities"), found.pop("top_indices"))
        if any(state is not None for state in states):
            found["hidden_states"] = tuple(states)
        return ModelOutput(found)

    def _read(self, batch: Mapping[str, Any], column: str) -> Any:
        if column not in batch:
            raise ValueError(
                f"The batch has no {column!r}: its rows were not among those of cache_teacher_outputs, a transform dropped "
                "the column, or the collator is no CachedCollator. Train on the dataset that cache_teacher_outputs returned."
            )
        values = batch[column].to(self.device)
        return values.float() if values.is_floating_point() else values.long()


def _wanted(name: str, needs: frozenset[str], indices: Indices) -> bool:
    if not name.startswith("hidden_state_"):
        return bool(needs & {"logits", "outputs"})
    read = indices.get("hidden_states")
    return "hidden_states" in needs and (read is None or int(name.rpartition("_")[2]) in read)
