# SPDX-License-Identifier: Apache-2.0
"""The shape of the house: which room may know which, what is public, what an import costs."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hfkdq

pytestmark = pytest.mark.every_case

PACKAGE = Path(hfkdq.__file__).parent
# Imports run strictly downward: a room may import rooms of lower levels only.
LEVELS = {
    "fields": -3, "protocols": -3, "schedules": -2,
    "bars": -1, "files": -1, "schema": -1, "secrets": -1, "specs": -1, "version": -1,
    "facts": 0, "losses": 0,
    "modeling": 1, "provenance": 1,
    "objectives": 2, "collators": 2, "quantization": 2, "pruning": 2, "students": 2, "metrics": 2,
    "measuring": 3, "registration": 3, "teachers": 3,
    "export": 4, "caching": 4,
    "report": 5, "trainer": 5, "uploads": 5,
    "hub": 6, "recipes": 5,
    "demo": 7, "cli": 8, "__main__": 9,
}  # fmt: skip
FORBIDDEN = {"trainer": {"quantization", "pruning", "students"}}
MODULE_NAME = re.compile(r"^hfkdq(\.[a-z_]+)+(:\w+)?$")
ONLY_IN_EXPORT = {"onnx", "onnxruntime", "onnx_ir", "openvino", "optimum", "onnxscript"}
MODULES = sorted(
    path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if path.name != "__init__.py" or path.parent != PACKAGE
)


def room_of(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


def imports_of(path: Path) -> tuple[set[str], set[str]]:
    """Rooms of hfkdq that a module imports, and top-level names of other packages."""
    rooms, others = set(), set()
    package = ["hfkdq", *path.parts[:-1]]
    for node in ast.walk(ast.parse((PACKAGE / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            full = ".".join([*base, *([node.module] if node.module else [])])
            names = [full] if full != "hfkdq" else [f"hfkdq.{home(alias.name)}" for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and MODULE_NAME.match(node.value):
            module = node.value.partition(":")[0]  # what another process imports by its name
            names = [module] if PACKAGE.parent.joinpath(*module.split(".")).with_suffix(".py").is_file() else []
        else:
            continue
        for name in names:
            parts = name.split(".")
            (rooms if parts[0] == "hfkdq" else others).add(
                parts[1] if parts[0] == "hfkdq" and len(parts) > 1 else parts[0]
            )
    return rooms - {"hfkdq"}, others


def runtime_nodes(node: ast.AST):
    """All nodes but those under `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
            yield child
            yield from runtime_nodes(child)


def files_imported_by(path: Path, files: dict[str, Path]) -> set[str]:
    """The modules of `files` that a file imports, at the top or within a function."""
    package, found = ["hfkdq", *path.parts[:-1]], set()
    for node in runtime_nodes(ast.parse((PACKAGE / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            submodules = {f"{module}.{alias.name}" for alias in node.names}
            found |= {name if name in files else module for name in submodules}
    return found & files.keys()


def first_circle(paths: list[Path]) -> list[str] | None:
    """Modules that import one another in a circle, or `None`."""
    files = {".".join(["hfkdq", *path.with_suffix("").parts]).removesuffix(".__init__"): path for path in paths}
    graph = {name: files_imported_by(path, files) - {name} for name, path in files.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return None


def test_no_files_import_each_other_in_a_circle():
    assert first_circle(MODULES) is None


def test_a_circle_is_found_where_one_import_is_lazy(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.py").write_text("from . import b\n")
    (tmp_path / "x" / "b.py").write_text("def f():\n    from .a import g\n")
    paths = [Path("x", "a.py"), Path("x", "b.py")]
    assert set(first_circle(paths)) == {"hfkdq.x.a", "hfkdq.x.b"}
    (tmp_path / "x" / "b.py").write_text("if TYPE_CHECKING:\n    from .a import g\n")
    assert first_circle(paths) is None


def test_a_name_of_a_module_in_a_text_counts_as_an_import(tmp_path):
    (tmp_path / "x.py").write_text('WHO = "hfkdq.export.runtime:onnx_call"\ndef f():\n    from hfkdq.hub import x\n')
    assert imports_of(tmp_path / "x.py")[0] == {"export", "hub"}


def home(name: str) -> str:
    return hfkdq._HOMES.get(name, name)


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_run_downward(path):
    room = room_of(path)
    assert room in LEVELS, f"{path}: give the new room a level"
    for other in imports_of(path)[0] - {room}:
        assert LEVELS[other] < LEVELS[room], f"{path} ({LEVELS[room]}) imports {other} ({LEVELS[other]})"
        assert other not in FORBIDDEN.get(room, ()), f"{path} must not know {other}"


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_only_export_knows_onnx(path):
    if room_of(path) != "export":
        assert not imports_of(path)[1] & ONLY_IN_EXPORT


def test_public_names_are_sorted_and_there():
    # As ruff sorts them: acronyms, classes, functions.
    assert hfkdq.__all__ == sorted(hfkdq._HOMES, key=lambda name: (not name.isupper(), name[0].islower(), name))
    for name in hfkdq.__all__:
        assert getattr(hfkdq, name).__name__ == name
        assert getattr(hfkdq, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = hfkdq.Nothing


def test_import_is_light():
    code = "import sys, hfkdq; print(*{n.split('.')[0] for n in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"onnx", "onnxruntime", "optimum", "bitsandbytes", "matplotlib", "torch", "transformers"} & set(loaded)


@pytest.mark.one_line
def test_the_trainer_needs_no_extra():
    # Transformers itself imports what it finds, such as PEFT; that is not hfkdq's doing.
    code = (
        "import sys, datasets, evaluate; from transformers import Seq2SeqTrainer; before = set(sys.modules); "
        "from hfkdq import *; print(*{n.split('.')[0] for n in set(sys.modules) - before})"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"onnx", "onnxruntime", "optimum", "bitsandbytes", "matplotlib"} & set(loaded)


def test_modules_say_what_they_are():
    for path in MODULES:
        text = (PACKAGE / path).read_text(encoding="utf-8")
        assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n"), path
        assert ast.get_docstring(ast.parse(text)), path
