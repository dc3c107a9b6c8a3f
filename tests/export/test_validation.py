# SPDX-License-Identifier: Apache-2.0
"""What an export measures of its file: the metric, its drop, the top classes, the latency."""

from __future__ import annotations

import errno
import json
import os

import numpy as np
import pytest
import torch
from transformers import BertForSequenceClassification, DataCollatorForTokenClassification

from hfkdq import QuantizationSpec, export_onnx, quantize
from hfkdq.export.job import ExportJob
from hfkdq.export.validation import Quality, Timed, Timing
from hfkdq.export.verify import run_torch
from hfkdq.measuring.evaluation import Evaluation
from hfkdq.metrics import classification_metrics
from hfkdq.modeling.batches import make_batches
from hfkdq.quantization import strip_quantizers_

from .. import tiny
from ..families import FAMILIES

INT8 = QuantizationSpec()
ROWS = 20


def facts(folder):
    return json.loads((folder / "export_facts.json").read_text())


def logits_of(model, data):
    """One example after the other, so that no collator and no Trainer has a say."""
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([row["input_ids"]])).logits for row in data]).numpy()


def distance_to(logits):
    """A metric that is 0 for these logits and grows with every difference from them."""
    return lambda prediction: {"distance": float(np.abs(prediction.predictions - logits).mean())}


def calibrated(data):
    return quantize(tiny.bert(layers=1), INT8, data.remove_columns("labels"), processing_class=tiny.tokenizer()).eval()


# ---------------------------------------------------------------------- the whole


def test_the_report_holds_metrics_of_torch_and_of_the_file(tmp_path):
    data = tiny.text_dataset(ROWS)
    model = calibrated(data)
    seen = []

    def metrics(prediction):
        seen.append(prediction.predictions)
        return classification_metrics(prediction)

    folder = export_onnx(
        model, tmp_path / "onnx", quantization=INT8, processing_class=tiny.tokenizer(), eval_dataset=data,
        compute_metrics=metrics, metric="accuracy", max_drop=1.0, latency_rounds=1, threads=1,
    )  # fmt: skip
    written = facts(folder)
    quality, labels = written["metrics"], np.array(data["labels"])
    plain = strip_quantizers_(calibrated(data))
    ours, theirs = logits_of(model, data), logits_of(plain, data)
    assert quality["torch"]["accuracy"] == quality["reference"]["accuracy"]
    assert quality["torch"]["accuracy"] == pytest.approx((ours.argmax(-1) == labels).mean())
    assert quality["float"]["accuracy"] == pytest.approx((theirs.argmax(-1) == labels).mean())
    assert quality["onnx"]["accuracy"] == pytest.approx((seen[-1].argmax(-1) == labels).mean())
    assert quality["drop"] == pytest.approx(quality["torch"]["accuracy"] - quality["onnx"]["accuracy"])
    assert len(seen) == 3  # nothing is measured twice
    different = int((seen[-1].argmax(-1) != ours.argmax(-1)).sum())
    assert (quality["top1_different"], quality["top1_compared"], quality["examples"]) == (different, ROWS, ROWS)
    assert quality["top1_different_share"] == different / ROWS
    assert (written["accepted"], written["reason"]) == (True, None)

    latency = written["latency"]
    length = len(data[0]["input_ids"])
    assert (latency["threads"], latency["rounds"], latency["device"]) == (1, 1, "cpu")
    assert latency["inputs"]["input_ids"] == [1, length]
    for name in ("onnx", "float32"):
        assert 0 < latency[name]["min_ms"] <= latency[name]["median_ms"]
        assert latency[name]["calls"] >= 10
    assert latency["speedup"] == pytest.approx(latency["float32"]["median_ms"] / latency["onnx"]["median_ms"])
    assert sorted(path.name for path in folder.glob("**/*.onnx")) == ["model.onnx"]
    assert not [path for path in folder.iterdir() if path.is_dir()]


def test_parity_is_measured_on_batches_of_two_sizes(tmp_path):
    written = facts(export_onnx(tiny.bert(layers=1), tmp_path / "onnx", latency_rounds=0))
    shapes = [batch["inputs"]["input_ids"] for batch in written["batches"]]
    assert len({size for size, _ in shapes}) == len({length for _, length in shapes}) == 2
    assert max(batch["max_abs_diff"] for batch in written["batches"]) == written["max_abs_diff"]
    assert sum(size for size, _ in shapes) == written["samples"]
    assert written["latency"] == {"left_out": "it is the float32 file itself"}
    assert "metrics" not in written


def test_a_drop_past_the_bound_is_refused_or_kept_aside(tmp_path):
    data, model = tiny.text_dataset(ROWS), tiny.bert(layers=1)
    settings = dict(
        quantization="dynamic", processing_class=tiny.tokenizer(), eval_dataset=data, greater_is_better=False,
        compute_metrics=distance_to(logits_of(model, data)), max_drop=1e-4, latency_rounds=0,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match=r"distance goes from .* 20 examples; .* max_drop allows 0\.0001\. Nothing"):
        export_onnx(model, tmp_path / "new" / "onnx", **settings)
    assert not list(tmp_path.iterdir())
    written = facts(export_onnx(model, tmp_path / "onnx", **settings, allow_drop=True))
    assert written["accepted"] is False
    assert written["reason"].startswith("distance goes from")
    assert written["metrics"]["drop"] > 1e-4
    assert written["metrics"]["drop"] == pytest.approx(written["metrics"]["onnx"]["distance"], abs=1e-5)
    assert written["latency"] == {"left_out": "latency_rounds is 0"}


# ---------------------------------------------------------------------- metrics without a file


@pytest.fixture
def evaluation(tmp_path):
    def make(data, compute_metrics=classification_metrics, collator=None, preprocess=None):
        return Evaluation(data, compute_metrics, tiny.tokenizer(), collator, 8, str(tmp_path / "trainer"), preprocess)

    return make


def shifted(model, amount):
    """A runner that adds to the logits of the second class what a file would do wrong."""

    def run(batch):
        logits = run_torch(model, [batch])[0]["logits"].clone()
        logits[..., 1] += amount
        return {"logits": logits}

    return run


def test_of_logits_what_the_user_keeps_is_kept_alone(evaluation):
    """For a model and for what runs in its place."""
    data, model, kept = tiny.text_dataset(ROWS), tiny.bert(), []

    def share(prediction):
        kept.append(prediction.predictions.shape)
        return {"accuracy": float((prediction.predictions == prediction.label_ids).mean())}

    measured = evaluation(data, share, preprocess=lambda logits, labels: logits.argmax(-1))
    plain = evaluation(data)
    for runner in (None, shifted(model, 0.0)):
        assert measured.metrics("it", model, runner)["accuracy"] == plain.metrics("it", model, runner)["accuracy"]
    assert kept == [(ROWS,)] * 2


@pytest.mark.parametrize(("greater_is_better", "sign"), [(True, 1), (False, -1)])
def test_a_drop_is_for_the_worse_whichever_way_the_metric_goes(evaluation, greater_is_better, sign):
    data, model = tiny.text_dataset(ROWS), tiny.bert()
    quality = Quality(evaluation(data), "accuracy", greater_is_better, 0.0)
    quality.begin(model, model)
    found = quality.of_file(model, quality.of_torch("torch", model), shifted(model, 100.0))
    labels = np.array(data["labels"])
    before, after = (logits_of(model, data).argmax(-1) == labels).mean(), (labels == 1).mean()
    assert before != after
    assert found["drop"] == pytest.approx(sign * (before - after))
    assert (quality.rejection_reason(found) is None) == (found["drop"] <= 0)


def test_a_drop_as_large_as_the_bound_is_allowed(evaluation):
    model, values = tiny.bert(), iter([0.9, 0.89])
    quality = Quality(evaluation(tiny.text_dataset(4), lambda prediction: {"a": next(values)}), None, True, 0.01)
    quality.begin(model, model)
    found = quality.of_file(model, quality.of_torch("torch", model), shifted(model, 0.0))
    assert found["drop"] == 0.01 < 0.9 - 0.89
    assert quality.rejection_reason(found) is None


def test_top_classes_are_compared_where_there_is_a_label(evaluation):
    data, model = tiny.token_dataset(ROWS), tiny.bert_tokens()
    quality = Quality(
        evaluation(data, lambda prediction: {}, DataCollatorForTokenClassification(tiny.tokenizer())), None, True, None
    )
    quality.begin(model, model)
    found = quality.of_file(model, quality.of_torch("torch", model), shifted(model, 100.0))
    rows = [np.array(row["labels"]) != -100 for row in data]
    with torch.no_grad():
        tops = [model(input_ids=torch.tensor([row["input_ids"]])).logits[0].argmax(-1).numpy() for row in data]
    assert found["top1_compared"] == sum(row.sum() for row in rows)
    assert found["top1_different"] == sum((top[row] != 1).sum() for top, row in zip(tops, rows, strict=True))
    assert found["drop"] is None


def test_an_encoder_decoder_is_measured_with_the_decoder_inputs_that_its_labels_make(evaluation):
    data = tiny.text_dataset(6).map(lambda row: {"labels": row["input_ids"][:4]})
    model = tiny.t5()
    shapes = lambda prediction: {"classes": prediction.predictions.shape[-1]}  # noqa: E731
    scores = Quality(evaluation(data, shapes), None, True, None).of_torch("torch", model)
    assert scores.metrics == {"classes": model.config.vocab_size}
    with torch.no_grad():
        tops = [
            model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).logits.argmax(-1)
            for row in data
        ]
    assert torch.equal(scores.top_classes, torch.cat(tops).flatten())


# ---------------------------------------------------------------------- what is refused

QUALITY = dict(eval_dataset=tiny.text_dataset(4), compute_metrics=classification_metrics)
REFUSED = {
    "no data": (dict(compute_metrics=classification_metrics), "given without eval_dataset="),
    "a bound on nothing": (dict(max_drop=0.1), "max_drop= needs eval_dataset="),
    "a name of nothing": (dict(metric="accuracy"), "metric= needs eval_dataset="),
    "auto": (dict(quantization="auto"), 'quantization="auto" needs eval_dataset='),
    "negative": (dict(QUALITY, max_drop=-0.1), "max_drop must be 0 or a positive number.*got -0.1"),
    "nan": (dict(QUALITY, max_drop=float("nan")), "max_drop must be 0 or a positive number"),
    "allow what": (dict(QUALITY, allow_drop=True), "allow_drop=True needs max_drop="),
    "unknown metric": (dict(QUALITY, metric="bleu"), "metric='bleu' is none of .*accuracy"),
    "which metric": (dict(QUALITY, max_drop=0.1), "compute_metrics gave accuracy.*Name it with metric="),
    "no examples": (dict(QUALITY, eval_dataset=tiny.text_dataset(4).select([])), "no examples"),
    "no labels": (dict(QUALITY, eval_dataset=tiny.text_dataset(4).remove_columns("labels")), "no labels"),
    "rounds": (dict(latency_rounds=-1), "latency_rounds must be an integer of at least 0, got -1"),
    "threads": (dict(threads=0), "threads must be an integer of at least 1, got 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_arguments_that_need_one_another_are_refused_before_any_export(case, tmp_path, monkeypatch):

    def write(*args):
        raise AssertionError("the export has begun")

    monkeypatch.setattr(ExportJob, "write", write)
    arguments, message = REFUSED[case]
    settings = {"processing_class": tiny.tokenizer(), "latency_rounds": 0, **arguments}
    with pytest.raises(ValueError, match=message):
        export_onnx(tiny.bert(layers=1), tmp_path / "onnx", **settings)
    assert not list(tmp_path.iterdir())


def test_calibration_without_a_column_is_refused_at_the_first_look():
    data = tiny.text_dataset(4).rename_column("input_ids", "words")
    with pytest.raises(ValueError, match=r"columns words, attention_mask, labels; Bert\w+ takes input_ids"):
        make_batches(tiny.bert(), data, 4, None, tiny.tokenizer(), labels=False)


# ---------------------------------------------------------------------- disks


def test_a_folder_below_a_file_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match=r"file is a file\. Export to another folder"):
        export_onnx(tiny.bert(layers=1), tmp_path / "file" / "onnx")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_refused_at_once(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(PermissionError, match=r"locked is read-only\. Export to another folder"):
        export_onnx(tiny.bert(layers=1), tmp_path / "locked" / "onnx")


@pytest.mark.parametrize("place", ["the checkpoint", "a file", "the report"])
def test_a_full_disk_leaves_nothing(place, tmp_path, monkeypatch):
    from pathlib import Path

    from hfkdq.export import graph

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    model = tiny.bert(layers=1)
    monkeypatch.setattr(
        {"the checkpoint": type(model), "a file": graph, "the report": Path}[place],
        {"the checkpoint": "save_pretrained", "a file": "save_graph", "the report": "write_text"}[place], full,
    )  # fmt: skip
    with pytest.raises(OSError, match="No space left on device"):
        export_onnx(model, tmp_path / "new" / "onnx", latency_rounds=0)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- latency


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_model_that_generates_is_timed_and_compared_token_by_token(family, tmp_path):
    model = getattr(tiny, family)(layers=1)
    written = facts(
        export_onnx(model, tmp_path / "onnx", quantization="int8_weights", latency_rounds=1, threads=1)
    )  # fmt: skip
    assert written["task"].endswith("-with-past")
    steps = written["incremental_decode"]
    assert 0 < steps["max_abs_diff"] <= 1e-4 * steps["max_abs_logit"]
    assert steps["samples"] == 2
    latency = written["latency"]
    parts = latency["parts"]
    assert list(parts) == (["prompt", "next token"] if family == "llama" else ["encoder", "prompt", "next token"])
    for name in ("onnx", "float32"):
        whole = sum(part["times"] * part[name]["median_ms"] for part in parts.values())
        assert latency[name]["median_ms"] == pytest.approx(whole)
    assert latency["speedup"] == pytest.approx(latency["float32"]["median_ms"] / latency["onnx"]["median_ms"])


def test_a_cache_that_goes_wrong_refuses_the_export(tmp_path, monkeypatch):
    from hfkdq.export.runner import GeneratingFiles

    steps = GeneratingFiles.incremental_decode
    monkeypatch.setattr(
        GeneratingFiles, "incremental_decode", lambda self, batch: {"logits": 2 * steps(self, batch)["logits"]}
    )
    with pytest.raises(RuntimeError, match=r"differs from the torch model where it adds token by token to its cache"):
        export_onnx(tiny.llama(layers=1), tmp_path / "onnx", latency_rounds=0)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_slower_is_told_of(monkeypatch):
    from hfkdq.export import validation
    from hfkdq.measuring.latency import Latency

    said = []
    monkeypatch.setattr(validation.logger, "warning", said.append)
    inputs = {"input_ids": np.zeros((1, 4), np.int64)}
    slow, fast = (Latency(median_ms=ms, min_ms=ms, calls=10) for ms in (2.0, 1.0))
    slow, fast = (Timed({"model": (latency, 1)}) for latency in (slow, fast))
    found = Timing(1, 1).facts("int8", {"int8": slow, "float32": fast}, inputs)
    assert found["speedup"] == 0.5
    assert "int8 file takes 2 ms, that of float32 1 ms" in said.pop()
    assert Timing(1, 1).facts("int8", {"int8": fast, "float32": slow}, inputs)["speedup"] == 2.0
    assert not said


@pytest.mark.parametrize("integers", [False, True])
def test_convolutions_that_stay_floats_are_told_of_where_their_file_is_slower(integers, tmp_path, monkeypatch):
    from hfkdq.export import validation
    from hfkdq.measuring.latency import Latency

    said = []
    monkeypatch.setattr(validation.logger, "warning", said.append)
    slow, fast = (Timed({"model": (Latency(median_ms=ms, min_ms=ms, calls=10), 1)}) for ms in (2.0, 1.0))
    monkeypatch.setattr(Timing, "time", lambda *_: {"int8": slow, "float32": fast})
    batch = {"pixel_values": torch.randn(4, 3, 64, 64)}
    model = FAMILIES["resnet"].make()
    settings = {"calibration": [batch], "latency_rounds": 1, "integer_convolutions": integers}
    export_onnx(model, tmp_path / "onnx", quantization="int8", **settings)
    assert len(said) == 1
    assert ("integer_convolutions=True" in said[0]) is not integers


def test_no_ratio_is_recorded_where_the_machine_was_too_busy():
    from hfkdq.measuring.latency import Latency

    inputs = {"input_ids": np.zeros((1, 4), np.int64)}
    starved = Latency(median_ms=492.0, min_ms=24.0, calls=10, rounds=(490.0, 492.0))
    plain, fast = (Latency(median_ms=ms, min_ms=ms, calls=10, rounds=(ms, ms * 1.1)) for ms in (24.0, 1.0))
    starved, plain, fast = (Timed({"model": (latency, 1)}) for latency in (starved, plain, fast))
    found = Timing(1, 2).facts("int8", {"int8": fast, "float32": starved}, inputs)
    assert "speedup" not in found
    assert "too busy" in found["speedup_left_out"]
    found = Timing(1, 2).facts("int8", {"int8": fast, "float32": plain}, inputs)
    assert found["speedup"] == pytest.approx(24.0)
    assert found["speedup_interval"] == pytest.approx([24.0, 24.0])


def test_what_the_code_of_a_model_raises_while_it_is_traced_is_told_as_that(tmp_path):
    """OWL-ViT divides the rows of its texts by the number of images, SpeechT5 asks for a vocoder."""

    class Watchful(BertForSequenceClassification):
        def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, labels=None, **kwargs):
            if torch.jit.is_tracing() or torch.compiler.is_compiling():
                raise LookupError("not while somebody looks")
            return super().forward(input_ids, attention_mask, token_type_ids, labels=labels, **kwargs)

    model = Watchful(tiny.bert().config).eval()
    with pytest.raises(
        RuntimeError, match=r"The exporter cannot write Watchful \(.*not while somebody looks.*without a file"
    ):
        export_onnx(model, tmp_path / "onnx", quantization="float32")
    assert not (tmp_path / "onnx").exists()
