# SPDX-License-Identifier: Apache-2.0
"""Folders for OpenVINO from the terminal to the Hub: chosen, measured beside others, timed, told of and pushed."""

import ast
import json
import re
from dataclasses import replace
from importlib.util import find_spec

import datasets
import pytest

from hfkdq import CompressionReport, QuantizationSpec, export_onnx, push_to_hub, quantize
from hfkdq.cli import main
from hfkdq.cli.candidates import find_place
from hfkdq.measuring import latency
from hfkdq.modeling.checkpoints import _PICKLES, _RUN, _refuse_others
from hfkdq.report.layers import describe_stored

from . import tiny
from .hub_server import loopback_hub  # noqa: F401

pytestmark = pytest.mark.skipif(find_spec("openvino") is None, reason='needs OpenVINO: pip install "hfkdq[openvino]"')
# Weights alone are quantized, which is exact on every processor.
SPEC = QuantizationSpec(activation_bits=None)


@pytest.fixture(autouse=True)
def _quick(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(latency, "TURN_SECONDS", 0.01)


@pytest.fixture(scope="module")
def model():
    return quantize(tiny.bert(layers=1, hidden=64), SPEC)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    return export_onnx(
        model, tmp_path_factory.mktemp("openvino") / "files", quantization=SPEC, target="openvino",
        processing_class=tiny.tokenizer(), latency_rounds=0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def onnx(model, tmp_path_factory):
    return export_onnx(
        model, tmp_path_factory.mktemp("onnx") / "files", quantization=SPEC, processing_class=tiny.tokenizer(), latency_rounds=0
    )  # fmt: skip


@pytest.mark.one_line
def test_a_report_measures_both_runtimes_side_by_side(model, folder, onnx, tmp_path):
    report = CompressionReport.measure(
        student=model, onnx={"ONNX Runtime": onnx, "OpenVINO": folder}, eval_dataset=tiny.text_dataset(),
        processing_class=tiny.tokenizer(), latency_rounds=1, threads=1,
    )  # fmt: skip
    student, other, ours = report.engines
    assert [engine.kind for engine in report.engines] == ["torch", "onnx", "openvino"]
    assert ours.metrics == other.metrics == student.metrics
    assert ours.latency.median_ms > 0
    assert ours.size == sum((folder / f"openvino_model.{end}").stat().st_size for end in ("xml", "bin"))
    assert {layer.name: layer for layer in ours.layers} == {layer.name: layer for layer in other.layers}
    assert report.environment["openvino"]
    assert CompressionReport.from_json(report.to_json()).engines == report.engines
    card = report.to_card("me/tiny", folder=folder)
    assert "made smaller with hfkdq and exported to OpenVINO." in card
    assert "- **Export** to OpenVINO, with" in card
    assert "Logits of the ONNX file in ONNX Runtime and the OpenVINO file in OpenVINO against" in card
    assert "- openvino\n" in card
    program = next(code for code in re.findall(r"```python\n(.*?)```", card, re.DOTALL) if "optimum.intel" in code)
    call = next(node for node in ast.walk(ast.parse(program)) if getattr(node, "attr", "") == "from_pretrained")
    assert call.value.id == "OVModelForSequenceClassification"
    report.save_html(tmp_path / "report.html")
    report.save_plot(tmp_path / "report.png")
    with (folder / "openvino_model.bin").open("r+b") as file:
        first = file.read(1)
        file.seek(0)
        file.write(bytes([first[0] ^ 1]))
    with pytest.raises(ValueError, match=r"openvino_model\.bin has changed"):
        CompressionReport.measure(student=model, onnx=folder, eval_dataset=tiny.text_dataset())
    with (folder / "openvino_model.bin").open("r+b") as file:
        file.write(first)
    alone = CompressionReport.from_export(folder)
    assert [(engine.name, engine.kind) for engine in alone.engines] == [
        ("student", "torch"), ("OpenVINO int8 weights", "openvino"),
    ]  # fmt: skip


@pytest.mark.parametrize(("precision", "bits"), [("int4_weights", 4), ("float16", 16), ("dynamic", 8)])
def test_bits_of_a_file_are_those_on_disk(precision, bits, tmp_path):
    model = tiny.bert(layers=1, hidden=64)
    # What integers of inputs cost is measured elsewhere; here they may saturate, as on processors without VNNI.
    written = export_onnx(
        model, tmp_path / "files", quantization=precision, target="openvino", latency_rounds=0, tolerance=1.0
    )
    layers = describe_stored([written / "openvino_model.xml"], model)
    large = [layer for layer in layers if layer.parameters == 128 * 64]  # the feed-forward layers
    assert [layer.bits for layer in large] == [bits, bits]


@pytest.mark.one_line
def test_the_best_is_chosen_in_openvino(tmp_path):
    written = export_onnx(
        tiny.bert(layers=1), tmp_path / "best", quantization="auto", target="openvino", max_drop=1.0, latency_rounds=1,
        threads=1, eval_dataset=tiny.text_dataset(), processing_class=tiny.tokenizer(),
    )  # fmt: skip
    facts = json.loads((written / "export_facts.json").read_text())
    rows = {row["name"]: row for row in facts["choice"]["candidates"]}
    assert facts["target"] == "openvino"
    assert all(rows[name]["median_ms"] > 0 for name in ("int8_weights", "int4_weights", "float16", "float32"))
    assert (written / "openvino_model.xml").is_file()
    assert not list(written.glob("*.onnx*"))


@pytest.mark.one_line
def test_commands_write_time_and_measure_a_folder(tmp_path, capsys):
    checkpoint, out = tmp_path / "small", tmp_path / "small-openvino"
    tiny.bert(layers=1).save_pretrained(checkpoint)
    tiny.tokenizer().save_pretrained(checkpoint)
    tiny.text_dataset().rename_column("labels", "label").to_parquet(tmp_path / "rows.parquet")
    given = ["export", str(checkpoint), str(out), "--target", "openvino", "--quantization", "int8_weights"]
    assert main([*given, "--latency-rounds", "0"]) == 0
    told = capsys.readouterr().out
    assert told.splitlines()[-1] == str(out)
    assert "with integer weights" in told
    file = out / "openvino_model.xml"
    assert main(["bench", str(checkpoint), str(out), f"file={file}", "--length", "8", "--rounds", "1", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == ["small", "small-openvino", "file"]
    assert all(row["latency"]["median_ms"] > 0 for row in rows)
    assert main(["inspect", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["export"]["unchanged"] is True
    # Without a checkpoint beside it: it is measured, and what needs one says so.
    (out / "model.safetensors").unlink()
    facts = json.loads((out / "export_facts.json").read_text())
    del facts["files"]["model.safetensors"]
    (out / "export_facts.json").write_text(json.dumps(facts))
    report = ["--eval-data", str(tmp_path / "rows.parquet"), "--output-dir", str(tmp_path / "report")]
    assert main(["report", str(out), *report, "--latency-rounds", "0"]) == 0
    assert CompressionReport.load(tmp_path / "report" / "report.json").engines[0].kind == "openvino"
    capsys.readouterr()
    for given in (["export", str(out)], ["compress", str(out), "--data", str(tmp_path / "rows.parquet")]):
        assert main([*given, *(["--output-dir", str(tmp_path / "no")] if given[0] == "compress" else [])]) == 1
        told = capsys.readouterr().err.splitlines()[-1]
        assert f"{out} has its weights in openvino_model.xml alone, a file that is run" in told
        assert "Name the checkpoint that it was made of" in told


def test_it_is_pushed_and_its_weights_are_no_pickles(hub_server, folder, onnx, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    report = replace(CompressionReport.from_export(folder), license="apache-2.0")
    push_to_hub(folder, "me/tiny", report=report)
    files = hub_server.repositories["me/tiny"].files()
    assert {"openvino_model.xml", "openvino_model.bin", "README.md"} <= set(files)
    assert files["openvino_model.bin"] == (folder / "openvino_model.bin").read_bytes()
    place = find_place("tiny", "me/tiny")  # downloaded whole, and taken for what it is
    assert place.path == place.folder
    assert (place.folder / "openvino_model.bin").read_bytes() == files["openvino_model.bin"]
    files.pop("model.safetensors")
    with pytest.raises(OSError, match=r"^me/tiny has its weights in openvino_model\.xml alone, a file that is run"):
        _refuse_others("me/tiny", _PICKLES, _RUN)
    (onnx / "pytorch_model.bin").write_bytes(b"weights")
    with pytest.raises(ValueError, match=r"pickles by their names: pytorch_model\.bin"):
        push_to_hub(onnx, "me/other")
