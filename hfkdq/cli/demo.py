# SPDX-License-Identifier: Apache-2.0
"""`hfkdq demo`: the options of the demo."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..files import DEMO

HELP = "the whole chain on handwritten digits, with nothing to download"
DESCRIPTION = "Trains a teacher on handwritten digits, distils, prunes and quantizes a student, and exports both."
LEFT = "Nothing was written, and an earlier result is as it was; the same command begins again."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command to `parser`."""
    parser.add_argument(
        "--output_dir", "--output-dir", default="hfkdq-demo", help="where to write (default: %(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the result of an earlier demo")
    parser.add_argument("--tiny", action="store_true", help="seconds instead of minutes, for a look at what it does")


def run(options: argparse.Namespace) -> None:
    """Runs the demo."""
    DEMO.check(Path(options.output_dir), options.overwrite)
    from ..demo import TINY, run_demo

    run_demo(options.output_dir, size=TINY if options.tiny else None, overwrite=options.overwrite)
