# SPDX-License-Identifier: Apache-2.0
"""Rows of a data set that was named on the command line: a file, a folder or an id on the Hub.

Knows names and splits; what is in a row is not its business.
"""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

CALIBRATION = ("train", "validation", "test")
EVALUATION = ("validation", "test")
_SUFFIXES = (".parquet", ".csv", ".tsv", ".json", ".jsonl", ".txt", ".arrow")


def load_rows(where: str, preferred: tuple[str, ...], samples: int | None) -> tuple[Dataset, str]:
    """The rows, and in words which they are.

    Args:
        where (`str`): a file, a folder or a Hub id; `:split` or `:configuration:split` may follow.
        preferred (`tuple[str, ...]`): splits to look for, the best first, where none is named.
        samples (`int`, *optional*): how many rows to draw at random, the same at every call; all by default.

    Returns:
        `tuple[Dataset, str]`: rows and description.

    Raises:
        ValueError: there is no such split, or none of those preferred, or it is empty.
        OSError: there are no such data.
    """
    path, config, split = _parts(where)
    splits = _load(path, config)
    name = _choose(splits, preferred, split, path)
    rows = splits[name]
    if not len(rows):
        raise ValueError(f"The split {name} of {path} is empty.")
    if samples is not None and samples < len(rows):
        # Files are often sorted by label.
        rows = rows.shuffle(seed=0).select(range(samples))
    return rows, f"{len(rows):,} rows of {path if Path(path).is_file() else f'{path} ({name})'}"


def _parts(where: str) -> tuple[str, str | None, str | None]:
    """Path or id, configuration and split."""
    if Path(where).expanduser().exists():
        return where, None, None
    path, *rest = where.split(":")
    if not path or len(rest) > 2:
        raise ValueError(f"Cannot read {where!r} as DATA, DATA:SPLIT or DATA:CONFIGURATION:SPLIT.")
    config, split = (rest[0] if len(rest) == 2 else None), (rest[-1] if rest else None)
    return path, config or None, split or None


def _load(path: str, config: str | None) -> DatasetDict:
    """All splits; those of a file are one, `train`."""
    local = Path(path).expanduser().absolute()
    if local.is_file():
        return load_dataset(str(local.parent), data_files=local.name)
    if local.is_dir():
        if (local / "dataset_dict.json").is_file() or (local / "state.json").is_file():
            saved = load_from_disk(str(local))
            return saved if isinstance(saved, DatasetDict) else DatasetDict(train=saved)
        return load_dataset(str(local), config)
    if path.startswith((".", "/", "~")) or path.count("/") > 1 or local.suffix in _SUFFIXES:
        raise FileNotFoundError(f"There is no file or folder {path}.")
    return load_dataset(path, config)


def _choose(splits: DatasetDict, preferred: tuple[str, ...], wanted: str | None, path: str) -> str:
    """The name of the split to use."""
    names = [str(name) for name in splits]
    if wanted is not None:
        if wanted not in names:
            raise ValueError(f"{path} has no split {wanted!r}; it has {', '.join(names)}.")
        return wanted
    if len(names) == 1:
        return names[0]
    for prefix in preferred:  # some have a validation_matched
        for name in names:
            if name == prefix or name.startswith(f"{prefix}_"):
                return name
    raise ValueError(
        f"{path} has the splits {', '.join(names)} and none of {', '.join(preferred)}. Name one: {path}:{names[0]}"
    )
