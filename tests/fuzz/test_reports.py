# SPDX-License-Identifier: Apache-2.0
"""Whatever stands in a `report.json`: it renders as text that stays text, or one clear error says why not."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from hfkdq import CompressionReport
from hfkdq.export.record import read_export
from hfkdq.measuring.latency import Latency
from hfkdq.report import DatasetInfo, Layer, Mistake
from hfkdq.report.compression import Engine
from tests.fuzz.common import answers, bounded, mutated, mutations

REPORT = CompressionReport(
    engines=(
        Engine(name="teacher", kind="torch", metrics={"accuracy": 0.9}, size=1000, parameters=250, sparsity=0.0,
               latency=Latency(median_ms=2.0, min_ms=1.0, calls=10, rounds=(2.0, 2.1)), intervals={"accuracy": [0.8, 0.95]},
               layers=(Layer(name="layer.weight", parameters=16, bits=8, sparsity=0.5),)),
        Engine(name="ONNX int8", kind="onnx", metrics={"accuracy": 0.89}, size=260,
               latency=Latency(median_ms=1.0, min_ms=0.9, calls=10, rounds=(1.0, 1.1)), changes={"accuracy": [-0.1, 0.1]},
               parity={"kind": "int8", "max_abs_diff": 0.01, "samples": 8, "tolerance": 0.1, "opset": 17}),
    ),
    architecture="BertForSequenceClassification", samples=100, task="text-classification", processor="AutoTokenizer",
    facts={
        "student": {"teacher_layers": 4, "layers": [2, 4]},
        "distillation": {"objectives": [{"name": "LogitKD", "temperature": 2.0}], "steps": 10, "teacher": "BertForSequenceClassification"},
        "pruning": {"spec": {"structure": "neuron", "criterion": "taylor"}, "achieved_sparsity": 0.5, "parameters_before": 20, "parameters_after": 10},
        "quantization": {"spec": {"weight_bits": 8, "activation_bits": 8, "exclude_modules": ["query"], "overrides": {}}},
    },
    timing={"device": "cpu", "threads": 1, "rounds": 3, "inputs": {"input_ids": [1, 8]}},
    environment={"processor": "some", "python": "3.11"},
    dataset=DatasetInfo(name="Reviews", id="someone/reviews", split="test"), base_model="someone/model", license="mit", language="en",
    curves={"loss": [[1.0, 2.0], [2.0, 1.0]]},
    mistakes=(Mistake(row=3, scores={"teacher": 1.0, "ONNX int8": 0.0}, said={"teacher": "a"}, label="a", texts={"text": "w1 w2"},
                      media={"image": "data:image/png;base64,iVBORw0KGgo="}),),
)  # fmt: skip
EXPORT = {
    "kind": "int8", "task": "text-classification", "opset": 17, "samples": 8, "max_abs_diff": 0.1, "mean_abs_diff": 0.01,
    "max_abs_logit": 2.0, "top1_agreement": 1.0, "tolerance": 0.1, "quantized_linears": 14, "fused_linears": 14,
    "files": {"model.onnx": {"bytes": 3, "sha256": "a" * 64}},
    "model": {"architecture": "A", "model_type": "bert", "id2label": {"0": "a"}, "parameters": 3, "shapes": "b" * 64},
}  # fmt: skip


def render(text: str) -> None:
    """All that becomes of a report."""
    report = CompressionReport.from_json(text)
    card = report.to_card()
    assert "<script" not in card
    assert "\n# Heading" not in card
    assert "49" not in card or "{{" not in text
    page = report.to_html()
    assert "<script" not in page
    assert "<h1>Heading" not in page
    assert "49" not in re.sub(r"<svg.*?</svg>|<style>.*?</style>", "", page, flags=re.DOTALL) or "{{" not in text
    Console(quiet=True).print(report.table())
    assert CompressionReport.from_json(report.to_json()) == report


@pytest.mark.one_line
@bounded
@given(steps=mutations)
def test_mutated_reports(steps):
    text = json.dumps(mutated(json.loads(REPORT.to_json()), steps))
    answers(lambda: render(text))


@bounded
@given(place=st.integers(0, 10**6), data=st.binary(min_size=0, max_size=20))
def test_damaged_reports(place, data, tmp_path_factory):
    whole = REPORT.to_json().encode()
    place %= len(whole)
    path = tmp_path_factory.getbasetemp() / "damaged.json"
    path.write_bytes(whole[:place] + data + whole[place + len(data) :])

    def load():
        CompressionReport.load(path).to_card()

    answers(load)


@bounded
@given(steps=mutations)
def test_mutated_reports_of_exports(steps, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    (folder / "report.json").write_text(json.dumps(mutated(EXPORT, steps)), encoding="utf-8")
    answers(lambda: read_export(folder))


def test_the_whole_ones_are_read(tmp_path):
    assert answers(lambda: render(REPORT.to_json()))
    (tmp_path / "report.json").write_text(json.dumps(EXPORT))
    assert answers(lambda: read_export(tmp_path))


@pytest.mark.parametrize("value", [float("nan"), 10**400, "x\ny"])
def test_one_that_is_told_apart(value):
    data = json.loads(REPORT.to_json())
    data["engines"][0]["size"] = value
    assert not answers(lambda: render(json.dumps(data)))


def test_a_field_without_a_name():
    assert not answers(lambda: render(json.dumps({**json.loads(REPORT.to_json()), "": 1})))


def test_a_metric_that_is_called_a_tag():
    data = json.loads(REPORT.to_json())
    for engine in data["engines"]:
        engine["metrics"] = {"<script>alert(1)</script>": 0.5}
    assert answers(lambda: render(json.dumps(data)))
