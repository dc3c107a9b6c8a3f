# SPDX-License-Identifier: Apache-2.0
"""What mkdocs does besides: pages that are files of the repository's root, and links that leave the site."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s:]+)\)")


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """The text of a page: of those in `OUTSIDE` that of the root's file, with links as they must be below `docs`."""
    name = page.file.src_uri
    folder = (ROOT / "docs" / name).parent
    if name in OUTSIDE:
        markdown, folder = (ROOT / OUTSIDE[name]).read_text(encoding="utf-8"), ROOT

    def link(found: re.Match[str]) -> str:
        text, target = found.groups()
        path, _, anchor = target.partition("#")
        if not path:
            return found[0]
        place = (folder / path).resolve()
        pages = {ROOT / file: ROOT / "docs" / here for here, file in OUTSIDE.items()}
        place = pages.get(place, place)
        if ROOT / "docs" not in place.parents:  # examples and the like are read in the repository
            return f"{text} (`{place.relative_to(ROOT)}`)" if place.exists() else found[0]
        here = (ROOT / "docs" / name).parent
        up = "../" * (len(here.relative_to(ROOT / "docs").parts))
        return f"[{text}]({up}{place.relative_to(ROOT / 'docs')}{'#' + anchor if anchor else ''})"

    return _LINK.sub(link, markdown.replace("](docs/images/", "](images/"))


try:
    import griffe
except ImportError:  # whoever reads this file without building the site
    pass
else:

    class PlainTypes(griffe.Extension):
        """Docstrings as the site shows them: types without marks, and names in brackets without the brackets."""

        _ENTRY = re.compile(r"^(\s+[\w, *]+) \(([^()]*(?:\([^()]*\)[^()]*)*)\):", re.MULTILINE)
        _TAIL = re.compile(r",? defaults to .*$|,? ?\*optional\*")

        def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
            """Called by griffe for every object that it has read."""
            if obj.docstring is not None:
                text = re.sub(r"\[(`[\w.]+`)\](?![\[(])", r"\1", obj.docstring.value)
                obj.docstring.value = self._ENTRY.sub(self._entry, text)

        def _entry(self, found: re.Match[str]) -> str:
            kind = self._TAIL.sub("", found[2]).replace("`", "").strip()
            return f"{found[1]} ({kind}):" if kind else f"{found[1]}:"
