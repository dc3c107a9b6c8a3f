# SPDX-License-Identifier: Apache-2.0
"""Which commands there are, and what becomes of their errors."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ..files import ended_by_signals
from ..schema import brief
from ..version import __version__
from . import bench, card, compress, demo, export, inspect, push, report
from .messages import as_keys, as_options

# Each has `HELP`, `DESCRIPTION` and, in `LEFT`, what an interruption leaves.
COMMANDS: dict[str, Any] = {
    "compress": compress, "export": export, "report": report, "bench": bench, "inspect": inspect, "card": card,
    "push": push, "demo": demo,
}  # fmt: skip
_BUGS = (ArithmeticError, AssertionError, AttributeError, LookupError, NameError)
"""Errors that no user can do something about: their traceback is told."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status, 1 after an error that the user can do something about."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["compress"]:  # its options are those of TrainingArguments too, which are known to few
        return _status("compress", lambda: compress.run(compress.parse(arguments[1:])))
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if len(rest) == 1 and not rest[0].startswith("-") and getattr(options, "folder", "") is None:
        options.folder = rest[0]  # before Python 3.13 argparse misses an optional name behind options
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return run_command(options.command, options)


def run_command(name: str, options: argparse.Namespace) -> int:
    """Runs the command of a name with the options that it has added to a parser; returns the exit status."""
    return _status(name, lambda: COMMANDS[name].run(options))


def _status(name: str, run: Callable[[], None]) -> int:
    # bitsandbytes warns at every import on some processors that a kernel is missing, which no command would use.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        with ended_by_signals():
            run()
    except KeyboardInterrupt:
        sys.stderr.write(f"\nhfkdq {name}: interrupted. {COMMANDS[name].LEFT}\n")
        return 130
    except SystemExit as error:
        if isinstance(error.code, int) and error.code > 128:
            sys.stderr.write(f"\nhfkdq {name}: ended by a signal. {COMMANDS[name].LEFT}\n")
        raise
    except _BUGS:
        raise
    except Exception as error:
        said = str(error)
        if not said or not isinstance(error, (ValueError, TypeError, RuntimeError, OSError, ImportError)):
            said = f"{type(error).__name__}: {brief(error)}".removesuffix(": ")  # a library's own
        sys.stderr.write(f"hfkdq {name}: {as_keys(said) if name == 'compress' else as_options(said)}\n")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hfkdq", description="Distil, prune and quantize Transformers models, and export them to ONNX."
    )
    parser.add_argument("--version", action="version", version=f"hfkdq {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.add_arguments(commands.add_parser(name, help=command.HELP, description=command.DESCRIPTION))
    return parser
