# SPDX-License-Identifier: Apache-2.0
"""`hfkdq inspect`: what a checkpoint or an exported folder is."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

HELP = "say what a checkpoint or an exported folder is"
DESCRIPTION = (
    "Tells class, sizes, weights, what was distilled, pruned and quantized, and hashes of a checkpoint or an exported folder, without "
    "loading the model."
)
LEFT = "Nothing was written."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command to `parser`."""
    parser.add_argument("path", metavar="CHECKPOINT", help="folder or Hub id")
    parser.add_argument("--json", action="store_true", help="print all that is known as JSON")


def run(options: argparse.Namespace) -> None:
    """Prints what is found."""
    from ..report.environment import hide_secrets
    from ..report.inspection import inspect_folder
    from .candidates import find_place, here, split_names

    ((name, where),) = split_names([options.path])
    path = here(where)
    found = hide_secrets(inspect_folder(find_place(name, where).folder if path.is_file() else path))
    sys.stdout.write(f"{json.dumps(found, indent=2, allow_nan=False)}\n" if options.json else _told(found))


def _told(found: dict[str, Any]) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from ..facts import short_count
    from ..report.markdown import one_line
    from ..report.table import megabytes

    console = Console(file=sys.stdout)
    with console.capture() as capture:
        sizes = {
            "class": found["architecture"],
            "family": found["model_type"],
            "task": found["task"],
            **found["sizes"],
        }
        sizes["parameters"] = short_count(found["parameters"])
        for name, facts in found["files"].items():
            sizes[name] = f"{megabytes(facts['bytes'])} MB, sha256 {facts['sha256']}"
        if "export" in found:
            export = found["export"]
            sizes["export"] = f"{export.get('kind')}, {export.get('task')}, opset {export.get('opset')}"
            sizes["its files"] = "are those that were exported" if export["unchanged"] else export["difference"]
        grid = Table.grid(padding=(0, 2))
        grid.add_column()
        grid.add_column(overflow="fold")
        for name, value in sizes.items():
            if value is not None:
                grid.add_row(Text(one_line(name)), Text(one_line(value)))
        console.print(grid)
        for sentence in found["steps"]:
            console.print(Text(one_line(sentence)))
        if found["weights"]:
            table = Table(box=box.SIMPLE_HEAD, padding=0)
            for title in ("Weight", "Shape", "Type", "Zeros (%)"):
                left = title == "Weight"
                table.add_column(title, justify="left" if left else "right", overflow="fold" if left else "ellipsis")
            for row in found["weights"]:
                shape = " x ".join(map(str, row["shape"]))
                table.add_row(Text(one_line(row["name"])), shape, row["dtype"], f"{100 * row['zeros']:.1f}")
            console.print(table)
    return capture.get()
