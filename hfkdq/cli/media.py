# SPDX-License-Identifier: Apache-2.0
"""Images and sounds of a data set that cannot be read: they are named before work starts."""

from __future__ import annotations

import io
import wave
from pathlib import Path
from typing import Any

from datasets import Audio, Dataset, Image
from PIL import Image as Pictures

from ..bars import progress_bar
from ..schema import brief

_READ_WHOLE = 10_000  # rows; of more only the beginning of each file is read
_LOWEST_RATE = 1_000  # samples a second: below it nobody understands speech


def refuse_damaged(rows: Dataset, description: str) -> None:
    """Raises `ValueError`: a file of a column of images or sounds is missing or damaged; says which row, and why."""
    for name, feature in rows.features.items():
        if isinstance(feature, (Image, Audio)):
            check = _image if isinstance(feature, Image) else _sound
            files = rows.select_columns(name).cast_column(name, type(feature)(decode=False))
            for number, row in enumerate(progress_bar(files, desc=f"Checking {name}")):
                file = row[name]
                if file is None:
                    continue  # refused where it is read
                try:
                    check(file, len(rows) <= _READ_WHOLE)
                except (OSError, SyntaxError, ValueError, EOFError, Pictures.DecompressionBombError) as error:
                    where = f" ({file['path']})" if file["path"] else ""
                    raise ValueError(
                        f"The {name} in row {number} of {description}{where} cannot be read ({type(error).__name__}: {brief(error)}). "
                        "Mend it or leave the row out."
                    ) from error


def _content(file: dict[str, Any]) -> bytes:
    if file["bytes"] is None and file["path"] is None:
        raise ValueError("neither bytes nor a path")
    return Path(file["path"]).read_bytes() if file["bytes"] is None else file["bytes"]


def _image(file: dict[str, Any], whole: bool) -> None:
    with Pictures.open(io.BytesIO(_content(file))) as image:
        if whole:
            image.draft("RGB", (1, 1))  # a JPEG at an eighth of its size
            image.load()
        else:
            image.verify()


def _sound(file: dict[str, Any], whole: bool) -> None:
    content = _content(file)
    if not content:
        raise ValueError("the file is empty")
    if content[:4] != b"RIFF":
        return  # whatever decodes it says what is wrong
    try:
        with wave.open(io.BytesIO(content)) as sound:
            rate, frames = sound.getframerate(), sound.getnframes()
    except wave.Error:
        return  # of a kind that `wave` does not know
    if rate < _LOWEST_RATE:
        raise ValueError(f"it says {rate} samples a second, and sounds have {_LOWEST_RATE:,} and more")
    if not frames:
        raise ValueError("it has no samples")
