# SPDX-License-Identifier: Apache-2.0
"""`hfkdq card`: prints the model card of a report."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..schema import read_file

HELP = "print the model card of a report"
DESCRIPTION = "Prints the model card of what CompressionReport.measure found and saved."
# What an interruption leaves.
LEFT = "Nothing was written."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command to `parser`."""
    parser.add_argument("report", help="a report.json")
    parser.add_argument("--repo_id", "--repo-id", help="Hub repository that the card's code samples load")
    parser.add_argument("--folder", help="the folder that was measured; its files are held against the report")


def run(options: argparse.Namespace) -> None:
    """Prints the card."""
    for path, is_there in ((options.report, Path.is_file), (options.folder, Path.is_dir)):
        if path is not None and not is_there(Path(path)):
            raise FileNotFoundError(f"There is no {'file' if is_there is Path.is_file else 'folder'} {path}.")
    read_file(options.report)
    from ..report import CompressionReport
    from ..report.files import check_beside

    report = CompressionReport.load(options.report)
    if options.folder is None:
        check_beside(report, Path(options.report))
    sys.stdout.write(report.to_card(repo_id=options.repo_id, folder=options.folder))
