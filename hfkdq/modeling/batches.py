# SPDX-License-Identifier: Apache-2.0
"""Batches of model inputs from what a user gives as calibration data."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, PreTrainedModel, default_data_collator

from ..bars import progress_bar
from .examples import random_state_kept
from .forwards import forward_columns
from .masks import Batch

Batches = Iterable[Batch]


def make_batches(
    model: PreTrainedModel,
    data: Any,
    batch_size: int,
    data_collator: Callable[[list[Any]], Batch] | None,
    processing_class: Any,
    *,
    labels: bool = True,
) -> Batches:
    """Batches of model inputs: those that were given, or made of the examples of a data set as the Trainer does it.

    Args:
        model (`PreTrainedModel`): its forward signature tells which columns to keep.
        data (`datasets.Dataset`, `datasets.IterableDataset`, `torch.utils.data.Dataset` or iterable of `dict`): examples,
            or batches.
        batch_size (`int`): examples in a batch.
        data_collator (`Callable`, *optional*): makes a batch of examples. It gets all columns where the model takes none of
            them, as where it makes inputs of images.
        processing_class (tokenizer or processor, *optional*): pads the examples, if it can and there is no collator.
        labels (`bool`, defaults to `True`): whether labels are kept where there is no collator.

    Returns:
        iterable of `dict`: batches, anew each time it is gone through, but for batches that were given as an iterator.

    Raises:
        ValueError: the data set has not the columns that the model takes; while batches are made, its examples make none.
    """
    is_ours = isinstance(data, (Dataset, IterableDataset))
    if not is_ours and not _has_examples(data):
        return data
    columns = list((data.column_names if is_ours else None) or next(iter(data)))
    accepted = forward_columns(model)
    if labels:
        accepted |= {"label", "label_ids"}
    elif data_collator is None:
        accepted -= {"labels"}
    kept = [name for name in columns if name in accepted]
    # A transform makes the model's columns out of others, which must still be there.
    is_transformed = getattr(data, "format", {}).get("type") == "custom"
    selects = not is_transformed and (data_collator is None or model.main_input_name in kept)
    if selects:
        check_columns(kept, columns, model)
    if selects and is_ours:
        data = data.remove_columns([name for name in columns if name not in kept])
    if data_collator is None:
        made = getattr(
            processing_class, "model_input_names", ()
        )  # image processors pad images, which the Trainer does not
        pads = hasattr(processing_class, "pad") and ("input_ids" in made or "pixel_values" not in made)
        data_collator = DataCollatorWithPadding(processing_class) if pads else default_data_collator
    collate = data_collator
    if selects and not is_ours:
        wanted, given = set(kept), data_collator

        def collate(examples: list[Any]) -> Batch:
            return given([{name: one[name] for name in one if name in wanted} for one in examples])

    return _Collated(DataLoader(data, batch_size=batch_size, collate_fn=collate))


def first_batch(batches: Batches | None) -> Batch | None:
    """The first of batches that can be gone through again; `None` where there is none, or it cannot be made."""
    if batches is None or isinstance(batches, Iterator):
        return None
    with contextlib.suppress(Exception), random_state_kept():  # what is wrong with them is told where they are needed
        batch = next(iter(batches), None)
        return batch if isinstance(batch, Mapping) else None
    return None


def _has_examples(data: Any) -> bool:
    """Whether these are examples and no batches: a data set of torch's, or what has a length and numbers as one does."""
    if isinstance(data, torch.utils.data.Dataset):
        return True
    return hasattr(data, "__len__") and hasattr(data, "__getitem__") and not hasattr(data, "__iter__")


class _Collated:
    """The batches of a loader, with an error that says what to do where its examples make none."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self.loader)
        while True:
            try:
                batch = next(batches, None)
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"The examples of calibration make no batch: {error}. Pass the processing_class= that pads them, or the "
                    "data_collator= of your Trainer."
                ) from error
            if batch is None:
                return
            yield batch


def check_columns(kept: Iterable[str], columns: Iterable[str], model: PreTrainedModel) -> None:
    """Refuses data without the input of the model.

    Raises:
        ValueError: naming the columns.
    """
    if not {model.main_input_name, "inputs_embeds"} & set(kept):
        raise ValueError(
            f"calibration has the columns {', '.join(columns)}; {type(model).__name__} takes {model.main_input_name}. "
            "Tokenize or process it first, or pass the data_collator that does."
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


def _placed(value: Any, model: PreTrainedModel) -> Any:
    """A tensor, or the array or lists of numbers that stand for one, on the model's device."""
    if isinstance(value, (np.ndarray, list)):
        with contextlib.suppress(ValueError, TypeError, RuntimeError):  # lists of dictionaries, as labels of detectors
            value = torch.as_tensor(value)
    return value.to(model.device) if torch.is_tensor(value) else value


def on_device(model: PreTrainedModel, batches: Batches, what: str) -> Iterator[dict[str, Any]]:
    """The batches on the model's device, checked, with a progress bar.

    Raises:
        ValueError: there is none, or one is not finite.
        TypeError: one that is no mapping.
    """
    count = 0
    for count, batch in enumerate(progress_bar(batches, desc=what, unit="batch"), start=1):
        check_batch(batch, count)
        yield {name: _placed(value, model) for name, value in batch.items()}
    if not count:
        raise ValueError("The calibration data hold no batch, so there is nothing to measure on. Give at least one.")
