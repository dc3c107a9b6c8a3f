# SPDX-License-Identifier: Apache-2.0
"""The command `hfkdq`: what the library does, from a terminal.

Reads options and data, calls the library and prints what came of it; every decision on models is made there.
"""

from .main import main

__all__ = ["main"]
