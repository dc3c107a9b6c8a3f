# SPDX-License-Identifier: Apache-2.0
"""Where the files of an export lie: beside the checkpoint, or as repositories on the Hub have them, several precisions
below `onnx/`."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..provenance import ONNX_FOLDER, describe_files
from .choices import HUB
from .precisions import Precision
from .record import MANIFEST

# What transformers.js calls 8-bit files; those after the first are for more of them in one folder.
_EIGHT_BITS = ("_quantized", "_int8", "_int8_weights")
_SUFFIXES = {
    "float32": ("",), "float16": ("_fp16",), "float16_weights": ("_fp16", "_float16_weights"), "int8": _EIGHT_BITS,
    "dynamic": _EIGHT_BITS, "int8_weights": _EIGHT_BITS, "int4_weights": ("_q4",), "int2_weights": ("_q2",),
}  # fmt: skip
# What sentence-transformers calls a file of 8-bit weights of each type.
_SENTENCE_NAMES = {"int8": "model_qint8_avx512_vnni.onnx", "uint8": "model_quint8_avx2.onnx"}


def file_suffixes(precisions: Sequence[Precision]) -> list[str]:
    """What the names of files of each precision end in; `ValueError` where two would have the same name."""
    names = [precision.name for precision in precisions]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"quantization names {twice!r} {names.count(twice)} times; its files would have one name.")
    found: dict[str, str] = {}
    # The integers of a training or a calibration are those that are found without a name.
    for name in sorted(names, key=lambda name: (list(_SUFFIXES).index(name) if name in _SUFFIXES else 99, name)):
        free = [suffix for suffix in _SUFFIXES.get(name, (f"_{name}",)) if suffix not in found.values()]
        found[name] = free[0]
    return [found[name] for name in names]


def assemble(written: Mapping[str, Path], facts: Sequence[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Moves what `export_onnx` has `written` for one precision each, by the ends of their files' names and with the
    record of each, into an empty folder, and returns the record of all. The first has the checkpoint that stays."""
    (folder / ONNX_FOLDER).mkdir()
    (main, first), *_ = written.items()
    for suffix, place in written.items():
        keeps_empty = suffix == main and (place / MANIFEST).is_file()
        for path in sorted(place.glob("*.onnx")):
            _move(path, folder / ONNX_FOLDER / f"{path.stem}{suffix}.onnx", keeps_empty)
    for path in first.iterdir():
        if not path.name.endswith((".onnx_data", ".onnx.data")):  # empty, and of no file
            path.rename(folder / path.name)
    with suppress(FileNotFoundError):
        _point_to(folder / MANIFEST, main)
    each = {suffix: {**own, "suffix": suffix} for suffix, own in zip(written, facts, strict=True)}
    for typed in [one for one in each.values() if one.get("weight_type") in _SENTENCE_NAMES and "pooling" in one][:1]:
        _also(folder / ONNX_FOLDER / f"model{typed['suffix']}.onnx", _SENTENCE_NAMES[typed["weight_type"]])
    common = ("files", "model", "versions")
    others = {one["kind"]: {key: one[key] for key in one if key not in common} for one in each.values()}
    return {**each[main], "layout": HUB, "precisions": others, "files": describe_files(folder)}


def _move(path: Path, target: Path, keeps_empty: bool) -> None:
    """Moves an ONNX file under another name, and the weights that may lie beside it."""
    for end in ("_data", ".data"):
        beside = path.with_name(f"{path.name}{end}")
        if not beside.is_file() or not (keeps_empty or beside.stat().st_size):
            continue
        data = target.with_name(f"{target.name}{end}")
        if beside.stat().st_size:
            import onnx
            from onnx.external_data_helper import _get_all_tensors, uses_external_data

            model = onnx.load(path, load_external_data=False)
            for tensor in _get_all_tensors(model):
                for entry in tensor.external_data if uses_external_data(tensor) else ():
                    entry.value = data.name if entry.key == "location" else entry.value
            onnx.save(model, path)
        beside.rename(data)
    path.rename(target)


def _point_to(manifest: Path, suffix: str) -> None:
    """Has the manifest of `transformers.exporters` name the files where they are now."""
    data = json.loads(manifest.read_text())
    for entry in data["components"].values():
        entry["file"] = f"{ONNX_FOLDER}/{Path(entry['file']).stem}{suffix}.onnx"
    manifest.write_text(json.dumps(data, indent=2) + "\n")


def _also(path: Path, name: str) -> None:
    """Gives a file a second name, without a second copy where the file system can."""
    try:
        os.link(path, path.with_name(name))
    except OSError:
        shutil.copyfile(path, path.with_name(name))
