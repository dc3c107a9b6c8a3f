# SPDX-License-Identifier: Apache-2.0
"""Rows of a data set that was named on the command line: a file, a folder or an id on the Hub."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from datasets import Dataset, DatasetDict, Image, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from pyarrow import ArrowException

from ..schema import brief
from .columns import names_of
from .media import refuse_damaged
from .names import SUFFIXES, check_data, split_name

CALIBRATION = ("train", "validation", "test")
EVALUATION = ("validation", "test")


def load_rows(where: str, preferred: tuple[str, ...], samples: int | None) -> tuple[Dataset, str]:
    """The rows, all or `samples` of them drawn at random, the same at every call, and in words which they are. `where`
    is a file, a folder or a Hub id, which `:split` or `:configuration:split` may follow; where no split is named, the
    first of the `preferred` is taken. Raises `ValueError`: there is no such split, or none of those preferred, it is
    empty, or an image or a sound cannot be read. Raises `OSError`: there are no such data."""
    splits, name, path = _chosen(where, preferred)
    return _drawn(splits[name], name, path, samples, is_whole=Path(path).is_file())


def _drawn(rows: Dataset, name: str, path: str, samples: int | None, is_whole: bool = False) -> tuple[Dataset, str]:
    if not len(rows):
        raise ValueError(f"The split {name} of {path} is empty.")
    if len(names := rows.column_names) == 1 and set(names[0]) & set(";\t|"):
        raise ValueError(
            f"{path} has one column, {names[0]!r}. Columns are separated by commas, in a .tsv file by tabs."
        )
    if samples is not None and samples < len(rows):
        # Files are often sorted by label.
        rows = rows.shuffle(seed=0).select(range(samples))
    description = f"{len(rows):,} rows of {path if is_whole else f'{path} ({name})'}"
    refuse_damaged(rows, description)
    for column, feature in rows.features.items():
        if isinstance(feature, Image) and not feature.decode:  # as some were saved
            rows = rows.cast_column(column, Image(mode=feature.mode))
    return rows, description


def _load(path: str, config: str | None) -> DatasetDict:
    """All splits; those of a file are one, `train`."""
    local = check_data(path)
    try:
        if local is None:
            return load_dataset(path, config)
        if local.is_dir() and ((local / "dataset_dict.json").is_file() or (local / "state.json").is_file()):
            saved = load_from_disk(str(local))
            return saved if isinstance(saved, DatasetDict) else DatasetDict(train=saved)
        plain = _without_patterns(local)
        if plain.is_file():
            return load_dataset(str(plain.parent), data_files=plain.name)
        return load_dataset(str(plain), config)
    except FileNotFoundError as error:
        if local is None or "supported" not in str(error):
            raise
        raise ValueError(
            f"{path} has an ending that says nothing of what it is. Files of data are {', '.join(SUFFIXES)}, in small letters."
        ) from None
    except (DatasetsError, ArrowException, ValueError, KeyError, TypeError, UnicodeError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        advice = "Look at the file, or name another one; it may have no rows."
        advice = "Save it in UTF-8." if isinstance(cause, UnicodeError) else advice
        raise ValueError(
            f"{path} could not be read as data ({type(cause).__name__}: {brief(cause)}). {advice}"
        ) from error


def _without_patterns(local: Path) -> Path:
    """A name for a file or folder in which nothing is read as a pattern, as `datasets` does with brackets and stars."""
    if not set(str(local)) & set("*?[]{}"):
        return local
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    link = folder / f"data{local.suffix}"
    link.symlink_to(local, target_is_directory=local.is_dir())
    return link


def _chosen(where: str, preferred: tuple[str, ...]) -> tuple[DatasetDict, str, str]:
    """All splits, the name of the one to use, and their path."""
    path, config, wanted = split_name(where)
    splits = _load(path, config)
    names = [str(name) for name in splits]
    if wanted is not None and wanted not in names:
        raise ValueError(f"{path} has no split {wanted!r}; it has {', '.join(names)}.")
    name = wanted or (names[0] if len(names) == 1 else _first_of(names, preferred))
    if name is None:
        raise ValueError(
            f"{path} has the splits {', '.join(names)} and none of {', '.join(preferred)}. Name one: {path}:{names[0]}"
        )
    return splits, name, path


def _first_of(names: Iterable[str], preferred: tuple[str, ...]) -> str | None:
    """The first name by the first prefix that one has; some have a validation_matched."""
    found = (name for prefix in preferred for name in names if name == prefix or name.startswith(f"{prefix}_"))
    return next(found, None)


def load_split(
    where: str, samples: int | None, held_out: int | None
) -> tuple[tuple[Dataset, str], tuple[Dataset, str]]:
    """Rows to train on and others to measure on, of the same data, each as [`load_rows`] gives them. Measured on is the
    split validation or test where there is one beside that of training; else a tenth of the rows, drawn at random, the
    same at every call, which is kept back. Raises `ValueError`: there is no such split, or too few rows to keep any
    back. Raises `OSError`: there are no such data."""
    splits, name, path = _chosen(where, CALIBRATION)
    other = _first_of([other for other in map(str, splits) if other != name], EVALUATION)
    if other is not None:
        return _drawn(splits[name], name, path, samples), _drawn(splits[other], other, path, held_out)
    if len(splits[name]) < 2:
        raise ValueError(
            f"The split {name} of {path} has too few rows to keep some back: {len(splits[name])}, of {names_of(splits[name])}. "
            "Name other rows as data.eval."
        )
    parts = splits[name].train_test_split(test_size=max(1, len(splits[name]) // 10), seed=0)
    kept = _drawn(parts["test"], "kept back", path, held_out)
    return _drawn(parts["train"], "the others", path, samples), kept
