# SPDX-License-Identifier: Apache-2.0
"""`quantization="auto"`: which candidates there are, and which one is kept."""

from __future__ import annotations

import errno
import json
import logging

import numpy as np
import pytest
import torch

from hfkdq import QuantizationSpec, export_onnx, quantize
from hfkdq.export import selection
from hfkdq.export.job import ExportJob
from hfkdq.export.precisions import PRECISIONS
from hfkdq.export.selection import Candidate, choose, render
from hfkdq.metrics import classification_metrics

from .. import tiny


def row(name, *, size=100, drop=0.0, ms=None, accepted=True, error=None):
    return Candidate(name=name, bytes=size, drop=drop, median_ms=ms, min_ms=ms, accepted=accepted, error=error)


# ---------------------------------------------------------------------- the rule


def test_the_fastest_within_the_bound_is_chosen():
    rows = [row("int8", ms=1.0, drop=0.5, accepted=False), row("dynamic", ms=2.0), row("float32", ms=3.0, size=400)]
    best, reason = choose(rows, "accuracy", 0.01)
    assert best.name == "dynamic"
    assert reason == "dynamic is the fastest of the 2 candidates whose accuracy drops by at most 0.01: 2 ms."


def test_of_two_that_are_as_fast_the_smaller_is_chosen():
    rows = [row("a", ms=1.00, size=30), row("b", ms=1.05, size=20), row("c", ms=1.06, size=10)]
    best, reason = choose(rows, "accuracy", 0.01)
    assert best.name == "b"
    assert reason.endswith("1.05 ms. As fast within 5%, and larger: a.")


def test_without_latencies_the_smallest_is_chosen():
    best, reason = choose([row("a", size=30), row("b", size=20, accepted=False), row("c", size=25)], "f1", 0.0)
    assert best.name == "c"
    assert "c is the smallest of the 2 candidates whose f1 drops by at most 0; latency was not measured" in reason


def test_nothing_is_chosen_if_all_drop_too_far_or_there_is_no_file():
    assert choose([row("a", drop=0.5, accepted=False)], "f1", 0.1)[0] is None
    failed = Candidate(name="a", error="ValueError: it has no legs")
    with pytest.raises(RuntimeError, match=r"exported in no way(.|\n)*a: ValueError: it has no legs"):
        choose([failed], "f1", 0.1)


def test_the_table_has_a_line_for_every_candidate():
    rows = [row("int8", size=2_500_000, drop=0.0123456, ms=1.5), Candidate(name="dynamic", error="one\ntwo")]
    lines = render(rows).splitlines()
    assert lines[1].split() == ["int8", "2.50", "0.01235", "1.5", "1.5", "accepted"]
    assert lines[2].split() == ["dynamic", "-", "-", "-", "-", "one"]


# ---------------------------------------------------------------------- the whole


def settings(model, **kwargs):
    """Everything that "auto" needs, with a metric that is 0 for the model and grows with every difference from it."""
    data = tiny.text_dataset(12)
    with torch.no_grad():
        logits = torch.cat([model(input_ids=torch.tensor([row["input_ids"]])).logits for row in data]).numpy()
    base = dict(
        quantization="auto", processing_class=tiny.tokenizer(), eval_dataset=data, greater_is_better=False,
        compute_metrics=lambda prediction: {"distance": float(np.abs(prediction.predictions - logits).mean())},
        latency_rounds=0, threads=1,
    )  # fmt: skip
    return {**base, **kwargs}


def facts(folder):
    return json.loads((folder / "export_facts.json").read_text())


def test_candidates_are_written_measured_and_the_best_is_kept(tmp_path, caplog):
    model = tiny.bert(layers=1)
    selection.logger.setLevel(logging.INFO)
    selection.logger.addHandler(caplog.handler)
    try:
        # So tight that only what differs by rounding passes: a file that fails is no reason to stop.
        folder = export_onnx(model, tmp_path / "new" / "onnx", **settings(model, tolerance=1e-4, latency_rounds=1))
    finally:
        selection.logger.removeHandler(caplog.handler)
        selection.logger.setLevel(logging.NOTSET)
    written = facts(folder)
    choice = written["choice"]
    rows = {row["name"]: row for row in choice["candidates"]}
    assert list(rows) == ["dynamic", "int8_weights", "int4_weights", "float16", "float32", "int8"]
    assert rows["int8"]["error"] == "left out: it needs calibration="
    assert "dynamic ONNX file differs" in rows["dynamic"]["error"]
    assert str(tmp_path) not in json.dumps(written)
    assert rows["int4_weights"]["accepted"] is False
    assert rows["int4_weights"]["drop"] > 0.01
    assert rows["int4_weights"]["error"].startswith("distance goes from")
    assert rows["float32"]["accepted"]
    assert rows["float32"]["drop"] < 1e-4
    fits = {name: row for name, row in rows.items() if row["accepted"]}
    assert choice["chosen"] in fits
    fastest = min(row["median_ms"] for row in fits.values())
    assert rows[choice["chosen"]]["median_ms"] <= 1.05 * fastest
    assert choice["chosen"] in choice["reason"]
    assert [record.getMessage() for record in caplog.records if choice["reason"] in record.getMessage()]

    assert written["bytes"] == rows[choice["chosen"]]["bytes"] == (folder / "model.onnx").stat().st_size
    assert written["latency"]["onnx"]["median_ms"] == rows[choice["chosen"]]["median_ms"]
    assert written["metrics"]["drop"] == rows[choice["chosen"]]["drop"]
    assert written["metrics"]["max_drop"] == 0.01
    assert (written["accepted"], written["reason"]) == (True, None)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    assert not [path for path in folder.iterdir() if path.is_dir()]
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_trained_model_is_tried_with_its_own_integers(tmp_path):
    data = tiny.text_dataset(16).remove_columns("labels")
    spec = QuantizationSpec(weight_bits=4)
    model = quantize(tiny.bert(layers=1), spec, data, processing_class=tiny.tokenizer()).eval()
    # Codes that float away at ties move a logit by a little; other weights, or none, by more.
    folder = export_onnx(model, tmp_path / "onnx", **settings(model, max_drop=0.02))
    written = facts(folder)
    accepted = [row["name"] for row in written["choice"]["candidates"] if row["accepted"]]
    assert accepted == ["trained"]
    assert written["choice"]["chosen"] == "trained"
    assert QuantizationSpec.from_dict(written["spec"]) == spec
    assert written["metrics"]["reference"] == written["metrics"]["torch"]


def test_if_all_drop_too_far_nothing_is_written_or_the_nearest_is_kept(tmp_path, monkeypatch):
    # Two candidates are enough to see it.
    monkeypatch.setattr(
        selection, "_candidates", lambda *args: ({n: PRECISIONS[n] for n in ("dynamic", "float16")}, [])
    )
    model = tiny.bert(layers=1)
    with pytest.raises(RuntimeError, match=r"no candidate whose distance drops by at most 0\. Nothing(.|\n)*float16 "):
        export_onnx(model, tmp_path / "new" / "onnx", **settings(model, max_drop=0.0))
    assert not list(tmp_path.iterdir())
    written = facts(export_onnx(model, tmp_path / "onnx", **settings(model, max_drop=0.0, allow_drop=True)))
    drops = {row["name"]: row["drop"] for row in written["choice"]["candidates"]}
    assert written["choice"]["chosen"] == min(drops, key=drops.get)
    assert written["accepted"] is False
    assert "max_drop allows 0" in written["reason"]


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (
            "{}/model.onnx is bad",
            r"in no way(.|\n)*dynamic: ValueError: /dynamic/model\.onnx is bad\n(.|\n)*float32: ",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "^.Errno 28. No space left on device$"),
    ],
)
def test_what_fails_for_all_tells_why_and_a_full_disk_ends_it(failure, message, tmp_path, monkeypatch):
    def write(job, precision, folder):
        raise failure if isinstance(failure, OSError) else ValueError(failure.format(folder))

    monkeypatch.setattr(ExportJob, "write", write)
    model = tiny.bert(layers=1)
    with pytest.raises((RuntimeError, OSError), match=message):
        export_onnx(model, tmp_path / "new" / "onnx", **settings(model))
    assert not list(tmp_path.iterdir())


def test_calibration_adds_static_int8(tmp_path, monkeypatch):
    seen = []
    model = tiny.bert(layers=1)

    def write_all(job, quality, precisions, folder):
        seen.append(list(precisions))
        raise RuntimeError("that is enough")

    monkeypatch.setattr(selection, "_write_all", write_all)
    with pytest.raises(RuntimeError, match="that is enough"):
        export_onnx(model, tmp_path / "onnx", **settings(model), calibration=[tiny.batch(model)])
    assert seen == [["int8", "dynamic", "int8_weights", "int4_weights", "float16", "float32"]]


def test_several_metrics_need_a_name(tmp_path):
    model = tiny.bert(layers=1)
    both = dict(compute_metrics=lambda p: {**classification_metrics(p), "f1": 0.5})
    with pytest.raises(ValueError, match=r"compute_metrics gave accuracy.*f1.*Name it with metric="):
        export_onnx(model, tmp_path / "onnx", **settings(model, **both))
