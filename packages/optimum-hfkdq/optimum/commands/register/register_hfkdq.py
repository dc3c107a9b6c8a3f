# SPDX-License-Identifier: Apache-2.0
"""`optimum-cli export hfkdq`: the command `hfkdq export` among those of Optimum, which finds it by its place.

The folders around it belong to Optimum and must stay without an `__init__.py`.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class HfkdqExportCommand(BaseOptimumCLICommand):
    """Runs `hfkdq export` with the options that Optimum has parsed."""

    COMMAND = CommandInfo(name="hfkdq", help="Export PyTorch to ONNX with hfkdq: quantized, compared and measured")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Adds the options of `hfkdq export`."""
        from hfkdq.cli.export import add_arguments

        add_arguments(parser)

    def run(self) -> None:
        """Exports, and ends the program with the status of `hfkdq export`."""
        from hfkdq.cli.main import run_command

        sys.exit(run_command("export", self.args))


REGISTER_COMMANDS = [(HfkdqExportCommand, ExportCommand)]
