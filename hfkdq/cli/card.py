# SPDX-License-Identifier: Apache-2.0
"""`hfkdq card`: prints the model card of a report.

Knows where reports lie; what is in one is theirs.
"""

from __future__ import annotations

import argparse
import sys

HELP = "print the model card of a report"
DESCRIPTION = "Prints the model card of what CompressionReport.measure found and saved."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command to `parser`."""
    parser.add_argument("report", help="a report.json")
    parser.add_argument("--repo_id", "--repo-id", help="Hub repository that the card's code samples load")


def run(options: argparse.Namespace) -> None:
    """Prints the card."""
    from ..report import CompressionReport

    sys.stdout.write(CompressionReport.load(options.report).to_card(repo_id=options.repo_id))
