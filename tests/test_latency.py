# SPDX-License-Identifier: Apache-2.0
"""The processes that time engines import what their parent imports, and nothing that lies about."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hfkdq.measuring import worker
from hfkdq.measuring.latency import TimedEngine, package_folders, time_engines
from hfkdq.measuring.torch_engine import torch_call
from tests import tiny

ROOT = Path(__file__).parents[1]


@pytest.fixture
def checkpoint(tmp_path):
    tiny.bert().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    """A folder with files that are called like packages, which tell when they run; and a token in the environment."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    names = ("numpy", "torch", "json", "pathlib", "typing", "sitecustomize", "usercustomize", "yaml", "hfkdq", "regex")
    for name in names:
        told = f"import os; open({str(tmp_path / 'ran')!r}, 'a').write('{name} ' + str(dict(os.environ)))"
        (folder / f"{name}.py").write_text(told)
    (folder / "safetensors").mkdir()
    (folder / "safetensors" / "__init__.py").write_text((folder / "numpy.py").read_text())
    return folder


def engine(checkpoint):
    ids = np.arange(4)[None]
    return TimedEngine("torch", torch_call, checkpoint, {"input_ids": ids, "attention_mask": np.ones_like(ids)})


@pytest.mark.one_line
def test_files_of_the_current_folder_do_not_run(checkpoint, hostile, tmp_path, monkeypatch):
    monkeypatch.chdir(hostile)
    monkeypatch.setenv("PYTHONSTARTUP", str(hostile / "numpy.py"))
    monkeypatch.setenv("PYTHONPATH", str(hostile))  # as this process was not started with it
    assert time_engines([engine(checkpoint)], threads=1, rounds=1)[0].calls >= 10
    assert not (tmp_path / "ran").exists()


@pytest.mark.one_line
def test_a_path_from_here_is_found_from_there(checkpoint, monkeypatch):
    monkeypatch.chdir(checkpoint.parent)
    assert time_engines([engine(Path("model"))], threads=1, rounds=1)[0].calls >= 10


@pytest.mark.one_line
def test_secrets_stay_with_the_parent(checkpoint, monkeypatch, tmp_path):
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MY_API_KEY"):
        monkeypatch.setenv(name, "pretend")
    monkeypatch.setenv("HARMLESS", "hf_" + "A1b2C3d4" * 5)
    monkeypatch.setenv("KEPT", "kept")
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(k["env"]) or popen(*a, **k))
    time_engines([engine(checkpoint)], threads=1, rounds=1)
    assert started[0]["KEPT"] == "kept"
    assert not {"HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MY_API_KEY", "HARMLESS"} & started[0].keys()


def run_worker(code: str, *entries: Path) -> str:
    """What a worker sees once it has set up its imports."""
    program = f"""
import runpy, sys
space = runpy.run_path({worker.__file__!r})
space["_import_from"]({[str(entry) for entry in entries]!r}, {str(ROOT / "hfkdq")!r})
{code}
"""
    return subprocess.run(
        [sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_the_standard_library_comes_before_what_is_installed(tmp_path):
    backports = ("argparse", "graphlib", "statistics")  # which nothing has imported by then
    for name in backports:
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('an old backport')")
    (tmp_path / "only_here.py").write_text("WHERE = 'installed'")
    code = (
        f"assert not set({backports}) & set(sys.modules)\n"
        f"import {', '.join(backports)}, only_here, numpy; print(only_here.WHERE, numpy.__version__)"
    )
    assert run_worker(code, tmp_path) == f"installed {np.__version__}"


def test_hfkdq_comes_from_its_own_folder_and_brings_no_neighbours(tmp_path):
    code = f"import hfkdq, sys; print(hfkdq.__file__, {str(ROOT)!r} in sys.path)"
    assert run_worker(code) == f"{ROOT / 'hfkdq' / '__init__.py'} False"
    with pytest.raises(subprocess.CalledProcessError):
        run_worker("import tests.tiny")


def test_packages_are_looked_for_where_this_process_found_them(monkeypatch):
    folders = package_folders()
    assert str(Path(np.__file__).parents[1]) in folders
    assert os.getcwd() not in folders
    monkeypatch.syspath_prepend("")
    assert package_folders() == folders


def test_python_m_leaves_the_current_folder_alone(hostile, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for name in ("hfkdq", "json", "pathlib", "typing"):  # Python itself would run these
        (hostile / f"{name}.py").unlink()
    (hostile / "sitecustomize.py").unlink()
    (hostile / "usercustomize.py").unlink()
    command = [sys.executable, "-m", "hfkdq", "card", "nothing.json"]
    told = subprocess.run(command, cwd=hostile, env=environment, capture_output=True, text=True)
    assert told.returncode == 1
    assert "nothing.json" in told.stderr
    assert not (tmp_path / "ran").exists()
