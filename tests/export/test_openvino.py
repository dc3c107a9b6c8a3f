# SPDX-License-Identifier: Apache-2.0
"""Folders for OpenVINO: what is written, proven and timed there, and what is refused."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import transformers
from onnx import numpy_helper

from hfkdq import QuantizationSpec, export_onnx, quantize
from hfkdq.export import OpenVinoSession, job, openvino_runtime
from hfkdq.export.graph import multiplies_exactly
from hfkdq.export.precisions import INTEGER_TOLERANCE

from .. import tiny

ROOT = Path(__file__).parents[2]
needs_openvino = pytest.mark.skipif(
    find_spec("openvino") is None, reason='needs OpenVINO: pip install "hfkdq[openvino]"'
)
needs_vnni = pytest.mark.skipif(
    not multiplies_exactly(), reason="products of uint8 and int8 saturate on this processor, in OpenVINO too"
)
FILES = {"config.json", "model.safetensors", "export_facts.json", "openvino_model.xml", "openvino_model.bin"}


def written(tmp_path, model, *, name="openvino", **settings):
    settings = {"target": "openvino", "latency_rounds": 0, **settings}
    folder = export_onnx(model, tmp_path / name, **settings)
    return folder, json.loads((folder / "export_facts.json").read_text())


def batches(model):
    return [tiny.batch(model, seed=seed) for seed in range(3)]


@needs_openvino
@pytest.mark.parametrize("kind", ["float32", "float16", "int8_weights", "int4_weights"])
def test_a_file_computes_in_openvino_what_the_model_does(kind, tmp_path):
    import openvino

    model = tiny.bert()
    folder, facts = written(tmp_path, model, quantization=kind, calibration=batches(model))
    assert {path.name for path in folder.iterdir()} == FILES
    assert facts["kind"] == kind
    assert facts["target"] == "openvino"
    assert facts["versions"]["openvino"]
    assert set(facts["files"]) == {"model.safetensors", "openvino_model.xml", "openvino_model.bin"}
    assert facts["bytes"] == sum((folder / f"openvino_model.{end}").stat().st_size for end in ("xml", "bin"))
    assert facts["max_abs_diff"] <= facts["tolerance"] * facts["max_abs_logit"]
    # As anybody runs it, without hfkdq.
    compiled = openvino.Core().compile_model(folder / "openvino_model.xml", "CPU", {"EXECUTION_MODE_HINT": "ACCURACY"})
    batch = {name: value.numpy() for name, value in batches(model)[0].items() if name != "labels"}
    session = OpenVinoSession(folder / "openvino_model.xml")
    assert session.input_names == facts["inputs"]
    assert {one.get_any_name() for one in compiled.inputs} == set(facts["inputs"])
    given = {**batch, "token_type_ids": np.zeros_like(batch["input_ids"])}
    np.testing.assert_array_equal(compiled(given)["logits"], session(batch)["logits"])


@needs_openvino
@needs_vnni
@pytest.mark.parametrize("spec", [QuantizationSpec(), QuantizationSpec(weight_bits=4)], ids=["int8", "w4a8"])
def test_trained_integers_are_those_of_the_onnx_file(spec, tmp_path):
    model = quantize(tiny.bert(hidden=64), spec, batches(tiny.bert(hidden=64)))
    folder, facts = written(tmp_path, model, quantization=spec)
    standard = export_onnx(model, tmp_path / "standard", quantization=spec, target="standard", latency_rounds=0)
    stored = onnx.load(standard / "model.onnx").graph.initializer
    codes = [
        numpy_helper.to_array(one) for one in stored if one.data_type == onnx.TensorProto.INT8 and len(one.dims) > 1
    ]
    core = openvino_runtime.load_openvino().Core()
    found = [
        one.data
        for one in core.read_model(folder / "openvino_model.xml").get_ops()
        if one.get_type_name() == "Constant" and one.get_element_type().get_type_name() == "i8" and one.data.ndim > 1
    ]
    assert len(codes) >= facts["quantized_linears"] > 0
    assert sorted(one.tobytes() for one in found) == sorted(one.tobytes() for one in codes)
    assert "weight_type" not in facts  # which is about ONNX Runtime
    assert "fused_linears" not in facts
    # Codes at a tie may differ, and what follows from them: the bound that the export itself has.
    batch = {name: value for name, value in batches(model)[1].items() if name != "labels"}
    with torch.no_grad():
        expected = model(**batch).logits.numpy()
    logits = OpenVinoSession(folder / "openvino_model.xml")({name: value.numpy() for name, value in batch.items()})[
        "logits"
    ]
    assert np.abs(logits - expected).max() <= INTEGER_TOLERANCE * np.abs(expected).max()


@needs_openvino
def test_outputs_have_the_names_of_the_model_alone(tmp_path):
    folder, facts = written(tmp_path, tiny.bert_mlm())  # whose logits are those of two fused nodes
    model = openvino_runtime.load_openvino().Core().read_model(folder / "openvino_model.xml")
    assert [one.get_names() for one in model.outputs] == [{"logits"}]
    assert OpenVinoSession(folder / "openvino_model.xml").output_names == facts["outputs"] == ["logits"]


@needs_openvino
def test_a_decoder_without_its_cache_is_one_file(tmp_path):
    folder, facts = written(tmp_path, tiny.llama(), task="text-generation")
    assert facts["outputs"] == ["logits"]
    assert {path.name for path in folder.iterdir()} == FILES | {"generation_config.json"}


@needs_openvino
def test_the_proof_runs_in_openvino(tmp_path, monkeypatch):
    compute = OpenVinoSession._run
    monkeypatch.setattr(OpenVinoSession, "_run", lambda self, feed: [1.5 * one for one in compute(self, feed)])
    with pytest.raises(RuntimeError, match="float32 OpenVINO file differs from the torch model"):
        written(tmp_path, tiny.bert())
    assert not list(tmp_path.iterdir())


@needs_openvino
def test_an_axis_of_one_size_is_fixed_in_the_file(tmp_path):
    folder, facts = written(tmp_path, tiny.vit())
    # Transformers' own exporter fixes them itself.
    assert ("fixed_axes" in facts) != transformers.__version__.startswith("5")
    assert OpenVinoSession(folder / "openvino_model.xml").input_shapes["pixel_values"] == ["?", 1, 8, 8]


@pytest.mark.one_line
@needs_openvino
@needs_vnni
def test_it_is_timed_beside_its_float_file_in_openvino(tmp_path):
    """In a process of its own, as a program that exports is."""
    code = f"""
import json
from pathlib import Path
from tests.export.test_openvino import batches, job, tiny, written

seen, write = [], job.ExportJob.write_files

def watched(self, precision, folder, *rest):
    found = write(self, precision, folder, *rest)
    seen.append([precision.name, (folder / "openvino_model.xml").is_file()])
    return found

job.ExportJob.write_files = watched
model = tiny.bert()
_, facts = written(
    Path({str(tmp_path)!r}), model, quantization="int8", calibration=batches(model), latency_rounds=1, threads=1
)
print(json.dumps([seen, facts["latency"]]))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    seen, latency = json.loads(ran.stdout.splitlines()[-1])
    assert seen == [["int8", True], ["float32", True]]
    assert latency["onnx"]["median_ms"] > 0
    assert latency["float32"]["median_ms"] > 0


@needs_openvino
def test_importing_it_tells_nobody():
    program = (
        "import sys; from hfkdq.export.openvino_runtime import load_openvino; "
        "print(load_openvino().__version__, [n for n in sys.modules if n.startswith('openvino_telemetry')])"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert told.strip().endswith(" []")


@pytest.mark.parametrize(
    ("model", "settings", "told"),
    [
        (tiny.bert, {"weight_type": "uint8"}, r"OpenVINO multiplies int8 weights\. Leave it out"),
        (tiny.bert, {"layout": "hub"}, r"layout='hub' has ONNX files"),
        (tiny.t5, {}, r"without a cache, and T5ForConditionalGeneration generates"),
    ],
    ids=["uint8", "hub", "generation"],
)
def test_what_is_refused_before_work_begins(model, settings, told, tmp_path, monkeypatch):
    monkeypatch.setattr(openvino_runtime, "find_spec", lambda _: True)
    monkeypatch.setattr(job.ExportJob, "write", lambda *_: pytest.fail("it began"))
    with pytest.raises(ValueError, match=told):
        written(tmp_path, model(), **settings)
    assert not list(tmp_path.iterdir())


def test_without_openvino_one_sentence_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(openvino_runtime, "find_spec", lambda _: None)
    monkeypatch.setattr("hfkdq.export.api.load_backend", lambda: pytest.fail("it began"))
    with pytest.raises(RuntimeError, match=r'needs OpenVINO\. Install it: pip install "hfkdq\[openvino\]"$'):
        written(tmp_path, tiny.bert())
    assert not list(tmp_path.iterdir())


@needs_openvino
def test_a_file_that_is_none_is_told_in_a_sentence(tmp_path):
    (tmp_path / "openvino_model.xml").write_text("<net/>")
    with pytest.raises(
        RuntimeError,
        match=r"^OpenVINO cannot run openvino_model.xml: .*\. If it was exported just now, .*download it again\.$",
    ):
        OpenVinoSession(tmp_path / "openvino_model.xml")
    (tmp_path / "a.onnx").write_bytes(b"no graph")
    with pytest.raises(RuntimeError, match=r"^OpenVINO cannot read this model \(.*\)\. Nothing was written"):
        openvino_runtime.convert(tmp_path / "a.onnx")
    assert {path.name for path in tmp_path.iterdir()} == {"openvino_model.xml", "a.onnx"}
    with pytest.raises(ValueError, match=r"no OpenVINO file .*openvino_model\.xml in its folder"):
        OpenVinoSession(tmp_path / "none.xml")
