# SPDX-License-Identifier: Apache-2.0
"""Folders as the Hub has them: what is in them, and the tools that load them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import transformers
from transformers import AutoModel

from hfkdq import CompressionReport, QuantizationSpec, export_onnx, load_quantized, push_to_hub, quantize
from hfkdq.cli.candidates import each_file, find_place
from hfkdq.export import OnnxSession
from hfkdq.export.embeddings import Pooling
from hfkdq.export.graph import saving, stored_bytes
from hfkdq.export.layout import file_suffixes
from hfkdq.export.precisions import PRECISIONS, precision_of
from hfkdq.export.record import read_export
from hfkdq.modeling.checkpoints import plain_weights
from hfkdq.provenance import describe_files
from hfkdq.report import Candidate
from hfkdq.report.files import check_export
from tests import tiny
from tests.hub_server import loopback_hub  # noqa: F401

ON_V5 = int(transformers.__version__.split(".")[0]) >= 5
SEVERAL = ["int8", "float32", "float16", "int4_weights", "dynamic"]
FILES = {
    "int8": "model_quantized.onnx", "float32": "model.onnx", "float16": "model_fp16.onnx", "int4_weights": "model_q4.onnx",
    "dynamic": "model_int8.onnx",
}  # fmt: skip
TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w2"]
MODULES = os.environ.get("HFKDQ_NODE_MODULES", "")


def encoder():
    return tiny.bert().bert.eval()


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """Five precisions of an encoder of texts with its embedding."""
    model = encoder()
    return export_onnx(
        model, tmp_path_factory.mktemp("several") / "out", quantization=SEVERAL, layout="hub", pooling="mean", normalize=True,
        processing_class=tiny.tokenizer(), calibration=[tiny.batch(model)], latency_rounds=0,
    )  # fmt: skip


def inputs():
    return {name: np.asarray(value) for name, value in tiny.tokenizer()(TEXTS, padding=True).items()}


def embeddings(file):
    return OnnxSession(file)(inputs())["sentence_embedding"]


def test_the_folder_has_a_file_for_each_precision_and_one_record(several):
    facts = read_export(several)
    named = {f"onnx/{name}" for name in FILES.values()}
    also = f"onnx/model_q{facts['weight_type'].replace('int8', 'int8_avx512_vnni').replace('uint8_avx512_vnni', 'uint8_avx2')}.onnx"
    empty = {f"onnx/{FILES['int8']}.data"} if ON_V5 else set()
    assert facts["files"].keys() == named | empty | {"model.safetensors", also}
    assert facts["files"] == describe_files(several)
    assert not list(several.glob("*.onnx*"))
    assert facts["files"][also] == facts["files"]["onnx/model_quantized.onnx"]
    assert (facts["kind"], facts["layout"], facts["suffix"]) == ("int8", "hub", "_quantized")
    assert list(facts["precisions"]) == SEVERAL
    for kind, own in facts["precisions"].items():
        assert f"model{own['suffix']}.onnx" == FILES[kind]
        assert own["bytes"] == (several / "onnx" / FILES[kind]).stat().st_size
        assert own["max_abs_diff"] <= own["tolerance"] * own["max_abs_logit"]
    assert (several / "export.json").is_file() == ON_V5
    assert not [path for path in several.parent.iterdir() if path != several], "nothing is left beside it"


def test_sentence_transformers_loads_the_folder(several):
    library = pytest.importorskip("sentence_transformers")
    shown = {"show_progress_bar": False}
    if ON_V5:  # Optimum, which its ONNX backend needs, is not there
        # The integers of PyTorch against those of PyTorch, in the order in which texts are encoded, and floats against the
        # file: integers of two kernels differ by one where a number lies between two of them.
        model, texts = library.SentenceTransformer(str(several), device="cpu"), sorted(TEXTS, key=len, reverse=True)
        batch = tiny.tokenizer()(texts, padding=True, return_tensors="pt")
        with torch.no_grad():
            states = load_quantized(several)(**batch).last_hidden_state
        expected = Pooling(("mean",), True, {}, {})(states, batch["attention_mask"])
        np.testing.assert_allclose(model.encode(texts, **shown), expected, rtol=0, atol=1e-6)
        with plain_weights():
            model = library.SentenceTransformer(str(several), device="cpu")
        floats = embeddings(several / "onnx" / FILES["float32"])
        np.testing.assert_allclose(model.encode(TEXTS, **shown), floats, rtol=0, atol=1e-5)
        return
    facts = read_export(several)
    name = next(name for name in facts["files"] if name.startswith("onnx/model_q") and "avx" in name)
    for file, arguments in ((f"onnx/{FILES['float32']}", {}), (name, {"file_name": name})):
        model = library.SentenceTransformer(
            str(several), backend="onnx", device="cpu", model_kwargs={"provider": "CPUExecutionProvider", **arguments}
        )
        np.testing.assert_allclose(model.encode(TEXTS, **shown), embeddings(several / file), rtol=0, atol=1e-5)


@pytest.mark.skipif(
    not (MODULES and shutil.which("node")), reason="HFKDQ_NODE_MODULES names no @huggingface/transformers"
)
def test_transformers_js_loads_the_folder_in_wasm(several):
    dtypes = {"fp32": "float32", "fp16": "float16", "q8": "int8", "int8": "dynamic", "q4": "int4_weights"}
    asked = json.dumps({"Auto": "AutoModel", "texts": TEXTS, "dtypes": list(dtypes)})
    program = str(Path(__file__).with_name("transformers_js.mjs"))
    done = subprocess.run(
        ["node", program, MODULES, str(several), asked], capture_output=True, text=True, check=True, timeout=300
    )
    found = json.loads(done.stdout.splitlines()[-1])
    for dtype, kind in dtypes.items():
        wanted = embeddings(several / "onnx" / FILES[kind])
        # A number between two integers may go either way, with other kernels.
        np.testing.assert_allclose(found[dtype]["sentence_embedding"], wanted, atol=0.02 if "8" in dtype else 1e-3)


@pytest.mark.skipif(ON_V5, reason="Optimum's runtime needs transformers 4")
@pytest.mark.parametrize("kind", [None, *SEVERAL])
def test_optimum_finds_the_files(several, kind):
    from optimum.onnxruntime import ORTModelForFeatureExtraction

    arguments = {} if kind is None else {"file_name": FILES[kind]}
    model = ORTModelForFeatureExtraction.from_pretrained(several, **arguments)
    assert model.path.name == FILES[kind or "float32"]
    batch = {name: torch.as_tensor(value) for name, value in inputs().items()}
    wanted = OnnxSession(several / "onnx" / FILES[kind or "float32"])(inputs())["last_hidden_state"]
    np.testing.assert_allclose(model(**batch).last_hidden_state, wanted, rtol=0, atol=1e-5)


@pytest.mark.skipif(ON_V5, reason="Optimum's runtime needs transformers 4")
def test_optimum_finds_a_single_quantized_file_without_arguments(tmp_path):
    from optimum.onnxruntime import ORTModelForSequenceClassification

    model = tiny.bert().eval()
    folder = export_onnx(
        model, tmp_path / "out", quantization="int8", layout="hub", calibration=[tiny.batch(model)], latency_rounds=0
    )
    assert [path.name for path in (folder / "onnx").iterdir()] == ["model_quantized.onnx"]
    assert ORTModelForSequenceClassification.from_pretrained(folder).path.name == "model_quantized.onnx"


@pytest.mark.skipif(not ON_V5, reason="transformers 5 has the exporters")
def test_the_manifest_names_the_first_file(several):
    from transformers.exporters import ExportedModel

    batch = {name: torch.as_tensor(value) for name, value in inputs().items()}
    batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    found = ExportedModel.from_pretrained(several)(**batch)["sentence_embedding"]
    np.testing.assert_allclose(found, embeddings(several / "onnx" / FILES["int8"]), rtol=0, atol=1e-5)


def test_a_model_that_generates_has_its_parts_below_onnx(tmp_path):
    model = tiny.t5().eval()
    how = {"layout": "hub", "latency_rounds": 0}
    folder = export_onnx(model, tmp_path / "out", quantization=["float32", "float16"], **how)
    parts = ("encoder_model", "decoder_model_merged")
    assert {path.name for path in (folder / "onnx").iterdir()} == {
        f"{part}{end}.onnx" for part in parts for end in ("", "_fp16")
    }
    facts = read_export(folder)
    assert facts["task"] == "text2text-generation-with-past"
    assert facts["incremental_decode"]["max_abs_diff"] < 1e-3
    assert not (folder / "export.json").exists()
    # The weights of the decoder are there once.
    decoder = sum(value.numel() for value in model.decoder.parameters()) * 4
    assert (folder / "onnx" / "decoder_model_merged.onnx").stat().st_size < 2 * decoder
    if ON_V5:
        return
    from optimum.onnxruntime import ORTModelForSeq2SeqLM

    ids = torch.tensor([[5, 6, 7, 1]])
    ours = ORTModelForSeq2SeqLM.from_pretrained(folder).generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(ours, model.generate(input_ids=ids, max_new_tokens=6, do_sample=False))
    # Optimum cannot be told the name of a merged decoder; one alone it finds.
    halves = ORTModelForSeq2SeqLM.from_pretrained(
        export_onnx(model, tmp_path / "alone", quantization="float16", **how)
    )
    assert halves.decoder.path.name == "decoder_model_merged_fp16.onnx"
    assert halves.generate(input_ids=ids, max_new_tokens=6).shape[0] == 1


def test_weights_beside_a_file_follow_it(tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "MAX_BYTES", 0)
    model = encoder()
    folder = export_onnx(model, tmp_path / "out", quantization=["float16", "float32"], layout="hub", latency_rounds=0)
    for suffix in ("", "_fp16"):
        file = folder / "onnx" / f"model{suffix}.onnx"
        places = {
            entry.value
            for tensor in onnx.load(file, load_external_data=False).graph.initializer
            for entry in tensor.external_data
            if entry.key == "location"
        }
        assert places == {f"model{suffix}.onnx.data" if ON_V5 else f"model{suffix}.onnx_data"}
        assert OnnxSession(file)({name: value.numpy() for name, value in tiny.batch(model).items()})
    assert read_export(folder)["files"] == describe_files(folder)


def test_reports_measure_the_first_precision(several, tmp_path):
    model, data = encoder(), tiny.text_dataset(16).remove_columns("labels")
    quantize(model, QuantizationSpec(), [tiny.batch(model)])
    report = CompressionReport.measure(
        teacher=model,
        student=model,
        onnx=several,
        eval_dataset=data,
        processing_class=tiny.tokenizer(),
        latency_rounds=0,
    )
    rows = report.engines[2:]
    assert [row.name for row in rows] == [
        "ONNX float",
        "ONNX float16",
        "ONNX int4 weights",
        "ONNX dynamic int8",
        "ONNX int8",
    ]
    kinds = ["float32", "float16", "int4_weights", "dynamic", "int8"]
    assert [row.size for row in rows] == [(several / "onnx" / FILES[kind]).stat().st_size for kind in kinds]
    assert [row.parity["kind"] for row in rows] == kinds
    assert "spec" not in rows[0].parity or rows[0].parity["spec"] is None
    last = report.engines[-1]
    assert last.size == (several / "onnx" / FILES["int8"]).stat().st_size
    assert last.metrics["spearman"] > 0.99
    report.save(tmp_path / "report.json")
    card = report.to_card("me/tiny", folder=several)
    assert card == CompressionReport.load(tmp_path / "report.json").to_card("me/tiny", folder=several)
    told = CompressionReport.from_export(several)
    assert told.engines[-1].size == last.size
    assert [row.name for row in told.engines[1:]] == [row.name for row in rows]
    places = each_file(find_place("all", str(several)))
    assert [place.name for place in places] == [
        "all, float",
        "all, float16",
        "all, int4 weights",
        "all, dynamic int8",
        "all",
    ]
    assert [place.path.name for place in places[:-1]] == [FILES[kind] for kind in kinds[:-1]]
    assert places[-1].path == several


def test_the_card_loads_the_file_that_it_is_about(tmp_path):
    model = tiny.bert().eval()
    folder = export_onnx(
        model, tmp_path / "out", quantization=["int8", "float32"], layout="hub", calibration=[tiny.batch(model)],
        processing_class=tiny.tokenizer(), latency_rounds=0,
    )  # fmt: skip
    card = CompressionReport.from_export(folder).to_card("me/tiny")
    assert 'from_pretrained("me/tiny", file_name="model_quantized.onnx")' in card


def test_a_file_that_was_changed_is_not_pushed_and_an_earlier_one_goes(hub_server, several, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(several, folder)
    push_to_hub(folder, "me/several")
    there = hub_server.repositories["me/several"].files()
    assert {name for name in there if name.startswith("onnx/")} == {
        name for name in read_export(several)["files"] if name.startswith("onnx/")
    }
    model = encoder()
    fewer = export_onnx(model, tmp_path / "fewer", layout="hub", latency_rounds=0)
    push_to_hub(fewer, "me/several")
    left = {name for name in hub_server.repositories["me/several"].files() if name.startswith("onnx/")}
    assert left == ({"onnx/model.onnx", "onnx/model.onnx.data"} if ON_V5 else {"onnx/model.onnx"})
    (folder / "onnx" / FILES["float16"]).write_bytes(b"another")
    with pytest.raises(ValueError, match=r"onnx/model_fp16.onnx has changed"):
        push_to_hub(folder, "me/several")


def test_a_precision_is_added_to_those_of_a_repository(hub_server, several, tmp_path):
    def exported(name, model=None, kind="float32", **settings):
        how = {"layout": "hub", "latency_rounds": 0, "processing_class": tiny.tokenizer(), **settings}
        return export_onnx(model or tiny.bert(seed=3).eval(), tmp_path / name, quantization=kind, **how)

    first, half = exported("first"), exported("half", kind="float16")
    push_to_hub(first, "me/grows", add=True)  # there is nothing to add to
    push_to_hub(half, "me/grows", add=True)
    repository = hub_server.repositories["me/grows"]
    there = repository.files()
    record = json.loads(there["export_facts.json"])
    assert (record["kind"], list(record["precisions"])) == ("float32", ["float32", "float16"])
    for name, facts in record["files"].items():
        assert hashlib.sha256(there[name]).hexdigest() == facts["sha256"], name
    assert {"onnx/model.onnx", "onnx/model_fp16.onnx", "model.safetensors"} <= record["files"].keys()
    assert record["precisions"]["float16"] == read_export(half)["precisions"]["float16"]
    (tmp_path / "whole").mkdir()
    for name, data in there.items():
        (tmp_path / "whole" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "whole" / name).write_bytes(data)
    check_export(tmp_path / "whole")
    assert [row.name for row in CompressionReport.from_export(tmp_path / "whole").engines[1:]] == [
        "ONNX float16",
        "ONNX float",
    ]
    commits = hub_server.commits
    for folder, told in (
        (exported("other", tiny.bert(seed=4).eval()), "files of another model, by its weights"),
        (several, "files of another model, by its description"),
        (exported("flat", layout="flat"), "is not of export_onnx"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=told):
            push_to_hub(folder, "me/grows", add=True)
    assert hub_server.commits == commits
    push_to_hub(exported("dynamic", kind="dynamic"), "me/grows", add=True)
    batch = [tiny.batch(tiny.bert())]
    with pytest.raises(ValueError, match="the files of dynamic have the names that those of int8 have"):
        push_to_hub(exported("int8", kind="int8", calibration=batch), "me/grows", add=True)


def test_auto_writes_the_file_that_it_chose(tmp_path):
    model, data = tiny.bert().eval(), tiny.text_dataset(32)
    folder = export_onnx(
        model, tmp_path / "out", quantization="auto", layout="hub", eval_dataset=data, processing_class=tiny.tokenizer(),
        max_drop=1.0, latency_rounds=0,
    )  # fmt: skip
    facts = read_export(folder)
    assert (folder / "onnx" / f"model{facts['suffix']}.onnx").is_file()
    assert facts["choice"]["chosen"] in PRECISIONS


@pytest.mark.parametrize(
    ("names", "suffixes"),
    [
        (["dynamic"], ["_quantized"]),
        (["dynamic", "int8"], ["_int8", "_quantized"]),
        (["int8_weights", "dynamic", "int8"], ["_int8_weights", "_int8", "_quantized"]),
        (["float16", "float32"], ["_fp16", ""]),
    ],
)
def test_the_names_do_not_depend_on_the_order(names, suffixes):
    assert file_suffixes([precision_of(name) for name in names]) == suffixes
    assert file_suffixes([precision_of(name) for name in reversed(names)]) == suffixes[::-1]


def test_other_widths_are_called_by_their_precision():
    assert file_suffixes([precision_of(QuantizationSpec(weight_bits=2, activation_bits=8))]) == ["_w2a8"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"layout": "tree"}, "layout='tree' does not exist"),
        ({"layout": None}, "layout=None does not exist"),
        ({"quantization": ["float32", "float16"]}, "layout='hub'"),
        ({"quantization": [], "layout": "hub"}, "names one at the least"),
        ({"quantization": ["float32", "float32"], "layout": "hub"}, "names 'float32' 2 times"),
        ({"quantization": ["int8", QuantizationSpec()], "layout": "hub"}, "names 'int8' 2 times"),
        ({"quantization": ["float32", "auto"], "layout": "hub"}, "no entry of a list"),
        ({"quantization": ["float32", "float8"], "layout": "hub"}, "'float8' does not exist"),
        ({"quantization": ["float32", "int8"], "layout": "hub"}, "pass calibration="),
    ],
)
def test_impossible_requests_are_refused_before_work_starts(tmp_path, arguments, told):
    with pytest.raises(ValueError, match=told):
        export_onnx(tiny.bert(), tmp_path / "out", **arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", ["/../../x", "_a/b", "_", "..", "x", 3, None])
def test_a_record_with_another_end_of_names_is_refused(several, tmp_path, suffix):
    facts = json.loads((several / "export_facts.json").read_text())
    (tmp_path / "export_facts.json").write_text(json.dumps({**facts, "suffix": suffix}))
    with pytest.raises(ValueError, match="suffix"):
        read_export(tmp_path)


@pytest.mark.parametrize("modes", [[], ["average"], ["mean", "x"]])
def test_a_record_with_another_pooling_is_refused(several, tmp_path, modes):
    facts = json.loads((several / "export_facts.json").read_text())
    (tmp_path / "export_facts.json").write_text(json.dumps({**facts, "pooling": {"modes": modes, "normalize": True}}))
    with pytest.raises(
        ValueError, match=r"export_facts.json is not what .*pooling.modes is .*, expected one or several of cls"
    ):
        read_export(tmp_path)


def test_a_size_is_that_of_the_files_whatever_the_record_says(several, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(several, folder)
    facts = json.loads((folder / "export_facts.json").read_text())
    del facts["bytes"]
    (folder / "export_facts.json").write_text(json.dumps(facts))
    data, tokenizer = tiny.text_dataset(8).remove_columns("labels"), tiny.tokenizer()
    model = AutoModel.from_pretrained(folder)
    candidate = Candidate(name="file", model=model, path=folder, eval_dataset=data, processing_class=tokenizer)
    (row,) = CompressionReport.compare([candidate], latency_rounds=0, resamples=0).engines
    assert row.size == (folder / "onnx" / f"model{facts['suffix']}.onnx").stat().st_size


def test_weights_beside_a_file_of_others_are_part_of_its_size(tmp_path):
    weight = onnx.numpy_helper.from_array(np.ones((64, 64), np.float32), "w")
    value = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["b", 64]) for name in ("x", "y")]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])], "g", value[:1], value[1:], [weight]
    )
    file = tmp_path / "model.onnx"
    onnx.save(
        onnx.helper.make_model(graph), file, save_as_external_data=True, location="weights.bin", size_threshold=0
    )
    assert stored_bytes([file]) == file.stat().st_size + (tmp_path / "weights.bin").stat().st_size > 4 * 64 * 64
