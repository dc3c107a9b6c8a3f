# SPDX-License-Identifier: Apache-2.0
"""Cells of cached outputs, and their shards: files of a fixed number of rows, whole or absent, by any number of processes."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from accelerate import Accelerator
from transformers.utils import logging

from ..bars import progress_bar
from ..files import replacing
from ..schema import brief
from .info import ROW_CHECK, CachedOutput, CacheInfo, short_hash

logger = logging.get_logger(__name__)
RECORD = "cache.json"
# What `replacing` calls a file that is not finished.
_UNFINISHED = re.compile(rf"\.(part-\d{{5}}\.arrow|{re.escape(RECORD)})\.[0-9a-f]{{32}}\.tmp")


def prepare_folder(folder: str | os.PathLike[str] | None, info: CacheInfo, accelerator: Accelerator) -> Path:
    """The folder of the shards, with a record of what they depend on. Raises `ValueError`: it holds shards that depend
    on something else, or on what cannot be read."""
    default = Path(datasets.config.HF_DATASETS_CACHE) / "hfkdq" / short_hash(info.key)
    place = default if folder is None else Path(folder)
    record = place / RECORD
    if record.exists():
        then, now = _recorded_key(record), info.key
        differ = [name for name in {**then, **now} if then.get(name) != now.get(name)]
        if differ:
            told = "; ".join(f"{name} was {then.get(name)!r} and is {now.get(name)!r}" for name in differ)
            raise ValueError(
                f"{place} holds teacher outputs that were cached for something else: {told}. Give another folder, delete "
                "this one, or leave folder out: then each such key has its own."
            )
    elif any(place.glob("part-*.arrow")):
        raise ValueError(
            f"{place} holds shards of teacher outputs and no {RECORD} that says what they are of. Give another folder, or "
            "delete this one."
        )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        place.mkdir(parents=True, exist_ok=True)
        with replacing(record) as written:
            written.write_text(info.to_json(), encoding="utf-8")
    accelerator.wait_for_everyone()
    return place


def _recorded_key(record: Path) -> dict[str, Any]:
    try:
        key = json.loads(record.read_text(encoding="utf-8"))["key"]
        if not isinstance(key, dict):
            raise TypeError(f"its key is {key!r}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{record} is damaged ({type(error).__name__}: {brief(error)}), so it is not known what the shards beside it are of. Give "
            f"another folder, or delete {record.parent}."
        ) from error
    return key


def _shards(info: CacheInfo, place: Path) -> list[tuple[Path, int, int]]:
    rows, size = info.key["rows"], info.key["part_rows"]
    return [(place / f"part-{i // size:05d}.arrow", i, min(i + size, rows)) for i in range(0, rows, size)]


def write_shards(
    cells_of: Callable[[int, int], list[dict[str, Any]]], info: CacheInfo, place: Path, batch_size: int,
    accelerator: Accelerator,
) -> None:  # fmt: skip
    """Writes the missing shards of this process; then waits for the other processes. `cells_of(first, stop)` returns
    the cells of each of these rows, of which it is asked for `batch_size` at once."""
    own = _shards(info, place)[accelerator.process_index :: accelerator.num_processes]
    done = sum(stop - start for path, start, stop in own if path.exists())
    total = sum(stop - start for _, start, stop in own)
    hidden = not accelerator.is_local_main_process
    with progress_bar(total=total, initial=done, unit=" rows", desc="Teacher outputs", disable=hidden) as bar:

        def batches(start: int, stop: int) -> Iterator[list[dict[str, Any]]]:
            for first in range(start, stop, batch_size):
                last = min(first + batch_size, stop)
                yield cells_of(first, last)
                bar.update(last - first)

        try:
            for path, start, stop in (shard for shard in own if not shard[0].exists()):
                _write_shard(path, _schema(info), batches(start, stop))
        except KeyboardInterrupt:
            kept = sum(path.exists() for path, _, _ in own)
            told = f"Interrupted: {kept} of {len(own)} shards are kept in {place}"
            logger.warning(f"{told}; the same call goes on with them.")
            raise
    accelerator.wait_for_everyone()


def _write_shard(path: Path, schema: pa.Schema, batches: Iterator[list[dict[str, Any]]]) -> None:
    # Another run of the same key may be done first, and clean up.
    with (
        replacing(path, may_be_lost=True) as written,
        pa.OSFile(str(written), "wb") as sink,
        pa.ipc.new_stream(sink, schema) as writer,
    ):
        for cells in batches:
            arrays = [pa.array([cell[field.name] for cell in cells], type=field.type) for field in schema]
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))


def _schema(info: CacheInfo) -> pa.Schema:
    columns = {name: kind for output in info.outputs for name, kind in features_of(output).items()}
    return datasets.Features({**columns, ROW_CHECK: datasets.Value("int64")}).arrow_schema


def assemble(dataset: Any, info: CacheInfo, place: Path, accelerator: Accelerator) -> Any:
    """The dataset with the columns of the shards, without a format. Raises `ValueError`: a shard is missing or
    damaged."""
    shards = _shards(info, place)
    missing = [path.name for path, _, _ in shards if not path.exists()]
    if missing:
        raise ValueError(
            f"{place} lacks {', '.join(missing[:8])}, though every process is done. With several machines it must lie on a "
            "disk that they share: give such a folder."
        )
    if accelerator.is_main_process:  # of runs that were killed
        for path in place.iterdir():
            if _UNFINISHED.fullmatch(path.name):
                path.unlink(missing_ok=True)
    for path, start, stop in shards:
        _check_shard(path, _schema(info), stop - start)
    cached = datasets.concatenate_datasets([datasets.Dataset.from_file(str(path)) for path, _, _ in shards])
    return datasets.concatenate_datasets([dataset.with_format(None), cached], axis=1)


def _check_shard(path: Path, schema: pa.Schema, rows: int) -> None:
    try:
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
            table = reader.read_all()
            table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        wrong = f"{type(error).__name__}: {brief(error)}"
    else:
        if table.schema.equals(schema) and table.num_rows == rows:
            return
        wrong = f"{table.num_rows} rows of {rows}, columns {', '.join(table.schema.names)}"
    raise ValueError(f"{path} is damaged ({wrong}). Delete it, and the same call computes its rows anew.")


# Values of more than one axis are bytes: lists of them take longer to read than a small teacher to run.
_BYTES: dict[str, Any] = {"float16": np.dtype("<f2"), "int8": np.dtype("u1"), "int32": np.dtype("<i4")}
_LISTS = {"float16": "float16", "int8": "uint8", "int32": "int32"}


def features_of(output: CachedOutput) -> dict[str, Any]:
    """The types of the columns of an output. One axis per example is a list; more are the bytes of the values,
    little-endian, the last axis fastest. Of int8 there is a scale and a minimum in float32 for every vector along the
    last axis."""
    kind = datasets.Value("binary") if output.shape else datasets.List(datasets.Value(_LISTS[output.dtype]))
    return {output.column: kind, **dict.fromkeys(output.columns[1:], datasets.List(datasets.Value("float32")))}


def encode(output: CachedOutput, values: np.ndarray) -> dict[str, Any]:
    """The cells of one example from its values, `(positions, *output.shape)`, in float32 or int32: finite, but for minus
    infinity in float16. float16 keeps 11 bits (a relative error up to 2^-11); int8 is off by half a scale at most,
    `(maximum - minimum) / 510`. Raises `OverflowError`: values beyond the range of float16."""
    more: dict[str, Any] = {}
    if output.dtype == "int8":
        values, scale, minimum = quantize(values)
        more = {output.columns[1]: scale.reshape(-1), output.columns[2]: minimum.reshape(-1)}
    elif output.dtype == "float16":
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if not np.isfinite(half[np.isfinite(values)]).all():
            raise OverflowError(f"values up to {np.abs(values[np.isfinite(values)]).max():g}")
        values = half
    cell = np.ascontiguousarray(values, dtype=_BYTES[output.dtype])
    return {output.column: cell.tobytes() if output.shape else cell, **more}


def decode(output: CachedOutput, row: Mapping[str, Any]) -> np.ndarray:
    """The values of one example, `(positions, *output.shape)`: float16, float32 where they were int8, or int64. Raises
    `ValueError`: the bytes are no whole number of positions."""
    cell = row[output.column]
    if output.shape:
        flat = np.frombuffer(bytes(cell), dtype=_BYTES[output.dtype])
        per_position = int(np.prod(output.shape))
        if flat.size % per_position:
            raise ValueError(
                f"A cell of {output.column!r} has {flat.size} values, no multiple of {per_position}: something cut it, such "
                "as the numpy format of datasets, which drops zeros at the end of bytes. Use the python or torch format."
            )
        values: np.ndarray = flat.reshape(-1, *output.shape)
    else:
        values = np.asarray(cell).astype(_BYTES[output.dtype])
    if output.dtype == "int32":
        return values.astype(np.int64, copy=False)
    if output.dtype == "float16":
        return values
    scale, minimum = (np.asarray(row[column], dtype=np.float32) for column in output.columns[1:])
    leading = values.shape[:-1]
    return values.astype(np.float32) * scale.reshape(*leading, 1) + minimum.reshape(*leading, 1)


def quantize(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes from 0 to 255 with `values = codes * scale + minimum` up to half a scale, for vectors along the last axis.

    Of values of shape `(..., n)` returns codes `(..., n)` in uint8, and scale and minimum `(...)` in float32. The scale of
    equal values is 0.
    """
    values = values.astype(np.float32)
    minimum = values.min(axis=-1)
    scale = (values.max(axis=-1) - minimum) / np.float32(255)
    steps = np.where(scale > 0, scale, np.float32(1))
    codes = np.rint((values - minimum[..., None]) / steps[..., None]).clip(0, 255).astype(np.uint8)
    return codes, scale.astype(np.float32), minimum
