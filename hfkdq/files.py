# SPDX-License-Identifier: Apache-2.0
"""Files and folders that appear whole or not at all, and are told apart from those of others."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

LOCK = "lock"
_CHUNK = 2**20


def sha256_of(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal digits."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def looks_local(name: str) -> bool:
    """Whether a name is that of a file or folder of this machine rather than an id on the Hub."""
    path = Path(name)
    has_shape = name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1 or "\\" in name
    return has_shape or os.path.lexists(path) or (len(path.parts) > 1 and Path(path.parts[0]).exists())


def refuse_missing(name: str) -> None:
    """Refuses a file or folder of this machine that is not there; an id on the Hub is left to be looked up. Raises
    `FileNotFoundError`: it is not there."""
    if looks_local(name) and not Path(name).expanduser().exists():
        raise FileNotFoundError(f"There is no file or folder {name}.")


def check_new(folder: Path) -> None:
    """Refuses a folder that is there, or that cannot be made. Raises `FileExistsError`: `folder` exists. Raises
    `NotADirectoryError`: it lies below a file. Raises `PermissionError`: what it lies in cannot be written to."""
    if os.path.lexists(folder):
        raise FileExistsError(f"{folder} exists. Export to a new folder, or remove this one first.")
    _check_place(folder, "made", "Export to another folder")


def _check_place(folder: Path, what: str, advice: str) -> None:
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{folder} cannot be {what}: {there} is a file. {advice}.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} cannot be {what}: {there} is read-only. {advice}.")


@dataclass(frozen=True)
class MarkedFiles:
    """Files and folders of one run that a later one may replace: those that a mark beside them tells, and no others."""

    names: tuple[str, ...]
    mark_name: str  # the file beside them that has the SHA-256 of each
    run: str  # what a run is called

    def mark(self, folder: Path, version: str) -> None:
        files = {p.relative_to(folder).as_posix(): sha256_of(p) for p in folder.rglob("*") if p.is_file()}
        text = json.dumps({"hfkdq": version, "files": files}, indent=2)
        (folder / self.mark_name).write_text(text, encoding="utf-8")

    def check(self, folder: Path, overwrite: bool) -> None:
        """Refuses a folder with files in the way, unless an earlier run wrote them and they may be replaced. Raises
        `FileExistsError`: naming what is in the way. Raises `NotADirectoryError`: `folder` is a file, or lies below
        one. Raises `PermissionError`: it cannot be written to."""
        _check_place(folder, "written to", "Name another folder")
        found = [path for name in self.names for path in _files_of(folder / name)]
        written = self._written(folder) if found else {}
        for path in found:
            known = written.get(path.relative_to(folder).as_posix())
            if path.is_symlink() or known is None or not path.is_file() or sha256_of(path) != known:
                raise FileExistsError(
                    f"{path} was not written by {self.run}, or was changed since, so it is not replaced. Name another folder "
                    "with --output_dir, or move it away."
                )
        if found and not overwrite:
            raise FileExistsError(
                f"{folder} holds the result of {self.run} already. Name another folder, or pass --overwrite to replace it."
            )

    def is_finished(self, folder: Path) -> bool:
        """Whether all that a run wrote is in its place; a process that was killed in the end has moved a part."""
        written = self._written(folder)
        return bool(written) and all((folder / name).exists() for name in written)

    def swap_in(self, new: Path, folder: Path, old: Path) -> None:
        """Moves what a run wrote into `folder`, and what an earlier one wrote there to `old`; all of it or nothing."""
        old.mkdir()
        moved: list[tuple[Path, Path]] = []
        try:
            # The mark first: what a killed process has moved is known by it.
            for name in (self.mark_name, *self.names):
                for source, target in ((folder / name, old / name), (new / name, folder / name)):
                    if os.path.lexists(source):
                        source.rename(target)
                        moved.append((source, target))
        except BaseException:
            for source, target in reversed(moved):
                target.rename(source)
            raise

    def _written(self, folder: Path) -> dict[str, Any]:
        try:
            written = json.loads((folder / self.mark_name).read_text(encoding="utf-8"))["files"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return {}
        return written if isinstance(written, dict) else {}


DEMO = MarkedFiles(
    names=("teacher", "onnx-float", "onnx-int8", "report.json", "report.html", "report.png", "README.md"),
    mark_name=".hfkdq-demo.json",
    run="a demo",
)
"""What `hfkdq demo` writes."""
COMPRESSED = MarkedFiles(
    names=("student", "onnx", "README.md", "report.json", "report.html", "report.png"),
    mark_name=".hfkdq-compress.json",
    run="hfkdq compress",
)
"""What `hfkdq compress` writes at the end, beside the recipe and the checkpoints of its training."""


def _files_of(path: Path) -> list[Path]:
    """The file at a path, or all that lies in the folder there; of an empty folder the folder."""
    if path.is_symlink() or not path.is_dir():
        return [path] if os.path.lexists(path) else []
    inside = list(path.iterdir())
    return [file for entry in inside for file in _files_of(entry)] if inside else [path]


@contextlib.contextmanager
def replacing(path: Path, may_be_lost: bool = False) -> Iterator[Path]:
    """A temporary name beside `path`, which takes its place once all is written; `may_be_lost` if others clean up."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        with contextlib.suppress(*[FileNotFoundError] * may_be_lost):
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def workspace(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder`, called `.NAME.hfkdq`, which is gone at the end, whatever happens. It is locked
    while it is used. One that a killed process has left is emptied and used again. SIGTERM ends the process only after
    the folder is gone, as Ctrl-C does. Parents that had to be made go too, unless something is in them then. Raises
    `FileExistsError`: another process is at work on the same `folder`. Raises `OSError`: the folder cannot be made."""
    place = folder.absolute().parent / f".{folder.name}.hfkdq"
    missing = [parent for parent in place.parents if not parent.exists()]
    with ended_by_signals():
        lock = _locked(place, folder)
        files = place / "files"
        try:
            if files.is_dir():  # a process that was killed has left it
                shutil.rmtree(files)
            files.mkdir()
            yield files
        finally:
            shutil.rmtree(files, ignore_errors=True)
            (place / LOCK).unlink(missing_ok=True)
            for made in (place, *missing):
                with contextlib.suppress(OSError):
                    made.rmdir()
            lock.release()


def _locked(place: Path, folder: Path) -> Any:
    for _ in range(10):
        place.mkdir(parents=True, exist_ok=True)
        lock = FileLock(place / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise FileExistsError(
                f"Another process is writing {folder} at this moment. Wait until it is done, or name another folder."
            ) from error
        except FileNotFoundError:  # the process before has just removed the folder
            continue
        if (place / LOCK).exists():
            return lock
        lock.release()
    raise FileExistsError(f"Other processes are writing {folder} at this moment. Name another folder.")


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Makes the signals that end a process raise `SystemExit` instead, so that what is to be cleaned up is."""

    def leave(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    names = ("SIGTERM", "SIGHUP") if threading.current_thread() is threading.main_thread() else ()
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    ours = [number for number in numbers if before[number] is signal.SIG_DFL]
    try:
        for number in ours:
            signal.signal(number, leave)
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


@dataclass
class Staging:
    """A folder in the making."""

    files: Path  # where to write
    folder: Path  # where it goes; after the end, where it went


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Staging]:
    """A new folder, written in a [`workspace`], that becomes `folder` at the end and is gone if that is not reached.
    If something of that name has come up meanwhile, the finished work is kept under the next free name, with a
    warning."""
    with workspace(folder) as files:
        staging = Staging(files, folder)
        yield staging
        number = 1
        while True:
            try:
                if not os.path.lexists(staging.folder):
                    files.rename(staging.folder)
                    break
            except OSError:
                if not os.path.lexists(staging.folder):
                    raise
            number += 1
            staging.folder = folder.with_name(f"{folder.name}-{number}")
    if staging.folder != folder:
        from transformers.utils import logging  # not at the top: who only checks a name waits for no import

        logging.get_logger(__name__).warning(
            f"{folder} came up while it was being written; what was finished is in {staging.folder}."
        )
