# SPDX-License-Identifier: Apache-2.0
"""What a user installs: the wheel carries everything, and works in an environment that holds nothing else."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(folder),
        str(ROOT),
    ]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("hfkdq-*.whl"))


def test_it_carries_templates_types_and_license_and_no_tests(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {"hfkdq/py.typed", "hfkdq/templates/model_card.md.j2", "hfkdq/measuring/worker.py"} <= set(names)
    # Others have a part in Optimum's folders, so that ours is one file.
    assert [name for name in names if name.startswith("optimum")] == ["optimum/commands/register/register_hfkdq.py"]
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests", "examples", "benchmarks"))]


@pytest.mark.slow
def test_it_works_in_an_empty_environment(wheel, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "env")], check=True)
    python = tmp_path / "env" / "bin" / "python"
    constraints = ROOT / "constraints" / "optimum.txt"
    install = [str(python), "-m", "pip", "install", "-q", "-c", str(constraints), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    environment = {**os.environ, "PYTHONPATH": ""}
    for command in ([str(python), "-c", "from hfkdq import *"], [str(tmp_path / "env" / "bin" / "hfkdq"), "--help"]):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
