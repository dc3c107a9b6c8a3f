# SPDX-License-Identifier: Apache-2.0
"""Files of a fixed number of rows each, which any number of processes write and none leaves half written.

Knows folders, keys and Arrow; nothing of models.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
from accelerate import Accelerator
from datasets.utils import tqdm

from .codec import features_of
from .info import ROW_CHECK, CacheInfo
from .keys import refuse_other_key, short_hash

def prepared(folder: str | os.PathLike[str] | None, info: CacheInfo, accelerator: Accelerator) -> Path:
    """The folder of the parts, checked to be of this key."""
    default = Path(datasets.config.HF_DATASETS_CACHE) / "hfkdq" / short_hash(info.key)
    place = default if folder is None else Path(folder)
    record = place / "cache.json"
    if record.exists():
        refuse_other_key(place, json.loads(record.read_text(encoding="utf-8"))["key"], info.key)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        place.mkdir(parents=True, exist_ok=True)
        with _replacing(record) as written:
            written.write_text(info.to_json(), encoding="utf-8")
    accelerator.wait_for_everyone()
    return place


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary name, which becomes `path` once all is written."""
    written = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield written
        os.replace(written, path)
    finally:
        written.unlink(missing_ok=True)


def _parts(info: CacheInfo, place: Path) -> list[tuple[Path, int, int]]:
    rows, size = info.key["rows"], info.key["part_rows"]
    return [(place / f"part-{i // size:05d}.arrow", i, min(i + size, rows)) for i in range(0, rows, size)]


def write_parts(
    run: _Runner, source: _Source, plan: Plan, info: CacheInfo, place: Path, batch_size: int, accelerator: Accelerator
) -> None:
    own = _parts(info, place)[accelerator.process_index :: accelerator.num_processes]
    done = sum(stop - start for path, start, stop in own if path.exists())
    total = sum(stop - start for _, start, stop in own)
    schema = _schema(info)
    hidden = not accelerator.is_local_main_process or None
    with tqdm(total=total, initial=done, unit=" rows", desc="Teacher outputs", disable=hidden) as bar:
        for path, start, stop in own:
            if path.exists():
                continue
            with _replacing(path) as written, pa.OSFile(str(written), "wb") as sink:
                with pa.ipc.new_stream(sink, schema) as writer:
                    for first in range(start, stop, batch_size):
                        last = min(first + batch_size, stop)
                        cells = _cells(run, source.features(first, last), source, plan, info, first)
                        writer.write_batch(_record_batch(cells, schema))
                        bar.update(last - first)
    accelerator.wait_for_everyone()


def _schema(info: CacheInfo) -> pa.Schema:
    columns = {name: kind for output in info.outputs for name, kind in features_of(output).items()}
    return datasets.Features({**columns, ROW_CHECK: datasets.Value("int64")}).arrow_schema


def _record_batch(cells: list[dict[str, Any]], schema: pa.Schema) -> pa.RecordBatch:
    arrays = [pa.array([cell[field.name] for cell in cells], type=field.type) for field in schema]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def assembled(dataset: Any, info: CacheInfo, place: Path) -> Any:
    paths = [path for path, _, _ in _parts(info, place)]
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        raise ValueError(
            f"{place} lacks {', '.join(missing[:8])}, though every process is done. With several machines it must lie on a "
            "disk that they share: give such a folder."
        )
    parts = datasets.concatenate_datasets([datasets.Dataset.from_file(str(path)) for path in paths])
    whole = datasets.concatenate_datasets([dataset.with_format(None), parts], axis=1)
    return with_info(_formatted_as(whole, dataset, info), info)
