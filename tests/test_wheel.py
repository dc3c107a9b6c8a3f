# SPDX-License-Identifier: Apache-2.0
"""What a user installs: the wheel carries everything, and works in an environment that holds nothing else."""

import os
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def built(root: Path, folder: Path) -> Path:
    """The wheel of a distribution."""
    options = ["--no-deps", "--no-build-isolation", "-q", "-w", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(root)], check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return built(ROOT, tmp_path_factory.mktemp("wheel"))


def test_it_carries_templates_types_and_license_and_no_tests(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {"hfkdq/py.typed", "hfkdq/templates/model_card.md.j2", "hfkdq/measuring/worker.py"} <= set(names)
    assert not [name for name in names if name.startswith("optimum")]  # Transformers would take it for Optimum
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests", "examples", "benchmarks"))]


def test_the_command_of_optimum_is_one_file_of_a_distribution_of_its_own(tmp_path):
    # Others have a part in Optimum's folders.
    names = zipfile.ZipFile(built(ROOT / "packages" / "optimum-hfkdq", tmp_path)).namelist()
    assert [name for name in names if name.endswith(".py")] == ["optimum/commands/register/register_hfkdq.py"]


def test_optimum_is_available_only_where_it_is_installed():
    code = "import hfkdq; from transformers.utils import is_optimum_available; print(is_optimum_available())"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/").stdout
    try:
        version("optimum")
    except PackageNotFoundError:
        assert told == "False\n"
    else:
        assert told == "True\n"


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
