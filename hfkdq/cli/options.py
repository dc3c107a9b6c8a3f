# SPDX-License-Identifier: Apache-2.0
"""Options that several commands have, and their least values."""

from __future__ import annotations

import argparse
from typing import Any

from ..fields import MOST_THREADS

_DATA = """parquet, CSV or JSON file, a folder of them, or the id of a data set on the Hub; a split may follow a colon,
as in squad:validation, and so may a configuration before it, as in nyu-mll/glue:sst2:validation"""
DATA = " ".join(_DATA.split())
"""How data are named."""


def add_data(group: Any, required: bool = False) -> None:
    """Adds what is measured on, and how it is read."""
    group.add_argument(
        "--eval-data", metavar="DATA", required=required,
        help=f"labelled rows that models and files are measured on, a {DATA} (split: validation, then test): texts, pairs, lists of "
        "words, questions, translations, images, masks, boxes or sounds, with what the task's data sets have beside them",
    )  # fmt: skip
    group.add_argument("--eval-samples", type=int, metavar="N", help="rows of it, drawn likewise (default: all)")
    group.add_argument(
        "--text-columns", type=column_names, metavar="NAME[,NAME]",
        help="one column of texts, or two for pairs (default: the one or two columns of strings that there are)",
    )  # fmt: skip
    group.add_argument(
        "--max-length", type=int, metavar="N", help="tokens beyond this are cut off (default: what the model takes)"
    )


def add_timing(group: Any, rounds: int) -> None:
    """Adds how latency is measured."""
    group.add_argument(
        "--latency-rounds", type=int, default=rounds, metavar="N",
        help="turns of half a second that each is timed for, 0 for none (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--threads", type=int, metavar="N", help="threads while timing (default: as many as PyTorch uses)"
    )


def check_least(options: argparse.Namespace, **least: int) -> None:
    """Refuses numbers that are too small, and too many threads: names of options to the least that each may be. Raises
    `ValueError`: one of them is."""
    for name, smallest in least.items():
        values = getattr(options, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and value < smallest:
                raise ValueError(f"--{name.replace('_', '-')} must be {smallest} or more, got {value}.")
            if name == "threads" and value is not None and value > MOST_THREADS:
                raise ValueError(f"--threads must be {MOST_THREADS} or less, got {value}.")


def column_names(text: str) -> list[str]:
    """One or two names of columns."""
    names = [name.strip() for name in text.split(",")]
    if len(names) > 2 or not all(names):
        raise argparse.ArgumentTypeError(f"expected one name or two with a comma between them, got {text!r}")
    return names
