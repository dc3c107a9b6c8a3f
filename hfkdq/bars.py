# SPDX-License-Identifier: Apache-2.0
"""Progress bars: those of Transformers, on a terminal and in notebooks alone."""

from __future__ import annotations

import sys
from typing import Any

from transformers.utils import is_in_notebook, logging


def progress_bar(*args: Any, **kwargs: Any) -> Any:
    """A bar of `tqdm` with these arguments; nothing is drawn where standard error is no terminal, or
    `transformers.utils.logging.disable_progress_bar` was called."""
    return logging.tqdm(*args, **{**kwargs, "disable": kwargs.get("disable") or not bars_are_seen()})


def bars_are_seen() -> bool:
    """Whether somebody sees progress bars."""
    return logging.is_progress_bar_enabled() and (is_in_notebook() or sys.stderr.isatty())
