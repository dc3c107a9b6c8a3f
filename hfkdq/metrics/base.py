# SPDX-License-Identifier: Apache-2.0
"""The form of all metrics: an `evaluate.Metric` that needs no network, around a function of predictions and references."""

from __future__ import annotations

import importlib
from collections.abc import Sequence as Rows
from typing import Any, ClassVar

import evaluate
import numpy as np
from datasets import Features, Value

Array = np.ndarray[Any, Any]
IGNORED = -100
"""The label of positions that do not count, and what the Trainer pads predictions with."""


class LocalMetric(evaluate.Metric):
    """An `evaluate.Metric` that loads without a network: `score` of the predictions and references, `scores` by name."""

    about: ClassVar[str] = ""
    citing: ClassVar[str] = ""
    prediction: ClassVar[Any] = Value("int64")
    reference: ClassVar[Any] = None  # as a prediction

    @staticmethod
    def score(predictions: Rows[Any], references: Rows[Any]) -> dict[str, float]:
        """The metric by name."""
        raise NotImplementedError

    def _info(self) -> evaluate.MetricInfo:
        reference = self.prediction if self.reference is None else self.reference
        return evaluate.MetricInfo(
            description=self.about,
            citation=self.citing,
            inputs_description="Args:\n    predictions: one for each example.\n    references: what is right.",
            features=Features({"predictions": self.prediction, "references": reference}),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return self.score(predictions, references)


def library(name: str) -> Any:
    """A library that computes a metric.

    Raises:
        ImportError: it is not installed; the advice is a command that installs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"This metric is computed by {name.partition('.')[0]}, which does not load ({error}). Install it: pip install 'hfkdq[metrics]'"
        ) from error
