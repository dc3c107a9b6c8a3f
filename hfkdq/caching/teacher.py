# SPDX-License-Identifier: Apache-2.0
"""A teacher whose outputs were cached: how they come into a batch, at the positions of their inputs, and are read there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from transformers.utils import ModelOutput

from ..losses.divergences import TopLogits
from ..modeling.forwards import TEACHER_PREFIX
from ..teachers import Indices, Teacher, TeacherSource, weights_fingerprint
from .info import ROW_CHECK, CachedOutput, CacheInfo, cache_info
from .plan import MASKS, own_positions, row_checks
from .shards import decode


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


class CachedCollator:
    """Collates rows with the collator it wraps, and adds the teacher's outputs as tensors of the batch.

    Outputs go to the positions that are no padding, left or right: where `attention_mask` is 1, where the labels of an
    encoder-decoder are, or to the first frames of audio. Elsewhere they are 0, or of likeliest classes uniform, which
    masks leave out. A row whose inputs are not those that the teacher read is refused. Rows without cached outputs,
    such as those of an evaluation set, are left to the wrapped collator alone.

    Args:
        collator (callable): the collator of the training, from a list of rows to a batch.
        info (`CacheInfo`): what was cached, from `cache_info(dataset)`.

    Raises:
        ValueError: when called: rows with cached outputs among rows without, rows that were changed since, or a
            collator that does not return one row for each.
    """

    def __init__(self, collator: Callable[[Any], Any], info: CacheInfo) -> None:
        self.collator, self.info = collator, info

    def __call__(self, features: Sequence[Any]) -> Any:
        cached = [isinstance(row, Mapping) and ROW_CHECK in row for row in features]
        if any(cached) and not all(cached):
            raise ValueError(
                f"{cached.count(False)} of the {len(features)} rows of a batch have no cached teacher outputs. Call "
                "cache_teacher_outputs on the whole dataset."
            )
        columns = self.info.columns
        own = (
            {k: v for k, v in one.items() if k not in columns} if isinstance(one, Mapping) else one for one in features
        )
        batch = self.collator([*own])
        if not any(cached):
            return batch
        self._check_rows(batch, features)
        for output in self.info.outputs:
            missing = {column for column in output.columns for row in features if column not in row}
            if missing:
                told = ", ".join(sorted(missing))
                raise ValueError(f"A row has cached teacher outputs without {told}. Keep all columns in info.columns.")
            values = [decode(output, row) for row in features]
            batch[output.column] = self._placed(output, values, batch)
        return batch

    def _check_rows(self, batch: Any, features: Sequence[Mapping[str, Any]]) -> None:
        checks = row_checks(batch, self.info.inputs, len(features), self.collator)
        for row, (now, feature) in enumerate(zip(checks, features, strict=True)):
            then = int(feature[ROW_CHECK])
            if now != then:
                sizes = then >> 32, now >> 32  # the positions, as `row_checks` counts them
                told = f"{sizes[0]} positions then, {sizes[1]} now" if sizes[0] != sizes[1] else "other values"
                raise ValueError(
                    f"Row {row} of a batch is not what the teacher saw when its outputs were cached: {told} in "
                    f"{', '.join(self.info.inputs)}. The dataset was changed after that (tokenized, truncated or "
                    "augmented anew), or this collator changes rows. Call cache_teacher_outputs on the dataset as it "
                    "is trained on."
                )

    def _placed(self, output: CachedOutput, values: list[np.ndarray], batch: Any) -> torch.Tensor:
        kind = output.positions
        mask = None if kind is None else own_positions(batch, kind, self.info.outline)
        counts = [len(value) for value in values]
        expected = counts if mask is None else mask.sum(1).tolist()
        if counts != expected or (mask is None and len(set(counts)) > 1):
            raise ValueError(
                f"{output.column} is cached at {counts} positions for the rows of a batch which has {expected}"
                + (", and nothing tells which are padding" if mask is None else "")
                + ". The rows were truncated or padded otherwise when they were cached; call cache_teacher_outputs with "
                "the collator of the training."
            )
        stacked = torch.from_numpy(np.concatenate(values))
        if mask is None:
            return stacked.reshape(len(values), counts[0], *output.shape)
        placed = _filler(output, stacked.dtype).expand(*mask.shape, *output.shape).clone()
        placed[mask] = stacked
        return placed


def _filler(output: CachedOutput, dtype: torch.dtype) -> torch.Tensor:
    """What stands at padding: finite, and of likeliest classes a distribution over different ones."""
    if output.name == "top_indices":
        return torch.arange(output.shape[0], dtype=dtype)
    if output.name == "top_log_probabilities":
        return -torch.log(torch.tensor(float(output.shape[0]))).to(dtype)
    return torch.zeros((), dtype=dtype)
