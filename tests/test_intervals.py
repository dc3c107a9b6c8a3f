# SPDX-License-Identifier: Apache-2.0
"""How sure numbers are: intervals of metrics, of drops and of speed-ups, and ratios that are not given."""

import dataclasses
import json
from statistics import NormalDist

import numpy as np
import pytest
from scipy.stats import binomtest
from transformers import EvalPrediction

from hfkdq.measuring.intervals import change, sample, wilson
from hfkdq.measuring.latency import latency_of, rounds_confidence, total_latency
from hfkdq.metrics import classification_metrics
from hfkdq.metrics.tasks import TaskMetrics, metrics_for
from hfkdq.report import CompressionReport, Engine, Latency
from hfkdq.report.table import NONE, cells, told_doubts

from . import tiny

CLASSES = TaskMetrics(compute=classification_metrics, metric="accuracy")


def classified(rows=200, wrong=40, seed=0):
    """Logits of three classes, of which so many are wrong, and labels."""
    labels = np.random.default_rng(seed).integers(3, size=rows)
    said = np.where(np.arange(rows) < wrong, (labels + 1) % 3, labels)
    return EvalPrediction(predictions=np.eye(3)[said], label_ids=labels)


@pytest.mark.parametrize(("right", "rows"), [(0, 10), (1, 1), (8, 10), (30, 30), (500, 1066)])
def test_wilson_is_that_of_scipy(right, rows):
    known = binomtest(right, rows).proportion_ci(method="wilson")
    assert wilson(right / rows, rows) == pytest.approx([known.low, known.high], abs=1e-9)


def test_a_share_of_rows_has_wilsons_interval_and_other_metrics_that_of_draws():
    prediction = classified()
    found = sample(CLASSES, prediction, classification_metrics(prediction), 300)
    assert found.intervals["accuracy"] == wilson(0.8, 200)
    assert found.draws["accuracy"].std() == pytest.approx((0.8 * 0.2 / 200) ** 0.5, rel=0.15)
    low, high = found.intervals["f1"]
    assert low < classification_metrics(prediction)["f1"] < high
    again = sample(CLASSES, prediction, classification_metrics(prediction), 300)
    assert again.intervals == found.intervals


def test_a_drop_is_measured_on_the_same_rows():
    first, same, worse = classified(), classified(), classified(wrong=60)
    sampled = [sample(CLASSES, one, classification_metrics(one), 300) for one in (first, same, worse)]
    assert change(sampled[0], sampled[1])["accuracy"] == [0.0, 0.0]
    low, high = change(sampled[0], sampled[2])["accuracy"]
    assert low < -0.1 < high < 0  # 20 rows of 200, and it is sure that there are some
    # Rows that both get wrong say nothing of the drop, so it is surer than two intervals side by side.
    apart = [found.intervals["accuracy"] for found in sampled]
    assert high - low < (apart[0][1] - apart[0][0]) + (apart[2][1] - apart[2][0])


def test_rows_that_are_held_against_one_another_are_drawn_once():
    values = np.random.default_rng(0).normal(size=400)
    seen = []

    def mean(prediction):
        seen.append(prediction.predictions)
        return {"mean": float(prediction.predictions.mean())}

    task = TaskMetrics(compute=mean, metric="mean", needs_labels=False)
    found = sample(task, EvalPrediction(values, values), {"mean": float(values.mean())}, 400)
    assert all(len(np.unique(rows)) == len(rows) == 200 for rows in seen)
    low, high = found.intervals["mean"]
    width = 2 * NormalDist().inv_cdf(0.975) * values.std() / 400**0.5
    assert high - low == pytest.approx(width, rel=0.15)  # as wide as if all rows had been drawn anew


def test_texts_are_decoded_once_and_drawn():
    model = tiny.t5()
    task = metrics_for(model, tiny.tokenizer())
    ids = np.array([[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16], [17, 18, 19, 20]])
    said = np.where(np.arange(4)[:, None] < 2, ids, 30)
    found = sample(task, EvalPrediction(said, ids), task(EvalPrediction(said, ids)), 50)
    assert set(found.intervals) == {"bleu", "chrf"}
    low, high = found.intervals["chrf"]
    assert 0 <= low < task(EvalPrediction(said, ids))["chrf"] < high <= 100


def test_batches_are_drawn_where_predictions_are_batches():
    def share(prediction):
        assert isinstance(prediction.predictions, list)
        return {"share": float(np.mean([batch.mean() for batch in prediction.predictions]))}

    task = TaskMetrics(compute=share, metric="share", concat_batches=False)
    batches = [np.full(2, float(i)) for i in range(5)]
    found = sample(task, EvalPrediction(batches, [[]] * 5), {"share": 2.0}, 200, batched=True)
    assert 0 <= found.intervals["share"][0] < 2 < found.intervals["share"][1] <= 4


def test_what_cannot_be_drawn_has_no_interval():
    def fails(prediction):
        raise ValueError("not of a part")

    prediction = classified(20, 0)
    metrics = {"accuracy": 1.0, "other": 3.0}
    found = sample(TaskMetrics(compute=fails, metric="other"), prediction, metrics, 20)
    assert found.intervals == {"accuracy": wilson(1.0, 20)}
    uneven = EvalPrediction((np.zeros((4, 3)), np.zeros((2, 3))), np.zeros(4))
    assert sample(CLASSES, uneven, {"f1": 0.5}, 20).intervals == {}
    assert sample(CLASSES, classified(1, 0), {"accuracy": 1.0, "f1": 1.0}, 20).intervals == {
        "accuracy": wilson(1.0, 1)
    }


def timed(*latencies, **fields):
    engines = tuple(
        Engine(name=name, kind="onnx", metrics={}, size=10, latency=latency)
        for name, latency in zip("abc", latencies, strict=False)
    )
    timing = {"device": "cpu", "threads": 1, "rounds": 3, "inputs": {}}
    return CompressionReport(engines=engines, architecture="Model", samples=0, timing=timing, **fields)


def turns(*rounds):
    """Rounds in which every call took as long as the others."""
    return latency_of([[ms] * 10 for ms in rounds])


def test_a_speed_up_is_the_median_of_paired_rounds():
    report = timed(turns(10.0, 12.0, 20.0), turns(5.0, 6.0, 9.0))
    assert report.speedup(report.engines[1]) == 2.0
    assert report.speedup_interval(report.engines[1]) == (2.0, pytest.approx(20 / 9))
    assert report.speedup_interval(report.engines[0]) is None
    assert cells(report)[1][1][-1] == "2.00x [2.00, 2.22]"
    assert any("3 paired rounds, which hold the median in 75 of 100" in sentence for sentence in told_doubts(report))
    assert [rounds_confidence(rounds) for rounds in (1, 2, 6)] == [0.0, 0.5, 0.96875]


def test_no_speed_up_is_told_where_the_machine_was_too_busy(tmp_path):
    # By the medians 492, by the fastest calls 24: something else had the cores while the first was timed.
    starved = Latency(median_ms=492.0, min_ms=24.0, calls=30, rounds=(480.0, 492.0, 500.0))
    quiet = Latency(median_ms=1.0, min_ms=1.0, calls=30, rounds=(1.0, 1.0, 1.0))
    report = timed(starved, quiet)
    assert report.speedup(report.engines[1]) is report.speedup_interval(report.engines[1]) is None
    assert cells(report)[1][1][-1] == NONE
    assert any("No speed-up is given for b: the machine was too busy" in sentence for sentence in told_doubts(report))
    assert "too busy" in report.to_markdown()
    assert "too busy" in report.to_html()
    assert report.save_plot(tmp_path / "plot.png").stat().st_size > 0
    uneven = timed(turns(10.0, 10.0, 30.0), turns(5.0, 5.0, 5.0))
    assert uneven.speedup(uneven.engines[1]) is None  # 2 in one round, 6 in another
    both = timed(turns(10.0, 10.0, 30.0), turns(5.0, 5.0, 15.0))
    assert both.speedup(both.engines[1]) == 2.0  # slower for both


def test_reports_of_earlier_releases_have_ratios_without_intervals(tmp_path):
    report = timed(Latency(median_ms=4.0, min_ms=3.9, calls=9), Latency(median_ms=2.0, min_ms=1.9, calls=9))
    text = report.to_json()
    for field in ("rounds", "intervals", "changes", "layers", "curves", "mistakes"):
        assert f'"{field}"' in text
    old = {name: value for name, value in dataclasses.asdict(report).items() if name not in ("curves", "mistakes")}
    for engine in old["engines"]:
        del engine["intervals"], engine["changes"], engine["layers"], engine["latency"]["rounds"]
    loaded = CompressionReport.from_json(json.dumps(old))
    assert loaded == report
    assert loaded.speedup(loaded.engines[1]) == 2.0
    assert loaded.speedup_interval(loaded.engines[1]) is None


def test_rounds_of_several_calls_are_those_of_their_sum():
    whole = total_latency([(turns(1.0, 2.0), 1), (turns(0.5, 0.25), 4)])
    assert whole.rounds == (3.0, 3.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [("intervals", {"f1": [0.2]}), ("intervals", {"f1": [0.9, 0.1]}), ("changes", {"f1": []})],
)
def test_what_is_no_interval_is_refused(field, value):
    engine = Engine(name="a", kind="onnx", metrics={"f1": 0.5}, size=10, **{field: value})
    report = CompressionReport(engines=(engine,), architecture="Model", samples=3)
    with pytest.raises(ValueError, match=f"engines\\[0\\].{field}"):
        CompressionReport.from_json(report.to_json())
