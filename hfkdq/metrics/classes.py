# SPDX-License-Identifier: Apache-2.0
"""Metrics of classes, of several labels at a time, and of masks: accuracy, F1, mean IoU."""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import Sequence, Value
from transformers import EvalPrediction

from .base import IGNORED, Array, LocalMetric


def _accuracy(predictions: Array, references: Array) -> float:
    return float((predictions == references).mean())


def _macro_f1(predictions: Array, references: Array) -> float:
    scores = []
    for label in np.union1d(predictions, references):
        hits = ((predictions == label) & (references == label)).sum()
        scores.append(2.0 * hits / ((predictions == label).sum() + (references == label).sum()))
    return float(np.mean(scores))


class Accuracy(LocalMetric):
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

    about = "Share of predictions that are right."

    @staticmethod
    def score(predictions: Any, references: Any) -> dict[str, float]:
        return {"accuracy": _accuracy(np.asarray(predictions), np.asarray(references))}


class F1(LocalMetric):
    """Macro F1 as an `evaluate.Metric`: the mean over classes of `2 TP / (2 TP + FP + FN)`.

    The classes are those that occur among predictions or references. Works without a network.
    """

    about = "Mean over classes of the harmonic mean of precision and recall."

    @staticmethod
    def score(predictions: Any, references: Any) -> dict[str, float]:
        return {"f1": _macro_f1(np.asarray(predictions), np.asarray(references))}


class MultiLabelF1(LocalMetric):
    """Micro and macro F1 of several labels an example, and the share of examples whose labels are all right.

    Predictions and references are lists of 0 and 1, a number for each label. Micro F1 (`f1`) is `2 TP / (2 TP + FP + FN)` over all
    labels of all examples; macro F1 is the mean over the labels that occur or are predicted.
    """

    about = (
        "F1 over all labels of all examples, its mean over labels, and the share of examples that are wholly right."
    )
    prediction = Sequence(Value("int64"))

    @staticmethod
    def score(predictions: Any, references: Any) -> dict[str, float]:
        predicted, true = np.asarray(predictions).astype(bool), np.asarray(references).astype(bool)
        hits, sizes = (predicted & true).sum(0), predicted.sum(0) + true.sum(0)
        each = 2.0 * hits[sizes > 0] / sizes[sizes > 0]
        return {
            "f1": float(2 * hits.sum() / max(sizes.sum(), 1)),
            "macro_f1": float(each.mean()) if len(each) else 0.0,
            "accuracy": float((predicted == true).all(-1).mean()),
        }


class MeanIoU(LocalMetric):
    """Mean over classes of `intersection / union`, and accuracy, of the classes of pixels, given flat.

    The classes are those that occur among predictions or references. Pixels whose label is in `ignored` are to be left out before.
    """

    about = "Mean over classes of intersection over union, and the share of pixels that are right."

    @staticmethod
    def score(predictions: Any, references: Any) -> dict[str, float]:
        predicted, true = np.asarray(predictions), np.asarray(references)
        both, ours, theirs = (
            np.bincount(found, minlength=int(max(predicted.max(), true.max())) + 1)
            for found in (true[predicted == true], predicted, true)
        )
        union = ours + theirs - both
        return {"mean_iou": float((both[union > 0] / union[union > 0]).mean()), "accuracy": _accuracy(predicted, true)}


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
    valid = labels != IGNORED
    if not valid.any():
        raise ValueError("There is no label other than -100 to compare with; use an eval_dataset that has labels.")
    predictions = logits.argmax(-1)[valid]
    return {"accuracy": _accuracy(predictions, labels[valid]), "f1": _macro_f1(predictions, labels[valid])}
