# SPDX-License-Identifier: Apache-2.0
"""`hfkdq card`: prints the model card of a report or of an export."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..schema import read_file

HELP = "print the model card of a report or of an export"
DESCRIPTION = (
    "Prints the model card of what CompressionReport.measure found and saved, as hfkdq demo does, or of what hfkdq export "
    "recorded of its files."
)
LEFT = "Nothing was written."
# The report that CompressionReport.save and hfkdq demo write, that of push_to_hub, and the record of an export.
NAMES = ("report.json", "compression_report.json", "export_facts.json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command to `parser`."""
    parser.add_argument(
        "report", help="a report.json of CompressionReport.save, or the folder that hfkdq demo or hfkdq export wrote"
    )
    parser.add_argument("--repo_id", "--repo-id", help="Hub repository that the card's code samples load")
    parser.add_argument("--folder", help="the folder that was measured; its files are held against the report")


def run(options: argparse.Namespace) -> None:
    """Prints the card."""
    path = _file_of(Path(options.report))
    if options.folder is not None and not Path(options.folder).is_dir():
        raise FileNotFoundError(f"There is no folder {options.folder}.")
    is_report = "engines" in read_file(path)
    from ..report import CompressionReport
    from ..report.card import render_card
    from ..report.files import check_beside, check_engine, check_export

    place = "."
    if is_report or path.name not in NAMES:
        report = CompressionReport.load(path)
        if options.folder is None:
            place = check_beside(report, path)
    else:
        check_export(path.parent)
        report = CompressionReport.from_export(path.parent)
    if options.folder is not None:
        check_engine(report, Path(options.folder))
    sys.stdout.write(render_card(report, options.repo_id, place=place))


def _file_of(path: Path) -> Path:
    """The file that is meant: the first of `NAMES` that a folder has."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"There is no file or folder {path}.")
    found = next((path / name for name in NAMES if (path / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"{path} has no report.json, as CompressionReport.save and hfkdq demo write it, and no export_facts.json, as "
            "hfkdq export does. Name the folder that one of them wrote."
        )
    return found
