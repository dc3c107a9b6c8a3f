# SPDX-License-Identifier: Apache-2.0
"""Metrics of numbers: of a regression, and of embeddings held against those of a teacher."""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import Sequence, Value

from .base import Array, LocalMetric, library


class Correlation(LocalMetric):
    """Pearson and Spearman correlation, by SciPy, and the mean squared error, of predicted numbers.

    A correlation of numbers that are all equal is not defined, and counts as 0.
    """

    about = "Correlation of numbers and of their ranks, in [-1, 1], and mean squared error."
    prediction = Value("float64")

    @staticmethod
    def score(predictions: Any, references: Any) -> dict[str, float]:
        ours, theirs = np.asarray(predictions, np.float64), np.asarray(references, np.float64)
        return {**_correlations(ours, theirs), "mse": float(np.square(ours - theirs).mean())}


class EmbeddingSimilarity(LocalMetric):
    """How alike two spaces of embeddings are; needs no labels, and the spaces may have different widths.

    - `spearman`: correlation of the ranks of the cosine similarities of all pairs of examples.
    - `retrieval`: share of examples whose nearest other example is the same in both.
    - `cosine`: mean cosine of the two embeddings of an example; only where the widths are equal.

    Predictions and references are vectors, of shape `(examples, width)`. Time and memory grow with the square of the examples.
    """

    about = "Agreement of two spaces of embeddings: ranks of similarities, nearest neighbours, direction."
    prediction = Sequence(Value("float32"))

    @staticmethod
    def score(predictions: Any, references: Any) -> dict[str, float]:
        ours, theirs = (_unit(np.asarray(rows, np.float64)) for rows in (predictions, references))
        if len(ours) < 3:
            raise ValueError(f"Similarities are compared among 3 examples or more, got {len(ours)}.")
        similar = [rows @ rows.T for rows in (ours, theirs)]
        pairs = np.triu_indices(len(ours), k=1)
        metrics = {"spearman": _correlations(*(matrix[pairs] for matrix in similar))["spearman"]}
        for matrix in similar:
            np.fill_diagonal(matrix, -np.inf)
        nearest = [matrix.argmax(-1) for matrix in similar]
        metrics["retrieval"] = float((nearest[0] == nearest[1]).mean())
        if ours.shape == theirs.shape:
            metrics["cosine"] = float((ours * theirs).sum(-1).mean())
        return metrics


def _unit(rows: Array) -> Array:
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


def _correlations(ours: Array, theirs: Array) -> dict[str, float]:
    stats = library("scipy.stats")
    if np.ptp(ours) == 0 or np.ptp(theirs) == 0:
        return {"pearson": 0.0, "spearman": 0.0}
    return {
        "pearson": float(stats.pearsonr(ours, theirs).statistic),
        "spearman": float(stats.spearmanr(ours, theirs).statistic),
    }
