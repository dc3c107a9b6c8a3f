# SPDX-License-Identifier: Apache-2.0
"""A teacher whose answers were written down: it reads them from the batch.

Stands where a frozen teacher stands in the trainer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from transformers.utils import ModelOutput

from ..losses.divergences import TopLogits
from ..modeling.forwards import TEACHER_PREFIX
from ..teachers import Teacher
from .info import CacheInfo
from .positions import MASKS


class CachedTeacher(Teacher):
    """Answers with the outputs that [`CachedCollator`] put into the batch.

    Args:
        info (`CacheInfo`): what was cached, from `cache_info(dataset)`.
        device (`torch.device`): where the outputs are wanted.

    Attributes:
        name (`str`): class of the teacher.
        fingerprint (`str`): that class and a hash of its weights.
        columns (set of `str`): the columns that batches must keep for it.
        outline (`ModelSignature`): the teacher as objectives see it when they are attached.
        layers (tuple of `int`): the hidden states that are cached.
    """

    def __init__(self, info: CacheInfo, device: torch.device | str) -> None:
        self.info, self.device = info, torch.device(device)
        self.name = str(info.teacher["model_class"])
        self.fingerprint = str(info.teacher.get("fingerprint", info.key["teacher"]))
        self.columns = {*info.columns, *info.inputs, *MASKS, *(TEACHER_PREFIX + mask for mask in MASKS)}
        self.outline = info.outline
        self.layers = info.layers

    def check(self, indices: Mapping[str, Collection[int] | None]) -> None:
        """Checks, before training, that all that objectives will read is cached.

        Args:
            indices (`dict`): by `"hidden_states"` and `"attentions"`, which of them are read; `None` for all.

        Raises:
            ValueError: a hidden state or attention map that is not cached.
        """
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

    def __call__(
        self,
        batch: Mapping[str, Any],
        needs: frozenset[str],
        indices: Mapping[str, Collection[int] | None],
        step: int,
    ) -> Any:
        """The teacher's output for a batch.

        Args:
            batch (`dict`): from a [`CachedCollator`].
            needs (`frozenset` of `str`): of `"logits"`, `"hidden_states"`, what is wanted.
            indices (`dict`): which hidden states are wanted; all others are `None`, as are those not cached.
            step (`int`): not used.

        Returns:
            `ModelOutput` with, in float32, `logits` (or [`TopLogits`]), `start_logits` and `end_logits`, `pred_boxes`
            and `hidden_states`, of what is cached and needed.

        Raises:
            ValueError: the batch brings no cached outputs.
        """
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

    def raise_if_bad(self, step: int) -> None:
        """Does nothing: outputs that are no numbers were refused when they were cached."""


def _wanted(name: str, needs: Collection[str], indices: Mapping[str, Collection[int] | None]) -> bool:
    if not name.startswith("hidden_state_"):
        return "logits" in needs
    read = indices.get("hidden_states")
    return "hidden_states" in needs and (read is None or int(name.rpartition("_")[2]) in read)
