# SPDX-License-Identifier: Apache-2.0
"""Audio of a `datasets.Audio` column as samples at a model's rate."""

from __future__ import annotations

import io
import wave
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Audio, Dataset

from .columns import row_of

_Array = np.ndarray[Any, Any]
_INSTALL = "Install torchcodec, with which datasets reads audio of all kinds and brings them to any rate"


def decodable(rows: Dataset, column: str, rate: int) -> Dataset:
    """The rows with audio that [`samples_of`] reads: decoded by `datasets` if it can, else as bytes. Raises `ValueError`:
    a row has audio of a kind that cannot be read so."""
    if find_spec("torchcodec"):
        return rows.cast_column(column, Audio(sampling_rate=rate))
    rows = rows.cast_column(column, Audio(decode=False))
    for number, sound in enumerate(rows[column]):
        try:
            _plain(sound)
        except ValueError as error:
            raise ValueError(f"Row {row_of(rows, number)}: {error}") from error
    return rows


def samples_of(sound: Any, rate: int) -> _Array:
    """The samples of a clip in [-1, 1], float32 of shape `(samples,)`; of several channels their mean. Raises
    `ValueError`: nothing that is installed can read it, or bring it to `rate`."""
    if not isinstance(sound, dict) or "array" in sound:
        samples = np.asarray(sound["array"], dtype=np.float32)
        return samples if samples.ndim == 1 else samples.mean(0)
    channels, own, frames = _plain(sound)
    samples = np.frombuffer(frames, "<i2").reshape(-1, channels).mean(1, dtype=np.float32) / 32768
    return samples if own == rate else _resampled(samples, own, rate)


def _plain(sound: Any) -> tuple[int, int, bytes]:
    """Channels, samples a second and samples of a WAV file of 16 bits."""
    data = Path(sound["path"]).read_bytes() if sound["bytes"] is None else sound["bytes"]
    try:
        with wave.open(io.BytesIO(data)) as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            frames = file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise ValueError(f"The audio is no plain WAV file ({error}). {_INSTALL}.") from error
    if width != 2:
        raise ValueError(
            f"The audio files are WAV files of {8 * width} bits; 16 can be read without help. {_INSTALL}."
        )
    return channels, rate, frames


def _resampled(samples: _Array, own: int, rate: int) -> _Array:
    try:
        from scipy.signal import resample_poly
    except ImportError as error:
        raise ValueError(
            f"The audio has {own:,} samples a second and the model takes {rate:,}. {_INSTALL}; SciPy does for WAV files."
        ) from error
    return np.asarray(resample_poly(samples, rate, own), np.float32)
