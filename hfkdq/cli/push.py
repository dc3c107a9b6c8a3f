# SPDX-License-Identifier: Apache-2.0
"""`hfkdq push`: a compressed model to the Hugging Face Hub, in one commit."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HELP = "publish an exported folder on the Hugging Face Hub"
DESCRIPTION = (
    "Publishes the folder that hfkdq export wrote, with the model card, the facts and the plot of a report, in one commit. The token is "
    "that of `hf auth login` or HF_TOKEN. Pickles, secrets and files that the report is not about are refused before anything is sent."
)
LEFT = "The repository is as it was, unless the commit had been made; the same command begins again."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command to `parser`."""
    parser.add_argument("source", metavar="FOLDER", help="what hfkdq export wrote")
    parser.add_argument("repo_id", metavar="REPO_ID", help="user/name, or name for one of your own")
    parser.add_argument(
        "--report", metavar="FILE", help="the report.json of hfkdq report or CompressionReport.save, for the card"
    )
    parser.add_argument("--private", action="store_true", help="make a repository that does not exist yet private")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to commit to (default: main)")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request with the commit")
    parser.add_argument(
        "--commit-message", default="Upload compressed model", metavar="TEXT", help="first line (default: %(default)s)"
    )
    parser.add_argument(
        "--add", action="store_true", help="keep the precisions that the repository has, and add those of the folder"
    )
    parser.add_argument("--ignore-patterns", nargs="+", metavar="PATTERN", help='files to leave out, such as "*.log"')


def run(options: argparse.Namespace) -> None:
    """Pushes, and prints the address of the commit, or of the pull request."""
    folder = Path(options.source)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    if options.report is not None and not Path(options.report).is_file():
        raise FileNotFoundError(f"There is no file {options.report}.")
    from ..hub import push_to_hub
    from ..report import CompressionReport

    report = None if options.report is None else CompressionReport.load(options.report)
    commit = push_to_hub(
        folder, options.repo_id, report=report, private=options.private or None, revision=options.revision,
        create_pr=options.create_pr, commit_message=options.commit_message, ignore_patterns=options.ignore_patterns,
        add=options.add,
    )  # fmt: skip
    sys.stdout.write(f"{commit.pr_url or commit.commit_url}\n")
