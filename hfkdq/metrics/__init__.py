# SPDX-License-Identifier: Apache-2.0
"""Metrics of every task that need no network: `evaluate` metrics, and `metrics_for` a model."""

from .answers import answer_features, answer_metrics
from .classes import F1, Accuracy, MeanIoU, MultiLabelF1, classification_metrics
from .detection import MeanAveragePrecision, detection_metrics
from .tasks import TaskMetrics, metrics_for
from .text import AnswerF1, Bleu, EntityF1, WordErrorRate
from .values import Correlation, EmbeddingSimilarity

__all__ = [
    "F1", "Accuracy", "AnswerF1", "Bleu", "Correlation", "EmbeddingSimilarity", "EntityF1", "MeanAveragePrecision",
    "MeanIoU", "MultiLabelF1", "TaskMetrics", "WordErrorRate", "answer_features", "answer_metrics",
    "classification_metrics", "detection_metrics", "metrics_for",
]  # fmt: skip
