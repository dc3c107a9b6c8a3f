# SPDX-License-Identifier: Apache-2.0
"""The table that a notebook shows while a model is trained, with a column for every loss term. Imported in notebooks
only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.utils.notebook import NotebookProgressCallback


class NotebookTermsCallback(NotebookProgressCallback):
    """`NotebookProgressCallback` whose table also shows the terms of the loss as they were last logged; `names` gives
    the names under which they are."""

    def __init__(self, names: Callable[[], list[str]]) -> None:
        super().__init__()
        self._names = names
        self._terms: dict[str, float] = {}

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        super().on_train_begin(*args, **kwargs)
        tracker: Any = self.training_tracker
        self._terms = {}
        write_line = tracker.write_line
        tracker.write_line = lambda values: write_line({**values, **self._terms})

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Remembers the terms, and writes a line where there is no evaluation to write one."""
        self._terms |= {name: logs[name] for name in self._names() if name in (logs or {})}
        super().on_log(args, state, control, logs=logs, **kwargs)
