# SPDX-License-Identifier: Apache-2.0
"""Data as they are named on the command line: a file, a folder or an id on the Hub, and which part of it."""

from __future__ import annotations

from pathlib import Path

from ..files import looks_local

LABELS = ("label", "labels")
SUFFIXES = (".parquet", ".csv", ".tsv", ".json", ".jsonl", ".txt", ".arrow")


def split_name(where: str) -> tuple[str, str | None, str | None]:
    """Path or id, configuration and split. Raises `ValueError`: it is no such name."""
    if Path(where).expanduser().exists():
        return where, None, None
    path, *rest = where.split(":")
    if not path or len(rest) > 2:
        raise ValueError(f"Cannot read {where!r} as DATA, DATA:SPLIT or DATA:CONFIGURATION:SPLIT.")
    config, split = (rest[0] if len(rest) == 2 else None), (rest[-1] if rest else None)
    return path, config or None, split or None


def check_data(where: str) -> Path | None:
    """The file or folder that is meant, if it is one of this machine. Raises `FileNotFoundError`: it is not there.
    Raises `ValueError`: there is nothing in it."""
    path, _, _ = split_name(where)
    local = Path(path).expanduser().absolute()
    if not local.exists():
        if looks_local(path) or local.suffix.lower() in SUFFIXES:
            raise FileNotFoundError(f"There is no file or folder {path}.")
        return None
    if local.is_file() and not local.stat().st_size:
        raise ValueError(f"{path} is empty. Give a file with rows.")
    if local.is_dir() and not any(local.iterdir()):
        raise ValueError(f"The folder {path} is empty. Give one with files of data.")
    return local
