# SPDX-License-Identifier: Apache-2.0
"""Puts cached outputs of a teacher into a batch, at the positions at which the batch has their inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from .info import ROW_CHECK, CachedOutput, CacheInfo
from .positions import own_positions, row_checks, told_positions
from .shards import decode


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
        own = [
            {k: v for k, v in row.items() if k not in columns} if isinstance(row, Mapping) else row for row in features
        ]
        batch = self.collator(own)
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
                sizes = told_positions(then), told_positions(now)
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
