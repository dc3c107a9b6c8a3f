# SPDX-License-Identifier: Apache-2.0
"""The size of a model's files after ordinary compression."""

from __future__ import annotations

import lzma
import zipfile
import zlib
from bz2 import BZ2Compressor
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ..bars import progress_bar

WEIGHT_FILES = ("*.safetensors", "*.onnx", "*.onnx_data", "openvino_*.xml", "openvino_*.bin")
"""Files of a model's weights; tokenizer and configuration are small and the same before and after."""

METHODS = ("xz", "gzip", "bz2", "zip")
"""Methods of [`compressed_size`], all of Python's standard library."""

_CHUNK = 1 << 20
_MIB = 1 << 20


@dataclass(frozen=True)
class CompressedSize:
    """Result of [`compressed_size`].

    Attributes:
        bytes (`int`): size after compression.
        bytes_before (`int`): size of the files as they are.
        files (tuple of `str`): names of the files that were counted.
        method (`str`): how they were compressed.
    """

    bytes: int
    bytes_before: int
    files: tuple[str, ...]
    method: str


def compressed_size(
    path: str | Path, method: str = "xz", *, files: Sequence[str] = WEIGHT_FILES, dictionary: int = 64 * _MIB
) -> CompressedSize:
    """The size of a model's files after ordinary compression with Python's standard library.

    Files are read piece by piece and nothing is written. Layers that share their weights ([`share_layers`]) lie in the
    file once each; a compressor finds the repetition only if it remembers as many bytes as lie between the two. `"gzip"`
    and `"zip"` remember 32 KiB and `"bz2"` 900 kB, which shrink clustered weights but not repeated layers. `"xz"`
    remembers its dictionary, and the default is that of `xz -9`, 64 MiB: enough for layers of 16 million float32 weights
    that follow each other. Compressing needs about 11 times the dictionary in memory, decompressing once.

    Args:
        path (`str` or `Path`): a file, or a folder, whose subfolders do not count.
        method (`str`, defaults to `"xz"`): `"xz"`, `"gzip"`, `"bz2"` or `"zip"` (one archive of all the files).
        files (sequence of `str`): patterns of the files in a folder that count; weights in safetensors, ONNX and OpenVINO by
            default. `("*",)` counts all.
        dictionary (`int`, defaults to 67,108,864): bytes that `"xz"` looks back, 4,096 to 1,610,612,736; not more than
            the file has are taken.

    Returns:
        [`CompressedSize`]: the bytes, and which files they are of.

    Raises:
        ValueError: an unknown method, a dictionary out of range, no such path, or no file in it that matches.

    Example:
        ```python
        >>> import tempfile
        >>> from pathlib import Path
        >>> from hfkdq.pruning import compressed_size
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "model.safetensors").write_bytes(bytes(100_000))
        >>> size = compressed_size(folder, "gzip")
        >>> size.bytes < 200, size.bytes_before, size.files
        (True, 100000, ('model.safetensors',))

        ```
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is none of {', '.join(METHODS)}.")
    if not 4096 <= dictionary <= 1536 * _MIB:
        raise ValueError(f"dictionary={dictionary!r} must be 4,096 to 1,610,612,736 bytes, which is what xz can do.")
    found = _files(Path(path), files)
    before = sum(file.stat().st_size for file in found)
    with progress_bar(total=before, desc=f"Compressing ({method})", unit="B", unit_scale=True) as bar:
        if method == "zip":
            size = _zip_size(found, bar)
        else:
            size = 0
            for file in found:
                compressor = _compressor(method, file, dictionary)
                size += sum(len(compressor.compress(piece)) for piece in _pieces(file, bar)) + len(compressor.flush())
    return CompressedSize(size, before, tuple(file.name for file in found), method)


def _files(path: Path, patterns: Sequence[str]) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path} is no file and no folder. Save the model there by save_pretrained or export_onnx.")
    matching = sorted({file for pattern in patterns for file in path.glob(pattern) if file.is_file()})
    if not matching:
        there = ", ".join(sorted(file.name for file in path.iterdir())[:8]) or "nothing"
        raise ValueError(f"{path} has no file like {', '.join(patterns)}; it holds {there}. Name others: files=(...).")
    return matching


def _compressor(method: str, file: Path, dictionary: int) -> Any:
    if method == "gzip":
        return zlib.compressobj(wbits=31)  # 31: with the header and checksum of gzip
    if method == "bz2":
        return BZ2Compressor()
    # Presets 6 to 9 of xz differ in nothing but the dictionary.
    size = min(dictionary, max(file.stat().st_size, 4096))
    return lzma.LZMACompressor(filters=[{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": size}])


def _pieces(file: Path, bar: Any) -> Iterator[bytes]:
    with file.open("rb") as stream:
        while piece := stream.read(_CHUNK):
            yield piece
            bar.update(len(piece))


class _Counter:
    """A file that counts what is written and keeps nothing."""

    size = 0

    def write(self, data: bytes) -> int:
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """Nothing waits."""


def _zip_size(files: Sequence[Path], bar: Any) -> int:
    counter = _Counter()
    with zipfile.ZipFile(cast(Any, counter), "w", zipfile.ZIP_DEFLATED) as archive:
        for file in files:
            with archive.open(file.name, "w", force_zip64=True) as entry:
                for piece in _pieces(file, bar):
                    entry.write(piece)
    return counter.size
