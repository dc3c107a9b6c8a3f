#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""What hfkdq does with every family of models, tried on tiny ones: the table in `docs/models.md`.

    make docs-models

Run on each line; results go into one JSON file per line, and the page is written from both. What is there already is not run
again, unless `--again` says so: `python -m benchmarks.models --families bert,llama --cells student,QAT --again`.
"""

from __future__ import annotations

import argparse
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

from hfkdq.export.backends import load_backend

from .cells import CELLS
from .entries import ENTRIES
from .page import PAGE, write_page
from .running import run
from .tasks import TASKS

COLUMNS = [*CELLS, TASKS]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=__doc__.splitlines()[0])
    parser.add_argument("--families", help="which of the table, by the names in entries.py, with commas between them")
    parser.add_argument("--cells", help=f"which columns: {', '.join(COLUMNS)}")
    parser.add_argument("--seconds", type=float, default=300, help="how long a cell may take")
    parser.add_argument("--again", action="store_true", help="run also what has a result")
    parser.add_argument("--loud", action="store_true", help="show what the cells print")
    parser.add_argument("--page", action="store_true", help="write the page alone")
    given = parser.parse_args()
    families, cells = ((text.split(",") if text else None) for text in (given.families, given.cells))
    for names, known in ((families, ENTRIES), (cells, COLUMNS)):
        unknown = sorted(set(names or ()) - set(known))
        if unknown:
            parser.error(f"{', '.join(unknown)}: none of {', '.join(known)}")
    if not given.page:
        torch.set_num_threads(1)
        sys.stdout.reconfigure(line_buffering=True)
        load_backend()  # what it imports is imported once, not in every process
        run(families or ENTRIES, cells or COLUMNS, given.again, given.seconds, given.loud)
    write_page()
    print(f"Wrote {PAGE}.")


if __name__ == "__main__":
    main()
