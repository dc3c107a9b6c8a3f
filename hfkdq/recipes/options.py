# SPDX-License-Identifier: Apache-2.0
"""The fields of `TrainingArguments` as options of a command, by `HfArgumentParser`."""

from __future__ import annotations

import argparse
from typing import Any

from transformers import HfArgumentParser, Seq2SeqTrainingArguments

from .parts import OWNED


def training_parser() -> argparse.ArgumentParser:
    """A parser, as a parent of another, whose namespace holds what was given and no defaults."""
    arguments: Any = Seq2SeqTrainingArguments
    parser = HfArgumentParser(arguments, add_help=False, allow_abbrev=False)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
        if action.dest in OWNED:
            action.help = argparse.SUPPRESS
    return parser
