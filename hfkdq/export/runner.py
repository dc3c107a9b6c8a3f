# SPDX-License-Identifier: Apache-2.0
"""Runs an exported file as the model that it came from: tensors in, tensors out.

Knows torch and one file; how it was written, and how far off it may be, is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .runtime import OnnxSession


class SingleFile:
    """A model that is one file.

    Args:
        path (`Path`): the file.

    Attributes:
        input_names (`list[str]`): what it takes.
        output_names (`list[str]`): what it gives.
    """

    def __init__(self, path: Path) -> None:
        self._session = OnnxSession(path)
        self.input_names, self.output_names = self._session.input_names, self._session.output_names

    def __call__(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs for a batch, by name; inputs that the file does not take are ignored."""
        outputs = self._session({name: value.numpy() for name, value in batch.items()})
        return {name: torch.from_numpy(value) for name, value in outputs.items()}
