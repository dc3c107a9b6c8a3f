# SPDX-License-Identifier: Apache-2.0
"""Proves that files take other sizes along the axes that they leave open, and fixes those along which they do not.

Axes are known by the names that files give them; nothing is known of architectures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..measuring.evaluation import Runner
from .inputs import Tensors
from .runner import ENCODER, SINGLE
from .verify import Parity, compare, run_torch

logger = logging.get_logger(__name__)
Axes = Mapping[str, Mapping[int, str]]


@dataclass(frozen=True)
class Trial:
    """A batch that has another size along one axis, and what torch gives for it; `None` if it takes no other size.

    `counts` is whether the axis is that of the examples; files were traced with the size `traced`.
    """

    axis: str
    counts: bool
    traced: int
    size: int
    batch: Tensors
    expected: Tensors | None


def open_axes(folder: Path, batch: Tensors) -> dict[str, dict[int, str]]:
    """The axes that the files in a folder leave open of what is in a batch: their numbers and names, by input."""
    encodes = (folder / f"{ENCODER}.onnx").is_file()
    shapes = _shapes(folder / f"{ENCODER if encodes else SINGLE}.onnx")
    if "decoder_input_ids" in batch and encodes:
        shapes["decoder_input_ids"] = ["batch_size", "decoder_sequence_length"]
    if any(name.startswith("past_key_values") for name in shapes):  # a mask is as long as cache and text together
        shapes = {name: ["batch_size", "sequence_length"] for name in shapes}
    known = {name: enumerate(shape) for name, shape in shapes.items() if name in batch}
    return {
        name: {axis: size for axis, size in sizes if isinstance(size, str) and size} for name, sizes in known.items()
    }


def _shapes(path: Path) -> dict[str, list[int | str]]:
    inputs = onnx.load(path, load_external_data=False).graph.input
    return {one.name: [dim.dim_param or dim.dim_value for dim in one.type.tensor_type.shape.dim] for one in inputs}


def trials(model: PreTrainedModel, batches: Sequence[Tensors], axes: Axes) -> Iterator[Trial]:
    """A batch of one for what counts examples, and one for each other axis of which all batches have the same size."""
    for name in sorted({axis for named in axes.values() for axis in named.values()}):
        places = [(each, axis) for each, named in axes.items() for axis, known in named.items() if known == name]
        seen = {batch[each].shape[axis] for batch in batches for each, axis in places if each in batch}
        counts = any(axis == 0 for _, axis in places)
        if len(seen) > 1 and (not counts or 1 in seen):
            continue
        given = {each: value for each, value in batches[0].items() if each in axes}
        size = next(given[each].shape[axis] for each, axis in places)
        expected: Tensors | None = None
        # A mask without an axis of its own name is cut with all that counts examples.
        all_counts = [(each, 0) for each, named in axes.items() if counts and 0 in named and each in given]
        ways = [(cut, index) for cut in (places, all_counts) for index in _sizes(size, given, cut, counts) if cut]
        for cut, index in ways:
            batch = dict(given)
            for each, axis in cut:
                batch[each] = batch[each].index_select(axis, index)
            with suppress(Exception):  # whatever a model says of a size that it cannot take
                expected = run_torch(model, [batch])[0]
                break
        yield Trial(name, counts, size, len(index), batch, expected)


def _sizes(size: int, batch: Tensors, places: Sequence[tuple[str, int]], counts: bool) -> Iterator[torch.Tensor]:
    """What to take along an axis for other sizes: one example, or more or less of it; the end of every text stays where a mask
    shows it."""
    if counts and size > 1:
        yield torch.arange(1)
        return
    ends = [int(batch[name].sum(axis).min()) for name, axis in places if name.endswith("mask")]
    count, every = max(1, min(size // 2, *(end - 2 for end in ends), size - 1)), torch.arange(size)
    yield torch.cat([every[: 1 + count], every[1:] if size > 1 else every])
    if size > count:
        yield torch.cat([every[:1], every[1 + count :]])


def prove_sizes(
    folder: Path, runner: Runner, tried: Sequence[Trial], axes: Axes, check: Callable[[Parity], None]
) -> dict[str, dict[str, int]]:
    """Runs files on other sizes, and fixes the axes of their inputs along which they take none; those axes, by name and size.

    `check` raises `RuntimeError` for what is too far from torch. So does a file that takes no other number of examples.
    """
    sizes: dict[str, dict[str, int]] = {"other_sizes": {}, "fixed_axes": {}}
    for trial in tried:
        try:
            if trial.expected is None:
                raise RuntimeError("The torch model takes no other size.")
            check(compare(runner, [trial.batch], [trial.expected]))
        except RuntimeError as error:
            if trial.counts:
                told = f"The files work for no other size of {trial.axis} than the traced one, {trial.traced}"
                raise RuntimeError(f"{told}: {error}") from error
            if trial.expected is not None:
                logger.warning(f"The files take {trial.axis} of {trial.traced} alone, and not {trial.size}: {error}")
            _fix_axis(folder, trial.axis, axes, trial.traced)
            sizes["fixed_axes"][trial.axis] = trial.traced
        else:
            sizes["other_sizes"][trial.axis] = trial.size
    return {name: found for name, found in sizes.items() if found}


def _fix_axis(folder: Path, name: str, axes: Axes, size: int) -> None:
    """Gives the axes of that name of the first file's inputs a size."""
    path = next(path for path in (folder / f"{ENCODER}.onnx", folder / f"{SINGLE}.onnx") if path.is_file())
    file = onnx.load(path, load_external_data=False)
    for value in file.graph.input:
        for axis, known in axes.get(value.name, {}).items():
            if known == name:
                value.type.tensor_type.shape.dim[axis].dim_value = size
    onnx.save(file, path)
