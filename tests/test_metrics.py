# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import evaluate
import numpy as np
import pytest
from transformers import EvalPrediction

from hfkdq.metrics import F1, Accuracy, classification_metrics

PREDICTIONS, REFERENCES = [0, 1, 1, 2, 0], [0, 1, 2, 2, 2]
# Class 0: TP 1, FP 1, FN 0 -> 2/3. Class 1: TP 1, FP 1, FN 0 -> 2/3. Class 2: TP 1, FP 0, FN 2 -> 1/2.
MACRO_F1 = (2 / 3 + 2 / 3 + 1 / 2) / 3


def one_hot(classes, count=3):
    return np.eye(count, dtype="float32")[np.asarray(classes)]


def test_metrics_equal_hand_computed_values_and_combine():
    combined = evaluate.combine([Accuracy(), F1()])
    assert combined.compute(predictions=PREDICTIONS, references=REFERENCES) == pytest.approx(
        {"accuracy": 3 / 5, "f1": MACRO_F1}
    )


def test_metrics_accumulate_batches():
    metric = F1()
    for start in range(0, 5, 2):
        metric.add_batch(predictions=PREDICTIONS[start : start + 2], references=REFERENCES[start : start + 2])
    assert metric.compute() == pytest.approx({"f1": MACRO_F1})


def test_a_class_that_is_only_predicted_counts_as_zero():
    assert F1().compute(predictions=[0, 1], references=[0, 0])["f1"] == pytest.approx((2 / 3 + 0) / 2)


def test_classification_metrics_takes_logits():
    expected = pytest.approx({"accuracy": 3 / 5, "f1": MACRO_F1})
    assert classification_metrics(EvalPrediction(one_hot(PREDICTIONS), np.array(REFERENCES))) == expected
    with_states = (one_hot(PREDICTIONS), np.zeros((5, 7)))
    assert classification_metrics(EvalPrediction(with_states, np.array(REFERENCES))) == expected


def test_classification_metrics_ignores_padding_of_token_labels():
    logits = one_hot([[0, 1, 1], [2, 0, 0]])
    labels = np.array([[0, 1, 2], [2, 2, -100]])
    assert classification_metrics(EvalPrediction(logits, labels)) == pytest.approx({"accuracy": 3 / 5, "f1": MACRO_F1})


def test_classification_metrics_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"shape \(5, 3\) need labels of shape \(5,\), got \(5, 1\)"):
        classification_metrics(EvalPrediction(one_hot(PREDICTIONS), np.array(REFERENCES)[:, None]))
    with pytest.raises(ValueError, match="no label other than -100"):
        classification_metrics(EvalPrediction(one_hot([0]), np.array([-100])))
