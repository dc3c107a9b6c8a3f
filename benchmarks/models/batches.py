# SPDX-License-Identifier: Apache-2.0
"""Labelled batches of every kind of input, as a user's data would be: four examples, random and the same at every call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

SIZE, LENGTH, VOCABULARY, LABELS = 4, 12, 60, 3
Batch = dict[str, Any]


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def text(length: int = LENGTH) -> Batch:
    """Ids that are no special tokens, the last text shorter than the others."""
    ids = torch.randint(4, VOCABULARY, (SIZE, length), generator=_generator())
    mask = torch.ones_like(ids)
    mask[-1, 2 * length // 3 :] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def _classes() -> torch.Tensor:
    return torch.arange(SIZE) % LABELS


def _tokens(length: int = 5, most: int = VOCABULARY) -> torch.Tensor:
    return torch.randint(4, most, (SIZE, length), generator=_generator())


def classified_text(length: int = LENGTH) -> Batch:
    return {**text(length), "labels": _classes()}


def unmasked_text(length: int = LENGTH) -> Batch:
    return {name: value for name, value in classified_text(length).items() if name != "attention_mask"}


def masked_text(length: int = LENGTH) -> Batch:
    """Every third token has a label, padding none."""
    batch = text(length)
    hidden = (torch.arange(length) % 3 == 1) & batch["attention_mask"].bool()
    return {**batch, "labels": torch.where(hidden, batch["input_ids"], -100)}


def next_tokens(length: int = LENGTH) -> Batch:
    batch = text(length)
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def pairs(length: int = LENGTH) -> Batch:
    return {**text(length), "labels": _tokens()}


def pages(length: int = LENGTH) -> Batch:
    """Words with their boxes on a page."""
    corner = torch.randint(0, 20, (SIZE, length, 2), generator=_generator())
    return {**classified_text(length), "bbox": torch.cat([corner, corner + 10], dim=-1)}


def pixels(size: int = 32) -> Batch:
    return {"pixel_values": torch.randn(SIZE, 3, size, size, generator=_generator())}


def images(size: int = 32) -> Batch:
    return {**pixels(size), "labels": _classes()}


def areas(size: int = 32) -> Batch:
    return {**pixels(size), "labels": torch.randint(0, LABELS, (SIZE, size, size), generator=_generator())}


def boxes(size: int = 32) -> Batch:
    """Two objects in every image: centre, width and height as shares of its sides."""
    found = {"class_labels": torch.tensor([0, 1]), "boxes": torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.6, 0.6, 0.3, 0.4]])}
    return {**pixels(size), "labels": [dict(found) for _ in range(SIZE)]}


def masks(size: int = 32) -> Batch:
    """The left half of every image is of one class, the right one of another."""
    left = torch.zeros(size, size)
    left[:, : size // 2] = 1
    return {
        **pixels(size),
        "mask_labels": [torch.stack([left, 1 - left]) for _ in range(SIZE)],
        "class_labels": [torch.tensor([0, 1]) for _ in range(SIZE)],
    }


def videos(size: int = 16, frames: int = 4) -> Batch:
    return {"pixel_values": torch.randn(SIZE, frames, 3, size, size, generator=_generator()), "labels": _classes()}


def captions(size: int = 32) -> Batch:
    return {**pixels(size), "labels": _tokens()}


def questions(size: int, places: int, token: int) -> Batch:
    """A text whose first tokens stand for an image."""
    batch = next_tokens(LENGTH + places)
    for name in ("input_ids", "labels"):
        batch[name][:, :places] = token if name == "input_ids" else -100
    batch["attention_mask"][:, :places] = 1
    return {**batch, **pixels(size)}


def image_and_text(size: int = 32) -> Batch:
    return {**text(), **pixels(size), "return_loss": True}


def searched(size: int = 32) -> Batch:
    """Two texts for every image, which are looked for in it."""
    words = text()
    pairs = {name: torch.stack([value, value.flip(0)], dim=1).flatten(0, 1) for name, value in words.items()}
    return {**pairs, **pixels(size)}


def asked(size: int = 32) -> Batch:
    """A question about an image, and which answers are right."""
    right = torch.nn.functional.one_hot(_classes(), LABELS).float()
    return {**text(), **pixels(size), "labels": right}


def waves(samples: int = 4000) -> Batch:
    """Spoken words: sound, and the letters that are said."""
    sound = torch.randn(SIZE, samples, generator=_generator())
    return {"input_values": sound, "labels": _tokens(3, 12)}


def said(samples: int = 4000) -> Batch:
    return {"input_values": torch.randn(SIZE, samples, generator=_generator()), "labels": _tokens()}


def features(bins: int = 8, frames: int = 40) -> Batch:
    """A spectrum with the bins before the time."""
    return {"input_features": torch.randn(SIZE, bins, frames, generator=_generator()), "labels": _tokens()}


def frames(bins: int = 8, length: int = 40, most: int = VOCABULARY) -> Batch:
    """A spectrum with the time before the bins."""
    spectrum = torch.randn(SIZE, length, bins, generator=_generator())
    mask = torch.ones(SIZE, length, dtype=torch.long)
    return {"input_features": spectrum, "attention_mask": mask, "labels": _tokens(3, most)}


def patches(bins: int = 16, length: int = 32) -> Batch:
    return {"input_values": torch.randn(SIZE, length, bins, generator=_generator()), "labels": _classes()}


def clips(bins: int = 16, length: int = 32) -> Batch:
    spectrum = torch.randn(SIZE, 1, length, bins, generator=_generator())
    return {**text(), "input_features": spectrum, "return_loss": True}


def series(length: int = 32, channels: int = 2) -> Batch:
    """What was, and what comes after."""
    whole = torch.randn(SIZE, length + 4, channels, generator=_generator())
    return {"past_values": whole[:, :length], "future_values": whole[:, length:]}


def forecasts(past: int = 18, future: int = 4) -> Batch:
    """What was and what comes after, with the time of each."""
    whole = torch.randn(SIZE, past + future, generator=_generator())
    times = torch.linspace(0, 1, past + future).repeat(SIZE, 1)[..., None]
    return {
        "past_values": whole[:, :past],
        "past_time_features": times[:, :past],
        "past_observed_mask": torch.ones(SIZE, past),
        "future_values": whole[:, past:],
        "future_time_features": times[:, past:],
    }


def collate(rows: list[Batch]) -> Batch:
    """Rows side by side; what differs in number, such as the objects of an image, in a list."""
    stacked: Callable[[list[Any]], Any] = lambda found: (  # noqa: E731
        torch.stack(found) if torch.is_tensor(found[0]) else found
    )
    names = rows[0].keys()
    lists = ("mask_labels", "class_labels")
    found = {name: [row[name] for row in rows] for name in names if name != "return_loss"}
    batch = {name: values if name in lists else stacked(values) for name, values in found.items()}
    return {**batch, **({"return_loss": True} if "return_loss" in names else {})}


def rows(batch: Batch) -> list[Batch]:
    """The examples of a batch."""
    return [{k: v if k == "return_loss" else v[i] for k, v in batch.items()} for i in range(SIZE)]
