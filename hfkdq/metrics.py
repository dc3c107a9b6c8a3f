# SPDX-License-Identifier: Apache-2.0
"""Accuracy and F1 as `evaluate` metrics that need no network, and `compute_metrics` for classifiers."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np
from transformers import EvalPrediction

_Array = np.ndarray[Any, Any]

_INPUTS = """
Args:
    predictions (`list` of `int`): predicted classes.
    references (`list` of `int`): true classes.
"""


def _accuracy(predictions: _Array, references: _Array) -> float:
    return float((predictions == references).mean())


def _macro_f1(predictions: _Array, references: _Array) -> float:
    scores = []
    for label in np.union1d(predictions, references):
        hits = ((predictions == label) & (references == label)).sum()
        scores.append(2.0 * hits / ((predictions == label).sum() + (references == label).sum()))
    return float(np.mean(scores))


class _ClassMetric(evaluate.Metric):
    """A number from predicted and true classes."""

    description = ""
    citation = ""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.description,
            citation=self.citation,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )


class Accuracy(_ClassMetric):
    """Share of predictions that are right, `mean(prediction == reference)`, as an `evaluate.Metric`.

    Works without a network, where `evaluate.load("accuracy")` does not, and combines with other metrics.

    Example:
        ```python
        >>> import evaluate
        >>> from hfkdq.metrics import F1, Accuracy
        >>> evaluate.combine([Accuracy(), F1()]).compute(predictions=[0, 1, 1], references=[0, 1, 0])
        {'accuracy': 0.6666666666666666, 'f1': 0.6666666666666666}

        ```
    """

    description = "Share of predictions that are right."

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"accuracy": _accuracy(np.asarray(predictions), np.asarray(references))}


class F1(_ClassMetric):
    """Macro F1 as an `evaluate.Metric`: the mean over classes of `2 TP / (2 TP + FP + FN)`.

    The classes are those that occur among predictions or references. Works without a network.
    """

    description = "Mean over classes of the harmonic mean of precision and recall."

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"f1": _macro_f1(np.asarray(predictions), np.asarray(references))}


def classification_metrics(eval_prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy and macro F1 of a classifier of sequences, tokens or images, for `Trainer(compute_metrics=...)`.

    Args:
        eval_prediction (`EvalPrediction`): logits of shape `(..., classes)`, alone or first in a tuple, and labels of
            shape `(...)`. Positions whose label is -100 do not count.

    Returns:
        `dict[str, float]`: `accuracy` and `f1`, in [0, 1].

    Raises:
        ValueError: shapes that do not belong together, or no label to compare with.
    """
    logits = eval_prediction.predictions
    logits = np.asarray(logits[0] if isinstance(logits, tuple) else logits)
    labels = np.asarray(eval_prediction.label_ids)
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"Logits of shape {logits.shape} need labels of shape {logits.shape[:-1]}, got {labels.shape}. "
            "classification_metrics is for classifiers of sequences, tokens or images."
        )
    valid = labels != -100
    if not valid.any():
        raise ValueError("There is no label other than -100 to compare with; use an eval_dataset that has labels.")
    predictions = logits.argmax(-1)[valid]
    return {"accuracy": _accuracy(predictions, labels[valid]), "f1": _macro_f1(predictions, labels[valid])}
