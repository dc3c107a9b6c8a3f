# SPDX-License-Identifier: Apache-2.0
"""Files of a fixed number of rows each, which any number of processes write and none leaves half written."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator
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
from .info import ROW_CHECK, CacheInfo
from .keys import refuse_other_key, short_hash

logger = logging.get_logger(__name__)
RECORD = "cache.json"
# What `replacing` calls a file that is not finished.
_UNFINISHED = re.compile(rf"\.(part-\d{{5}}\.arrow|{re.escape(RECORD)})\.[0-9a-f]{{32}}\.tmp")


def prepared(folder: str | os.PathLike[str] | None, info: CacheInfo, accelerator: Accelerator) -> Path:
    """The folder of the parts, with a record of their key.

    Raises:
        ValueError: it holds parts of another key, or of one that cannot be read.
    """
    default = Path(datasets.config.HF_DATASETS_CACHE) / "hfkdq" / short_hash(info.key)
    place = default if folder is None else Path(folder)
    record = place / RECORD
    if record.exists():
        refuse_other_key(place, _recorded_key(record), info.key)
    elif any(place.glob("part-*.arrow")):
        raise ValueError(
            f"{place} holds parts of teacher outputs and no {RECORD} that says what they are of. Give another folder, or "
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
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{record} is damaged ({type(error).__name__}: {brief(error)}), so it is not known what the parts beside it are of. Give "
            f"another folder, or delete {record.parent}."
        ) from error
    if not isinstance(key, dict):
        raise ValueError(f"{record} is damaged: its key is {key!r}. Give another folder, or delete {record.parent}.")
    return key


def _parts(info: CacheInfo, place: Path) -> list[tuple[Path, int, int]]:
    rows, size = info.key["rows"], info.key["part_rows"]
    return [(place / f"part-{i // size:05d}.arrow", i, min(i + size, rows)) for i in range(0, rows, size)]


def write_parts(
    cells_of: Callable[[int, int], list[dict[str, Any]]],
    info: CacheInfo,
    place: Path,
    batch_size: int,
    accelerator: Accelerator,
) -> None:
    """Writes the parts of this process that are not there yet; then waits for the other processes.

    Args:
        cells_of (callable): from the first row and the one behind the last to the cells of each row.
        info (`CacheInfo`): what is cached.
        place (`Path`): the folder of the parts.
        batch_size (`int`): rows asked of `cells_of` at once.
        accelerator (`Accelerator`): the processes.
    """
    own = _parts(info, place)[accelerator.process_index :: accelerator.num_processes]
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
                f"Interrupted: {kept} of {len(own)} parts are kept in {place}; the same call goes on with them."
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


def assembled(dataset: Any, info: CacheInfo, place: Path, accelerator: Accelerator) -> Any:
    """The dataset with the columns of the parts, without a format.

    Raises:
        ValueError: a part is missing or damaged.
    """
    paths = [path for path, _, _ in _parts(info, place)]
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        raise ValueError(
            f"{place} lacks {', '.join(missing[:8])}, though every process is done. With several machines it must lie on a "
            "disk that they share: give such a folder."
        )
    if accelerator.is_main_process:  # left behind by runs that were killed
        for path in place.iterdir():
            if _UNFINISHED.fullmatch(path.name):
                path.unlink(missing_ok=True)
    for path, start, stop in _parts(info, place):
        _check_part(path, _schema(info), stop - start)
    parts = datasets.concatenate_datasets([datasets.Dataset.from_file(str(path)) for path in paths])
    return datasets.concatenate_datasets([dataset.with_format(None), parts], axis=1)


def _check_part(path: Path, schema: pa.Schema, rows: int) -> None:
    """Refuses a part that is not what was written."""
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
