# SPDX-License-Identifier: Apache-2.0
"""Writes `docs/models.md` from the results of both lines; it runs no model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from .cells import CELLS, PARTLY, RECORDED
from .entries import ENTRIES, Entry
from .tasks import PREFIX

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "models.md"
LINES = ("optimum", "v5")
WORKS, REFUSED, FAILS = "works", "refused", "fails"
_SIGNS = {WORKS: "✓", REFUSED: "no", FAILS: "✗"}
_MARKS = {RECORDED: "ʳ", PARTLY: "ᵖ"}
_ABSENT, _NOT_RUN = "·", "?"
_HEADS = {"ONNX float32": "float32", "ONNX int8": "int8", "ONNX int4_weights": "int4"}


def results_file(line: str) -> Path:
    return Path(__file__).with_name(f"{line}.json")


def read(line: str) -> dict[str, Any]:
    """The results of a line: its versions, and what came of each cell of each family."""
    file = results_file(line)
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"versions": {}, "families": {}}


class _Notes:
    """Reasons, each told once under a number, with what is the name of a module or a number in one family left out."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.where: dict[str, list[str]] = {}

    def number(self, why: str, entry: Entry, cell: str) -> int:
        text = _first_sentences(why)
        key = text.partition(" What fits this model:")[0]
        # Classes, configurations, names of architectures and of modules, and numbers do not make another reason.
        key = re.sub(r"\b(?:[A-Z]+[a-z0-9]+){2,}[A-Z]*\b|(?<= for )[\w-]+(?=:)|'[\w-]+'(?=\. The nearest)", "#", key)
        key = re.sub(rf"{entry.model}|[\w./-]*\d[\w./-]*|\b\w+(?:[._]\w+)+\b", "#", key)
        self.texts.setdefault(key, text)
        places = self.where.setdefault(key, [])
        places += [place for place in [f"{entry.title}, {cell}"] if place not in places]
        return list(self.texts).index(key) + 1

    def lines(self) -> list[str]:
        found = []
        for i, (key, text) in enumerate(self.texts.items(), start=1):
            more = len(self.where[key]) - 1
            beside = f", and {more} more" if more else ""
            found.append(f"{i}. {_escaped(text)} ({self.where[key][0]}{beside})")
        return found


def _first_sentences(text: str, most: int = 260) -> str:
    """As many whole sentences as have room."""
    kept = ""
    for sentence in re.split(r"(?<=[.!?]) (?=[A-Z])", text):
        if kept and len(kept) + len(sentence) > most:
            break
        kept = f"{kept} {sentence}".strip()
    return kept if len(kept) <= 2 * most else kept[: 2 * most] + " ..."


def _escaped(text: str) -> str:
    return re.sub(r"([<>|*_`\[\]])", r"\\\1", text.replace("](", "] ("))  # no link


def _cell(entry: Entry, name: str, cell: str, found: dict[str, Any], notes: _Notes) -> str:
    """The signs of both lines, one where they are the same."""
    signs = []
    for line in LINES:
        results = found[line]["families"].get(name)
        if results is None:
            signs.append(_ABSENT if name in found[line].get("absent", ()) else _NOT_RUN)
            continue
        result = results.get(cell)
        if result is None:
            signs.append(_NOT_RUN)
        elif result["result"] == WORKS:
            signs.append(_SIGNS[WORKS] + _MARKS.get(result.get("note"), ""))
        else:
            signs.append(f"{_SIGNS[result['result']]} {notes.number(result['why'], entry, cell)}")
    return signs[0] if signs[0] == signs[1] else " / ".join(signs)


def page(found: dict[str, Any] | None = None) -> str:
    """The text of the page, of the results of both lines."""
    found = {line: read(line) for line in LINES} if found is None else found
    notes = _Notes()
    parts = [_HEAD.format(families=len(ENTRIES), told=_told(found)).strip()]
    for group in dict.fromkeys(entry.group for entry in ENTRIES.values()):
        heads = ["family", "task", "other tasks", *(_HEADS.get(cell, cell) for cell in CELLS)]
        table = [f"| {' | '.join(heads)} |", "|---|---|---|" + ":-:|" * len(CELLS)]
        for name, entry in ENTRIES.items():
            if entry.group == group:
                cells = [_cell(entry, name, cell, found, notes) for cell in CELLS]
                tried = (found[line]["families"].get(name, {}) for line in LINES)
                tasks = {cell for results in tried for cell in results if cell.startswith(PREFIX)}
                others = [
                    f"{task.removeprefix(PREFIX)} {_cell(entry, name, task, found, notes)}" for task in sorted(tasks)
                ]
                table.append(f"| {entry.title} | {entry.task} | {', '.join(others)} | {' | '.join(cells)} |")
        parts.append(f"## {group}\n\n" + "\n".join(table))
    parts.append("## Why\n\n" + "\n".join(notes.lines()))
    return "\n\n".join(parts) + "\n"


def _told(found: dict[str, Any]) -> str:
    """How many cells came out how, per line."""
    told = []
    for line in LINES:
        results = [r["result"] for family in found[line]["families"].values() for r in family.values()]
        counts = ", ".join(f"{results.count(kind)} {word}" for kind, word in _WORDS.items())
        versions = " and ".join(f"{name} {number}" for name, number in found[line]["versions"].items())
        told.append(f"- {line} ({versions}): {counts}.")
    return "\n".join(told)


def write_page() -> None:
    """Writes the page from the files of results."""
    PAGE.write_text(page(), encoding="utf-8")


_WORDS = {WORKS: "work", REFUSED: "are refused", FAILS: "fail"}
_HEAD = """
# Which models

What comes of {families} families, each tried on a tiny model with random weights: every sign is what a run gave, on the two lines
of the ecosystem ([what they are](installation.md)). Where the lines differ, the optimum line stands first.

| sign | meaning |
|:-:|---|
| ✓ | works |
| ✓ʳ | works; the configuration of the family cannot say it, so `PruningSpec(plain_checkpoint=False)` makes it and `load_pruned` loads it |
| ✓ᵖ | works for a part of the weights: over 5 % of all are in no layer that is known, which the record and a warning say |
| no | refused before work starts, with the model unchanged, a file where it was tried and is not equal; the number is that of the reason [below](#why) |
| ✗ | fails, with the number of the reason |
| · | the installed Transformers has not this class |
| ? | not run |

{told}

What the columns are: a student by `make_student` with half of the layers, distilled for a step, saved and loaded; a model of the
same shape distilled for a step and evaluated (for every other task that the family has a class for, too); each structure of `PruningSpec`, pruned, saved and loaded with the same
outputs; `QATCallback` for a step, evaluated, saved, and the same outputs by `load_quantized`; ONNX files in float32, with int8 and
with 4-bit weights, compared with the model by `export_onnx` on the same data.

`make docs-models` runs what has no result yet and writes this page; the configurations are in `benchmarks/models/entries.py`.
"""
