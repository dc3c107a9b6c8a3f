# SPDX-License-Identifier: Apache-2.0
"""`python -m hfkdq` is the command `hfkdq`; it knows nothing else."""

import sys

from .cli import main

sys.exit(main())
