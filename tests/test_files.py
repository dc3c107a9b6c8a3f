# SPDX-License-Identifier: Apache-2.0
"""What is written is there whole or not at all; nothing of anybody else's is removed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hfkdq.files import replacing, sha256_of, staged, workspace

ROOT = Path(__file__).parents[1]


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def start(code: str, folder: Path) -> subprocess.Popen[str]:
    """A process that runs `code` in a staged folder and says when it is there."""
    program = (
        "import signal, sys, time, pathlib; from hfkdq.files import staged\n"
        # A shell's background jobs, and nohup, start with these ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler), signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        f"with staged(pathlib.Path({str(folder)!r})) as staging:\n"
        "    (staging.files / 'half').write_text('half')\n"
        "    print('there', flush=True)\n"
        f"    {code}\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout.readline() == "there\n"
    return process


def test_a_folder_appears_whole(tmp_path):
    with staged(tmp_path / "deep" / "out") as staging:
        (staging.files / "a").write_text("1")
        assert not (tmp_path / "deep" / "out").exists()
    assert names(tmp_path) == ["deep", "deep/out", "deep/out/a"]


def test_what_fails_leaves_nothing(tmp_path):
    def fail():
        with staged(tmp_path / "deep" / "out") as staging:
            (staging.files / "a").write_text("1")
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert names(tmp_path) == []


def test_what_came_up_meanwhile_stays_and_the_work_is_kept_beside_it(tmp_path):
    (tmp_path / "out-2").mkdir()
    with staged(tmp_path / "out") as staging:
        (staging.files / "a").write_text("mine")
        (tmp_path / "out").mkdir()
    assert staging.folder == tmp_path / "out-3"
    assert names(tmp_path) == ["out", "out-2", "out-3", "out-3/a"]


def test_a_second_writer_is_told_at_the_start(tmp_path):
    with staged(tmp_path / "out") as staging:
        (staging.files / "a").write_text("first")
        with pytest.raises(FileExistsError, match="Another process is writing"), staged(tmp_path / "out"):
            pass
        with staged(tmp_path / "other"):
            pass
    assert names(tmp_path) == ["other", "out", "out/a"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_takes_the_half_written_away(number, tmp_path):
    process = start("time.sleep(60)", tmp_path / "deep" / "out")
    process.send_signal(number)
    code = process.wait(timeout=30)
    assert code in (128 + number, -number)
    assert names(tmp_path) == []


def test_what_a_killed_process_left_is_found_by_the_next(tmp_path):
    process = start("time.sleep(60)", tmp_path / "out")
    with pytest.raises(FileExistsError), staged(tmp_path / "out"):
        pass
    process.kill()
    process.wait(timeout=30)
    assert names(tmp_path) == [".out.hfkdq", ".out.hfkdq/files", ".out.hfkdq/files/half", ".out.hfkdq/lock"]
    with staged(tmp_path / "out") as staging:
        assert names(staging.files) == []
    assert names(tmp_path) == ["out"]


def test_a_signal_that_somebody_handles_stays_theirs(tmp_path):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append("theirs"))
    try:
        with workspace(tmp_path / "out"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == ["theirs"]
    with workspace(tmp_path / "out"):
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_others_put_into_the_workspace_stays(tmp_path):
    with workspace(tmp_path / "out") as files:
        (files.parent / "notes").write_text("theirs")
    assert names(tmp_path) == [".out.hfkdq", ".out.hfkdq/notes"]
    with staged(tmp_path / "out"):
        pass
    assert (tmp_path / ".out.hfkdq" / "notes").read_text() == "theirs"


def test_a_file_is_replaced_at_once_or_not(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("old")

    def fail():
        with replacing(path) as temporary:
            temporary.write_text("half")
            assert path.read_text() == "old"
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert (path.read_text(), names(tmp_path)) == ("old", ["report.json"])
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert (path.read_text(), names(tmp_path)) == ("new", ["report.json"])


def test_the_hash_is_that_of_all_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc" * 2**20)
    told = subprocess.run(["sha256sum", tmp_path / "a"], capture_output=True, text=True, check=True).stdout
    assert sha256_of(tmp_path / "a") == told.split()[0]
