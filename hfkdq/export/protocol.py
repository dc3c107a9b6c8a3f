# SPDX-License-Identifier: Apache-2.0
"""The contract of an exporter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

PAST = "-with-past"
"""The end of the names of tasks with a cache."""


class UnknownArchitecture(ValueError):
    """An exporter has nothing about a class of models, which may be traced from a batch all the same."""


class Backend(Protocol):
    """An exporter: a module with these names."""

    OPSET: int
    """Of the files."""
    PACKAGES: tuple[str, ...]
    """Distributions whose versions are recorded."""
    MERGES: bool
    """Whether `finish` makes one file of two decoders, where Optimum runs such a file."""

    def resolve_task(self, model: PreTrainedModel, task: str | None) -> str:
        """Optimum's name of the task, read off the class of the model by default; `ValueError` if it has none."""

    def dummy_batches(self, model: PreTrainedModel, task: str) -> list[dict[str, Tensor]]:
        """Random inputs of two sizes that `model` accepts, the same at every call; texts are padded on the right."""

    def trace(
        self, model: PreTrainedModel, folder: Path, task: str, batches: Sequence[Mapping[str, Tensor]] | None = None,
        *, fold_constants: bool,
    ) -> list[Path]:  # fmt: skip
        """Writes `model`, in float32 on the CPU and in eval mode, into an existing folder; the files. Its configuration
        may be changed. `task` is as `resolve_task` gave it. `batches` are what the model takes, whose inputs a file has
        by name; random ones by default. `fold_constants` where what depends on weights alone is computed now, which
        would undo integer weights."""

    def finish(self, folder: Path, config: PretrainedConfig, task: str) -> None:
        """Completes a folder once the files that `trace` wrote have been rewritten."""
