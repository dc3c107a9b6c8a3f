# SPDX-License-Identifier: Apache-2.0
"""Which files of a folder a model repository may hold, and why not the others."""

from __future__ import annotations

import os
import pickletools
import re
import stat
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]  # exported there, without __all__

from .secrets import find_secrets, find_secrets_in_file, redact

Contents = dict[str, Path | bytes]
_Found = defaultdict[str, list[str]]  # what is wrong with a folder: names by reason
_UNREADABLE = "not readable: {}"
_CODE = "Python, though no configuration names custom code (`auto_map`): {}"

# Weights of OpenVINO end as pickles of PyTorch do.
_PICKLES = re.compile(
    r"(?!openvino_\w+\.bin$).*\.(bin|pt|pth|pkl|pickle|ckpt|joblib|dill|npy|npz|sav|mar)", re.IGNORECASE
)
_MODEL_FILES = re.compile(
    r"""(.+\.(safetensors|json|md|txt|ya?ml|jinja|png|jpe?g|gif|webp)
    |.+\.onnx(?:[._-]data(?:[._-]?\d+)?)?|openvino_\w+\.(xml|bin)
    |.+\.(model|spm|vocab|bpe|codes|tiktoken)|.+\.model\.v\d+
    |(LICENSE|LICENCE|NOTICE|COPYING|USE_POLICY)(?:[.-][\w-]+)*)""",
    re.IGNORECASE | re.VERBOSE,
)
_BEGINNINGS = {
    b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstandard", b"7z\xbc\xaf": "7-Zip",
    b"Rar!\x1a": "RAR", b"\x04\x22\x4d\x18": "LZ4", b"PK\x03\x04": "zip", b"PK\x05\x06": "zip", b"\x89HDF\r\n": "HDF5",
    b"\x7fELF": "a program", b"\xcf\xfa\xed\xfe": "a program", b"\xca\xfe\xba\xbe": "a program", b"\0asm": "a program",
    b"#!": "a script", b"\x93NUMPY": "NumPy's", b"SQLite format 3": "SQLite", b"PAR1": "Parquet", b"%PDF": "PDF",
    b"!<arch>": "an archive",
}  # fmt: skip
_HEAD = 1 << 16
_NAMED = 50  # more names than that say nothing more
_LINKS = 40


def collect(folder: Path, ignore_patterns: list[str] | str | None) -> Contents:
    """Every file of the folder by its path in the repository, without hidden ones and those that a pattern names.
    Raises `ValueError`: one of them may not be published; the message names each, why, and what to do."""
    found: _Found = defaultdict(list)
    contents: Contents = {}
    root = Path(os.path.realpath(folder))
    for name, path in _wanted(_entries(root, root, found), ignore_patterns):
        try:
            reason = _objection(root, path, name)
        except OSError as error:
            reason, name = _UNREADABLE, f"{name} ({error.strerror or type(error).__name__})"
        if reason is None:
            contents[name] = path
        else:
            found[reason].append(name)
    code = [name for name in contents if name.endswith(".py")]
    configurations = [data for name, data in contents.items() if name.endswith(".json") and "/" not in name]
    if code and not any(isinstance(path, Path) and b'"auto_map"' in path.read_bytes() for path in configurations):
        for name in code:
            del contents[name]
            found[_CODE].append(name)
    if found:
        called = {reason: _listed([redact(name) for name in names]) for reason, names in found.items()}
        told = " ".join(f"Files that are {reason.format(names)}." for reason, names in called.items())
        every = [name.split(" (")[0] for names in found.values() for name in names]
        raise ValueError(
            f"{folder} was not pushed. {told} Move them out of the folder, push the folder that export_onnx wrote, or leave "
            f"them out: ignore_patterns={[redact(name) for name in every[:_NAMED]]}."
        )
    return contents


def check_secrets(folder: Path, contents: Contents, texts: Iterable[tuple[str, str]]) -> None:
    """Refuses secrets in the content of files, in their names and in other texts, given with what they are called.
    Raises `ValueError`: there are some; the message says where, and never what."""
    places: dict[str, list[str]] = {}
    for called, text in [*texts, *((f"the name of {redact(name)}", name) for name in contents)]:
        for kind in find_secrets(text.encode(errors="backslashreplace")):
            places.setdefault(kind, []).append(called)
    for name, data in contents.items():
        for kind in find_secrets(data) if isinstance(data, bytes) else find_secrets_in_file(data):
            places.setdefault(kind, []).append(redact(name))
    if not places:
        return
    told = "; ".join(
        f"{'an' if kind[0] in 'AaEeIiOo' else 'a'} {kind} in: {_listed(names)}"
        for kind, names in sorted(places.items())
    )
    renew = " at https://huggingface.co/settings/tokens" if "Hugging Face access token" in places else ""
    raise ValueError(
        f"{folder} was not pushed; there is {told}. Remove it from there, or leave the file out with ignore_patterns=, "
        f"and, as it may have been seen, renew it{renew}."
    )


def _entries(root: Path, folder: Path, found: _Found) -> Iterator[tuple[str, Path]]:
    """Name and path of all that is not hidden; a link to a folder is not entered."""
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        name = folder.relative_to(root).as_posix()
        found[_UNREADABLE].append(f"{name} ({error.strerror or type(error).__name__})")
        return
    for path in paths:
        if path.name.startswith("."):
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _entries(root, path, found)
        else:
            yield path.relative_to(root).as_posix(), path


def _wanted(
    entries: Iterator[tuple[str, Path]], ignore_patterns: list[str] | str | None
) -> Iterator[tuple[str, Path]]:
    """Those that no pattern names; a link to a folder also goes by the patterns of what is in a folder."""
    if ignore_patterns is None:
        yield from entries
        return
    for name, path in entries:
        names = [name, f"{name}/"] if path.is_symlink() else [name]
        if len(list(filter_repo_objects(names, ignore_patterns=ignore_patterns))) == len(names):
            yield name, path


def _objection(root: Path, path: Path, name: str) -> str | None:
    """Why a file may not be published, if so."""
    if path.is_symlink() and not _stays_inside(root, path):
        return "links to what is not in the folder, is hidden or is a folder: {}. Copy what is to be published"
    if not stat.S_ISREG(path.stat().st_mode):
        return "no files (pipes, sockets or devices): {}"
    if not name.isprintable() or "\\" in name or any(part != part.strip(" ") for part in name.split("/")):
        return "called by characters that no repository takes: {}"
    plain = path.name.rstrip(". ")
    if _PICKLES.fullmatch(plain):
        return (
            "pickles by their names: {}. Loading one runs whatever code is in it, so only weights of safetensors, ONNX and OpenVINO "
            "are published; optimizer states and training arguments are not for others"
        )
    if plain != path.name or not (_MODEL_FILES.fullmatch(path.name) or path.name.endswith(".py")):
        return "nothing that a model repository holds: {}"
    if _is_disguised(path):
        return "of another kind than their names say, or packed, so that nobody can look into them: {}"
    return None


def _stays_inside(root: Path, path: Path) -> bool:
    """Whether a link leads, at every step, to a visible file of the folder."""
    for _ in range(_LINKS):
        here = Path(os.path.realpath(path.parent)) / path.name
        if not here.is_relative_to(root) or any(part.startswith(".") for part in here.relative_to(root).parts):
            return False
        if not here.is_symlink():
            return here.is_file()
        path = Path(os.path.normpath(here.parent / os.readlink(here)))
    return False


def _is_disguised(path: Path) -> bool:
    """Whether the content is a pickle, packed, a program or a data base, whatever the name says."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
    return (
        any(head.startswith(beginning) for beginning in _BEGINNINGS)
        or head[257:262] == b"ustar"
        or (head.startswith(b"MZ") and b"\0" in head[:64])
        or _is_pickle(head)
        or _is_deflated(head)
        or zipfile.is_zipfile(path)
    )


def _is_pickle(head: bytes) -> bool:
    """Whether the bytes are read as a pickle: by their protocol's mark, or to the end with a global name in it."""
    if len(head) > 8 and head[8:9] == b"{" and not any(head[4:8]):
        return False  # the length of a safetensors header can look like a mark
    names = []
    try:
        for opcode, _, _ in pickletools.genops(head):
            names.append(opcode.name)
            if len(names) > 4 and names[0] == "PROTO":
                return True
    except Exception:  # whatever pickletools stumbles on
        return False
    return bool(names) and (names[0] == "PROTO" or bool({"GLOBAL", "INST", "REDUCE", "OBJ"} & set(names)))


def _is_deflated(head: bytes) -> bool:
    """Whether the bytes are compressed by zlib, as joblib does."""
    if head[:1] != b"\x78" or len(head) < 3:
        return False
    try:
        return len(zlib.decompressobj().decompress(head, 1024)) > 0
    except zlib.error:
        return False


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(name if name.isprintable() else repr(name) for name in names[:_NAMED]) + more
