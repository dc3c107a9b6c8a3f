# SPDX-License-Identifier: Apache-2.0
"""Shards of a cache: files of a fixed number of rows each, written whole or not at all by any number of processes."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from accelerate import Accelerator
from datasets.utils import tqdm
from transformers.utils import logging

from ..files import replacing
from ..schema import brief
from .codec import features_of
from .fingerprints import short_hash
from .info import ROW_CHECK, CacheInfo

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
        _refuse_other_key(place, _recorded_key(record), info.key)
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


def _refuse_other_key(folder: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    differ = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    if differ:
        told = "; ".join(f"{name} was {then.get(name)!r} and is {now.get(name)!r}" for name in differ)
        raise ValueError(
            f"{folder} holds teacher outputs that were cached for something else: {told}. Give another folder, delete "
            "this one, or leave folder out: then each such key has its own."
        )


def _shards(info: CacheInfo, place: Path) -> list[tuple[Path, int, int]]:
    rows, size = info.key["rows"], info.key["part_rows"]
    return [(place / f"part-{i // size:05d}.arrow", i, min(i + size, rows)) for i in range(0, rows, size)]


def write_shards(
    cells_of: Callable[[int, int], list[dict[str, Any]]],
    info: CacheInfo,
    place: Path,
    batch_size: int,
    accelerator: Accelerator,
) -> None:
    """Writes the missing shards of this process; then waits for the other processes. `cells_of(first, stop)` returns
    the cells of each of these rows, of which it is asked for `batch_size` at once."""
    own = _shards(info, place)[accelerator.process_index :: accelerator.num_processes]
    done = sum(stop - start for path, start, stop in own if path.exists())
    total = sum(stop - start for _, start, stop in own)
    hidden = not accelerator.is_local_main_process
    with tqdm(total=total, initial=done, unit=" rows", desc="Teacher outputs", disable=hidden) as bar:
        try:
            for path, start, stop in own:
                if path.exists():
                    continue
                # Another run of the same key may be done first, and clean up.
                with replacing(path, may_be_lost=True) as written, _written_to(written, _schema(info)) as write:
                    for first in range(start, stop, batch_size):
                        last = min(first + batch_size, stop)
                        write(cells_of(first, last))
                        bar.update(last - first)
        except KeyboardInterrupt:
            kept = sum(path.exists() for path, _, _ in own)
            logger.warning(
                f"Interrupted: {kept} of {len(own)} shards are kept in {place}; the same call goes on with them."
            )
            raise
    accelerator.wait_for_everyone()


@contextlib.contextmanager
def _written_to(path: Path, schema: pa.Schema) -> Iterator[Callable[[list[dict[str, Any]]], None]]:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:

        def write(cells: list[dict[str, Any]]) -> None:
            arrays = [pa.array([cell[field.name] for cell in cells], type=field.type) for field in schema]
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))

        yield write


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
    """Refuses a shard that is damaged."""
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
