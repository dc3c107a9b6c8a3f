# SPDX-License-Identifier: Apache-2.0
"""`python -m hfkdq` is the command `hfkdq`."""

import os
import sys

# `python -m` puts the current folder first, where a file that is called like a package would run in its place.
sys.path[:] = [entry for entry in sys.path if entry not in ("", os.getcwd())]

from .cli import main  # noqa: E402

sys.exit(main())
