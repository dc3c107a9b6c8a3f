# SPDX-License-Identifier: Apache-2.0
"""Files and folders that appear whole or not at all, and are told apart from those of others."""

from __future__ import annotations

import contextlib
import hashlib
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
from transformers.utils import logging

logger = logging.get_logger(__name__)
LOCK = "lock"
_CHUNK = 2**20


def sha256_of(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


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
    """An empty folder beside `folder`, called `.NAME.hfkdq`, which is gone at the end, whatever happens.

    It is locked while it is used. One that a killed process has left is emptied and used again. SIGTERM ends the process
    only after the folder is gone, as Ctrl-C does. Parents that had to be made go too, unless something is in them then.

    Raises:
        FileExistsError: another process is at work on the same `folder`.
        OSError: the folder cannot be made.
    """
    place = folder.absolute().parent / f".{folder.name}.hfkdq"
    missing = [parent for parent in place.parents if not parent.exists()]
    with _ended_by_signals():
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
    """Makes `place` and takes its lock."""
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
def _ended_by_signals() -> Iterator[None]:
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
    """A folder in the making.

    Attributes:
        files (`Path`): where to write.
        folder (`Path`): where it goes; after the end, where it went.
    """

    files: Path
    folder: Path


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Staging]:
    """A new folder, written in a [`workspace`], that becomes `folder` at the end and is gone if that is not reached.

    If something of that name has come up meanwhile, the finished work is kept under the next free name, with a warning.
    """
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
        logger.warning(f"{folder} came up while it was being written; what was finished is in {staging.folder}.")
