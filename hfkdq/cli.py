# SPDX-License-Identifier: Apache-2.0
"""The command `hfkdq`: what the library does, from a terminal.

Parses arguments and calls the library; every decision is made there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from . import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status, 1 after an error that the user can do something about."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, TypeError, RuntimeError, OSError, ImportError) as error:
        sys.stderr.write(f"hfkdq {options.command}: {error}\n")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hfkdq", description="Distil, prune and quantize Transformers models, and export them to ONNX."
    )
    parser.add_argument("--version", action="version", version=f"hfkdq {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="the whole chain on handwritten digits, with nothing to download")
    demo.add_argument("--output_dir", default="hfkdq-demo", help="where to write (default: %(default)s)")
    demo.add_argument("--overwrite", action="store_true", help="replace the result of an earlier demo")
    demo.add_argument("--tiny", action="store_true", help="seconds instead of minutes, for a look at what it does")
    demo.set_defaults(run=_demo)

    export = commands.add_parser("export", help="write a checkpoint as an ONNX file that is compared with PyTorch")
    export.add_argument("checkpoint", help="folder or Hub id of a Transformers checkpoint")
    export.add_argument("folder", help="where to write; must not exist")
    export.add_argument(
        "--quantization", choices=("none", "dynamic", "trained"), default="none",
        help="float32, int8 with ranges found at each call, or the int8 that a QATCallback trained (default: %(default)s)",
    )  # fmt: skip
    export.add_argument(
        "--tolerance", type=float, help="largest difference from PyTorch, as a share of the largest logit"
    )
    export.set_defaults(run=_export)

    card = commands.add_parser("card", help="print the model card of a report")
    card.add_argument("report", help="a report.json")
    card.add_argument("--repo_id", help="Hub repository that the card's code samples load")
    card.set_defaults(run=_card)
    return parser


def _demo(options: argparse.Namespace) -> None:
    from .demo import TINY, run_demo

    run_demo(options.output_dir, size=TINY if options.tiny else None, overwrite=options.overwrite)


def _export(options: argparse.Namespace) -> None:
    from .architecture import load_checkpoint
    from .export import export_onnx
    from .quantization import load_quantized, quantized_spec
    from .specs import QuantizationSpec

    quantization: QuantizationSpec | str | None
    if options.quantization == "trained":
        model = load_quantized(options.checkpoint)
        quantization = quantized_spec(model)
    else:
        model = load_checkpoint(options.checkpoint)
        quantization = "dynamic" if options.quantization == "dynamic" else None
    folder = export_onnx(
        model, options.folder, quantization=quantization, processing_class=_processing_class(options.checkpoint),
        tolerance=options.tolerance,
    )  # fmt: skip
    sys.stdout.write(f"{folder}\n")


def _processing_class(checkpoint: str) -> Any:
    """The checkpoint's tokenizer or processor, if it has one."""
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(checkpoint)
    except (OSError, ValueError):
        return None


def _card(options: argparse.Namespace) -> None:
    from .report import CompressionReport

    sys.stdout.write(CompressionReport.load(options.report).to_card(repo_id=options.repo_id))
