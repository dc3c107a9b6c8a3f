# SPDX-License-Identifier: Apache-2.0
"""What the Makefile promises: both lines run, the last line says which failed, and a Python that fits is found or named."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TOOLS = ("bash", "make", "touch", "rm", "mkdir", "cp", "chmod", "grep", "sed", "expand", "cat")

pytestmark = pytest.mark.skipif(
    not shutil.which("make") or not Path("/bin/bash").exists(), reason="needs make and bash"
)


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)
    return path


def python(path: Path, version: str) -> Path:
    """Says that it is `version`; an environment that it makes holds one that succeeds at everything."""
    made = 'mkdir -p "$3/bin" && printf "#!/bin/bash\\necho \\"\\$@\\" >> \\"$3/log\\"\\n" > "$3/bin/python" && chmod +x "$3/bin/python"'
    return script(path, f'[ "$1" = -c ] && echo {version} && exit\n[ "$2" = venv ] && {made}')


@pytest.fixture
def checkout(tmp_path):
    """The Makefile and what it reads, and a PATH without any Python."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "constraints", tmp_path / "constraints")
    shutil.copytree(ROOT / "packages", tmp_path / "packages")
    (tmp_path / "path").mkdir()
    for tool in TOOLS:
        (tmp_path / "path" / tool).symlink_to(shutil.which(tool))
    return tmp_path


def make(checkout, *arguments):
    environment = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PYTHON")
    }
    return subprocess.run(
        ["make", *arguments], cwd=checkout, env={**environment, "PATH": str(checkout / "path")}, capture_output=True, text=True
    )  # fmt: skip


def lines(checkout, first, second):
    """Both environments as if installed, whose pythons note their arguments and exit with `first` and `second`."""
    for folder, code in ((".venv", first), (".venv-v5", second)):
        script(checkout / folder / "bin" / "python", f'echo "{folder} $@" >> log; exit {code}')
        for stamp in (".dev", ".bench"):
            (checkout / folder / stamp).touch()


@pytest.mark.parametrize(
    ("first", "second", "last"),
    [
        (0, 0, "both lines passed."),
        (1, 0, "line optimum (.venv) failed, the other passed."),
        (0, 1, "line v5 (.venv-v5) failed, the other passed."),
        (2, 5, "both lines failed."),
    ],
)
@pytest.mark.parametrize("target", ["test", "test-slow", "test-kernels"])
def test_the_second_line_runs_where_the_first_failed(checkout, target, first, second, last):
    lines(checkout, first, second)
    script(checkout / "tests" / "kernels.sh", '"$1" kernels')
    result = make(checkout, target)
    assert [line.split()[0] for line in (checkout / "log").read_text().splitlines()] == [".venv", ".venv-v5"]
    assert result.stdout.splitlines()[-1] == f"{target}: {last}"
    assert (result.returncode == 0) == (first == second == 0)


def test_fuzz_says_how_many_examples(checkout):
    lines(checkout, 0, 0)
    script(checkout / ".venv" / "bin" / "python", 'echo "$HFKDQ_FUZZ_EXAMPLES $@"')
    assert "10000 -m pytest tests/fuzz" in make(checkout, "fuzz").stdout
    assert "77 -m pytest tests/fuzz" in make(checkout, "fuzz", "EXAMPLES=77").stdout


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13"])
def test_a_python_that_works_is_taken_without_a_word(checkout, version):
    result = make(checkout, ".venv/.dev", f"PYTHON={python(checkout / 'py', version)}")
    assert result.returncode == 0, result.stderr
    assert "-c constraints/optimum.txt -e .[demo,dev]" in (checkout / ".venv" / "log").read_text()
    assert "nothing was ever run" not in result.stdout
    assert (checkout / ".venv" / ".dev").exists()


@pytest.mark.parametrize("version", ["3.9", "3.15", "2.7"])
def test_a_python_that_does_not_fit_is_refused_in_one_line(checkout, version):
    result = make(checkout, ".venv/.dev", f"PYTHON={python(checkout / 'py', version)}")
    assert result.returncode != 0
    said = [line for line in result.stderr.splitlines() if not line.startswith("make:")]
    assert said == [
        f"hfkdq needs Python 3.10, 3.11, 3.12, 3.13; found {checkout / 'py'}: {version}. "
        "Name one: make PYTHON=/path/to/python3.13"
    ]
    assert not (checkout / ".venv").exists()


def test_a_python_on_which_nothing_ran_says_so(checkout):
    result = make(checkout, ".venv/.dev", f"PYTHON={python(checkout / 'py', '3.14')}")
    assert result.returncode == 0
    assert (
        "On Python 3.14 all packages resolve, and nothing was ever run. What works: 3.10 3.11 3.12 3.13."
        in result.stdout
    )


@pytest.mark.parametrize(
    ("there", "taken"),
    [
        ({"python3": "3.13", "python3.11": "3.11"}, "python3"),
        ({"python3": "3.9", "python3.12": "3.12"}, "python3.12"),
        ({"python3": "3.14", "python3.10": "3.10"}, "python3.10"),
        ({"python3": "3.14"}, "python3"),
        ({"python3": "3.9", "python": "3.10"}, "python"),
    ],
)
def test_the_python_is_searched(checkout, there, taken):
    for name, version in there.items():
        python(checkout / "path" / name, version)
    script(checkout / "show.mk", "")
    (checkout / "show.mk").write_text("include Makefile\nshow:\n\t@echo $(PYTHON)\n")
    assert make(checkout, "-f", "show.mk", "show").stdout.strip() == taken


def test_without_any_python_it_says_what_was_found(checkout):
    assert "found no python3. Name one: make PYTHON=/path/to/python3.13" in make(checkout, ".venv/.demo").stderr
    python(checkout / "path" / "python3", "3.8")
    assert "found python3: 3.8. Name one" in make(checkout, ".venv/.demo").stderr
    assert "found /none: nothing that runs." in make(checkout, ".venv/.demo", "PYTHON=/none").stderr


def test_half_an_environment_is_removed(checkout):
    """Debian's python3 without python3-venv leaves a folder with a Python and without pip."""
    half = 'mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && exit 1'
    fake = script(checkout / "py", f'[ "$1" = -c ] && echo 3.11 && exit\n[ "$2" = venv ] && {half}')
    assert make(checkout, ".venv/.dev", f"PYTHON={fake}").returncode != 0
    assert not (checkout / ".venv").exists()


def test_the_lowest_versions_need_the_lowest_python(checkout):
    python(checkout / "path" / "python3", "3.12")
    assert (
        "hfkdq needs Python 3.10; found python3.10: nothing that runs." in make(checkout, ".venv-lowest/.dev").stderr
    )
    python(checkout / "path" / "python3.10", "3.10")
    assert make(checkout, ".venv-lowest/.dev").returncode == 0
    assert "-c constraints/lowest.txt" in (checkout / ".venv-lowest" / "log").read_text()


def test_every_target_is_described_and_every_documented_target_is_there():
    targets = set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, re.MULTILINE))
    described = set(re.findall(r"^([a-z][a-z-]*):.*## ", MAKEFILE, re.MULTILINE))
    phony = set(re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[1].split())
    assert targets == described == phony
    texts = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md", ".github/workflows/ci.yml"))  # fmt: skip
    documented = set(re.findall(r"`make ([a-z-]+)[ `]", texts)) | set(re.findall(r"run: make ([a-z-]+)", texts))
    assert documented <= targets


def test_what_is_pinned_is_what_pyproject_names():
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    tomllib = pytest.importorskip("tomllib")  # from Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    for file, line in (("optimum", ("optimum", "demo", "bench")), ("v5", ("onnx",)), ("lowest", ("optimum", "demo"))):
        pins = {}
        for row in (ROOT / "constraints" / f"{file}.txt").read_text(encoding="utf-8").splitlines():
            if row and not row.startswith("#"):
                pin = Requirement(row)
                pins.setdefault(canonicalize_name(pin.name), []).append(next(iter(pin.specifier)).version)
        for text in [
            *project["dependencies"],
            *(name for extra in (*line, "bnb", "plots", "detection", "dev") for name in extras[extra]),
        ]:
            wanted = Requirement(text)
            if wanted.name == "hfkdq":
                continue
            versions = pins.get(canonicalize_name(wanted.name))
            assert versions, f"constraints/{file}.txt does not pin {wanted.name}: make constraints"
            assert all(wanted.specifier.contains(version) for version in versions), (file, text, versions)
            if file == "lowest":
                lowest = [part.version for part in wanted.specifier if part.operator == ">="]
                assert not lowest or versions[0].startswith(lowest[0]), (text, versions)
