# SPDX-License-Identifier: Apache-2.0
"""README and docs: links lead somewhere, public names are in the reference, programs are Python."""

import ast
import importlib
import re
from pathlib import Path

import pytest

import hfkdq

pytestmark = pytest.mark.every_case

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "constraints").glob("*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def anchors(page):
    """Those of its headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()).strip() for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), target
        assert not anchor or anchor in anchors(place), target


def test_every_public_name_is_in_the_reference_once():
    pages = [page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "reference").glob("*.md")]
    shown = re.findall(r"^::: ([\w.]+)$", "\n".join(pages), re.MULTILINE)
    assert len(shown) == len(set(shown))
    names = [name.rsplit(".", 1)[1] for name in shown]
    assert not set(hfkdq.__all__) - set(names) - {"__version__"}
    for name in hfkdq.__all__:
        assert names.count(name) <= 1


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    assert listed == {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}


def test_the_readme_is_one_page():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_programs_are_python_and_import_what_is_there(page):
    text = page.read_text(encoding="utf-8")
    for program in re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        tree = ast.parse(re.sub(r",\s*\.\.\.\)", ")", program))  # f(name=value, ...) leaves something out
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("hfkdq"):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, name.name) for name in node.names), ast.unparse(node)


ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def test_the_page_of_the_house_names_every_room():
    rooms = {
        path.name for path in (ROOT / "hfkdq").iterdir() if path.name not in ("__init__.py", "__main__.py", "py.typed")
    }
    told = set(re.findall(r"`([a-z_]+)(?:/|\.py)`", ARCHITECTURE))
    assert told == {room.removesuffix(".py") for room in rooms} - {"templates", "__pycache__"}


@pytest.mark.parametrize(("file", "name"), re.findall(r"`([a-z_/]+\.py)`: `(\w+)`", ARCHITECTURE))
def test_what_the_page_of_the_house_points_at_is_there(file, name):
    module = importlib.import_module("hfkdq." + file.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    assert getattr(module, name).__module__ == module.__name__
