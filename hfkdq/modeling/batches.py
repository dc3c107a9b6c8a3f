# SPDX-License-Identifier: Apache-2.0
"""Batches of model inputs from what a user gives as calibration data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase, default_data_collator
from transformers.utils import logging

from .forwards import forward_columns

Batches = Iterable[Mapping[str, Any]]


def make_batches(
    model: PreTrainedModel, calibration: Any, batch_size: int, data_collator: Any, processing_class: Any
) -> Batches:
    """Batches of model inputs: those that were given, or made of the examples of a `datasets.Dataset`."""
    if not isinstance(calibration, Dataset):
        return calibration  # type: ignore[no-any-return]
    accepted = {*forward_columns(model), "label", "label_ids"}
    unused = [column for column in calibration.column_names if column not in accepted]
    if data_collator is None and isinstance(processing_class, PreTrainedTokenizerBase):
        data_collator = DataCollatorWithPadding(processing_class)
    return DataLoader(
        calibration.remove_columns(unused), batch_size=batch_size, collate_fn=data_collator or default_data_collator
    )


def check_batch(batch: Mapping[str, Any], number: int) -> None:
    """Refuses a batch that is none, or holds NaN or infinite values."""
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"Calibration batch {number} is a {type(batch).__name__}. Expected a dict of model inputs, or a "
            "datasets.Dataset instead of batches."
        )
    for name, value in batch.items():
        if torch.is_tensor(value) and value.is_floating_point() and not bool(value.isfinite().all()):
            raise ValueError(
                f"{name} of calibration batch {number} is not finite (NaN or infinite), and would make the range of "
                "every layer behind it meaningless. Remove or repair these examples."
            )


def on_device(model: PreTrainedModel, batches: Batches, what: str) -> Iterator[dict[str, Any]]:
    """The batches on the model's device, checked, with a progress bar.

    Raises:
        ValueError: there is none, or one is not finite.
        TypeError: one that is no mapping.
    """
    count = 0
    for count, batch in enumerate(logging.tqdm(batches, desc=what, unit="batch"), start=1):
        check_batch(batch, count)
        yield {k: value.to(model.device) if torch.is_tensor(value) else value for k, value in batch.items()}
    if not count:
        raise ValueError("The calibration data hold no batch, so there is nothing to measure on. Give at least one.")
