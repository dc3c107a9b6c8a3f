# SPDX-License-Identifier: Apache-2.0
"""Silences exporters and fixes their seeds."""

from __future__ import annotations

import io
import logging
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import numpy as np
import torch


@contextmanager
def silent_and_seeded() -> Iterator[None]:
    """Hides the tracer's notes, fixes the random numbers, and puts both back."""
    disabled, python_state, numpy_state = logging.root.manager.disable, random.getstate(), np.random.get_state()
    sink = io.StringIO()
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), redirect_stdout(sink), redirect_stderr(sink):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        try:
            yield
        finally:
            logging.disable(disabled)
            random.setstate(python_state)
            np.random.set_state(numpy_state)
