# SPDX-License-Identifier: Apache-2.0
"""Images and sounds of a data set that cannot be read: they are named before work starts."""

from __future__ import annotations

import io
import wave
from pathlib import Path

import numpy as np
from datasets import Audio, Dataset, Image
from PIL import Image as Pictures

from ..bars import progress_bar
from ..schema import brief
from .columns import row_of

_DECODED = 10_000  # rows; of more only the headers are looked at
_LOWEST_RATE = 1_000  # samples a second: below it nobody understands speech


def refuse_damaged(rows: Dataset, description: str) -> None:
    """Raises `ValueError`: a file of a column of images or sounds is missing or damaged; says which row, and why."""
    for name, feature in rows.features.items():
        if not isinstance(feature, (Image, Audio)):
            continue
        files = rows.select_columns(name).cast_column(name, type(feature)(decode=False))[name]
        for number, file in enumerate(progress_bar(files, desc=f"Checking {name}")):
            if file is None or (file["bytes"] is None and "://" in (file["path"] or "://")):
                continue  # nothing, which is refused where it is read, or what is downloaded there
            try:
                content = Path(file["path"]).read_bytes() if file["bytes"] is None else file["bytes"]
                if isinstance(feature, Image):
                    _open_image(content, len(rows) <= _DECODED)
                else:
                    _open_sound(content)
            except (OSError, SyntaxError, ValueError, EOFError, Pictures.DecompressionBombError) as error:
                where = f" ({file['path']})" if file["path"] else ""
                raise ValueError(
                    f"The {name} in row {row_of(rows, number)} of {description}{where} cannot be read ({type(error).__name__}: {brief(error)}). "
                    "Mend it or leave the row out."
                ) from error


def to_mode(image: Pictures.Image, mode: str) -> Pictures.Image:
    """An image with 8 bits a channel. One of 16 bits, or of 32 with values above 255, is scaled: Pillow would make white of what is
    above 255. Raises `ValueError`: its pixels are floats, of which nothing says the range."""
    if image.mode == "F":
        raise ValueError(
            "An image has pixels that are floats, of which nothing says the range. Save it with 8 or 16 bits."
        )
    if image.mode.startswith("I;16") or (image.mode == "I" and np.asarray(image).max() > 255):
        image = Pictures.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    return image.convert(mode)


def _open_image(content: bytes, decoded: bool) -> None:
    with Pictures.open(io.BytesIO(content)) as image:
        if decoded:
            image.draft("RGB", (1, 1))  # a JPEG at an eighth of its size
            image.load()
        else:
            image.verify()


def _open_sound(content: bytes) -> None:
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
