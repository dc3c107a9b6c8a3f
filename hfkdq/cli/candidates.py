# SPDX-License-Identifier: Apache-2.0
"""What is named on the command line to be measured: checkpoints, exported folders, ONNX files and ids on the Hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..export.record import export_file
from ..files import looks_local, refuse_missing
from ..provenance import ONNX_FOLDER, RUN, weight_files
from ..schema import brief, read_file

# What a repository of a model holds; pickles are not among it.
_WANTED = ["*.json", "*.safetensors", "*.onnx*", "openvino_*", "*.txt", "*.model", "*.jinja"]


@dataclass(frozen=True)
class Place:
    """Where a candidate lies, and what its row is called."""

    name: str
    folder: Path  # with its configuration and its tokenizer or processor
    path: Path | None  # the exported folder or the ONNX file; `None` for a checkpoint

    @property
    def has_checkpoint(self) -> bool:
        """Whether there are weights for PyTorch."""
        return any(self.folder.glob("*.safetensors")) and self.is_configured

    @property
    def is_configured(self) -> bool:
        """Whether there is a configuration."""
        return (self.folder / "config.json").is_file()


def split_names(given: list[str]) -> list[tuple[str, str]]:
    """Names and places: of `NAME=PLACE`, else by the last part of each, or by all of it where two would be called
    alike. Raises `ValueError`: two have one name. Raises `FileNotFoundError`: one is a file or folder of this machine,
    and is not there."""
    pairs = []
    for one in given:
        name, sign, where = ("", "", one) if Path(one).exists() else one.partition("=")
        pairs.append((name, where) if sign else ("", one))
        if not pairs[-1][1].strip() or (sign and not name.strip()):
            raise ValueError(
                f"There is no name of a checkpoint, file or folder in {one!r}. Write PLACE, or NAME=PLACE."
            )
        refuse_missing(pairs[-1][1])
    short = [name or _short(where) for name, where in pairs]
    names = [
        name if given or short.count(name) == 1 else where for name, (given, where) in zip(short, pairs, strict=True)
    ]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"Two candidates are called {twice!r}. Name them: ONE={twice} OTHER=...")
    return [(name, where) for name, (_, where) in zip(names, pairs, strict=True)]


def here(where: str) -> Path:
    """The file or folder of this machine; a repository of the Hub is downloaded, without pickles. Raises `OSError`: the
    Hub has no such repository, or cannot be reached."""
    return Path(where).expanduser() if looks_local(where) else _downloaded(where)


def find_place(name: str, where: str) -> Place:
    """What lies at a place; a repository of the Hub is downloaded, without pickles. Raises `ValueError`: there is
    nothing to measure, or there are several files. Raises `OSError`: the Hub has no such repository, or cannot be
    reached."""
    path = here(where)
    if path.is_file():
        if path.suffix not in RUN:
            raise ValueError(
                f"{where} is neither an ONNX file nor a folder. Name model.onnx, openvino_model.xml or the folder of a checkpoint."
            )
        beside = path.parent
        has_config, above_has = ((folder / "config.json").is_file() for folder in (beside, beside.parent))
        if beside.name == ONNX_FOLDER and above_has and not has_config:
            beside = beside.parent  # the layout of the Hub
        is_main = path.parent == beside and path.name in ("model.onnx", "openvino_model.xml")
        return Place(name, beside, beside if is_main and is_export(beside) else path)
    if is_export(path):
        return Place(name, path, path)
    # OpenVINO's tokenizers are files of the same kind, beside the model.
    files = [file for file in weight_files(path) if file.suffix in RUN and not file.stem.endswith("tokenizer")]
    if files and not any(path.glob("*.safetensors")):
        if len(files) > 1:
            told = ", ".join(file.relative_to(path).as_posix() for file in files[:6])
            raise ValueError(f"{where} has {told}. Name the one to measure, such as {files[0]}.")
        return find_place(name, str(files[0]))
    return Place(name, path, None)


def each_file(place: Place) -> list[Place]:
    """The files of the other precisions in an exported folder, where each is one file, and the folder itself last."""
    if place.path is None or not place.path.is_dir():
        return [place]
    from ..export.record import read_export
    from ..export.sample import file_name
    from ..report.data import named_precisions

    *others, _ = named_precisions(place.name, read_export(place.path))
    files = [(name, place.path / ONNX_FOLDER / file_name(own.get("suffix", ""))) for name, own in others]
    return [*(Place(name, place.folder, file) for name, file in files if file.is_file()), place]


def is_export(folder: Path) -> bool:
    """Whether `export_onnx` wrote a folder and left its record there."""
    record, runs = export_file(folder), any(file.suffix in RUN for file in weight_files(folder))
    return record.is_file() and "engines" not in read_file(record) and runs


def load_candidates(places: list[Place]) -> list[tuple[Place, Any, Any]]:
    """Every place with its model and its tokenizer or processor; a file without weights for PyTorch beside it takes the
    model of the first place, the first one a model without weights, and one without a tokenizer or processor that of
    the first that has one. Raises `ValueError`: a checkpoint is damaged, or a file has no configuration and there is no
    model to take its inputs from."""
    from ..modeling import build_recorded, load_checkpoint
    from .checkpoint import load_model, load_processor

    found: list[tuple[Place, Any, Any]] = []
    for place in places:
        if place.path is None:
            model = load_model(str(place.folder), None, calibrated=False)[0]
        elif place.has_checkpoint:
            model = load_checkpoint(str(place.folder))
        elif found:
            model = found[0][1]
        elif place.is_configured:
            model = build_recorded(str(place.folder)).to_empty(device="cpu")
        else:
            raise ValueError(
                f"{place.folder} has no checkpoint beside its ONNX file, which would say what it is for. Name one before it, as "
                "--teacher or as the first candidate."
            )
        found.append((place, model, load_processor(str(place.folder))))
    shared = next((processor for _, _, processor in found if processor is not None), None)
    return [(place, model, shared if processor is None else processor) for place, model, processor in found]


def _short(where: str) -> str:
    path = Path(where)
    if path.suffix in RUN:
        folder = path.parent.parent if path.parent.name == ONNX_FOLDER else path.parent
        path = folder if path.stem in ("model", "openvino_model") and folder.name else path.with_suffix("")
    return path.resolve().name if path.name in ("", "..") else path.name


def _downloaded(where: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(where, allow_patterns=_WANTED))
    except Exception as error:  # requests and httpx share no error class
        raise OSError(
            f"{where} is no file or folder here, and could not be read from the Hub ({type(error).__name__}: {brief(error)})."
        ) from error
