# SPDX-License-Identifier: Apache-2.0
"""`hfkdq report`, `inspect`, `bench` and `push` end to end: what they write, print and refuse."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import shutil
import wave

import datasets
import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
import transformers as tf
from datasets import Audio, ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as Picture

from hfkdq import QuantizationSpec, export_onnx, quantize
from hfkdq.cli import main
from hfkdq.cli.candidates import find_place, split_names
from hfkdq.measuring import latency
from hfkdq.report import Candidate, CompressionReport
from hfkdq.report.layers import describe_stored
from hfkdq.report.mistakes import _readable, _shown

from . import tiny
from .hub_server import loopback_hub  # noqa: F401

NAMES = ["red", "green", "blue"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(latency, "TURN_SECONDS", 0.01)


def classifier(seed=0, layers=1):
    model = tiny.bert(
        seed, layers=layers, id2label=dict(enumerate(NAMES)), label2id={n: i for i, n in enumerate(NAMES)}
    )
    batch = tiny.tokenizer()(sentences(), padding=True, return_tensors="pt")
    with torch.no_grad():
        model.classifier.bias -= model(**batch).logits.mean(0)
    return model


def sentences(rows=40):
    rng = np.random.default_rng(0)
    return [" ".join(f"w{i}" for i in rng.integers(90, size=rng.integers(3, 12))) for _ in range(rows)]


def saved(model, folder, processor=None):
    model.save_pretrained(folder)
    (processor or tiny.tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture
def teacher(tmp_path):
    """A teacher that is right on all rows of `data`, of which it made the labels."""
    return saved(classifier(0), tmp_path / "big")


@pytest.fixture
def data(tmp_path):
    model, texts = classifier(0), sentences()
    with torch.no_grad():
        told = [int(model(**tiny.tokenizer()(text, return_tensors="pt")).logits.argmax()) for text in texts]
    rows = Dataset.from_dict({"text": texts, "label": [NAMES[number] for number in told]})
    rows.to_parquet(tmp_path / "rows.parquet")
    return tmp_path / "rows.parquet"


@pytest.fixture
def small(tmp_path):
    return saved(classifier(1), tmp_path / "small")


@pytest.fixture
def exported(tmp_path):
    model = quantize(classifier(1), QuantizationSpec(), [tiny.batch(classifier(1))])
    return export_onnx(
        model, tmp_path / "small-onnx", quantization=QuantizationSpec(), processing_class=tiny.tokenizer(), latency_rounds=0
    )  # fmt: skip


def report(out, data, *candidates, options=("--latency-rounds", "0")):
    status = main(["report", *map(str, candidates), "--eval-data", str(data), "--output-dir", str(out), *options])
    return CompressionReport.load(out / "report.json") if status == 0 else status


@pytest.mark.one_line
def test_candidates_of_all_kinds_are_measured_against_the_teacher(teacher, small, exported, data, tmp_path, capsys):
    state = {"log_history": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]}
    (small / "trainer_state.json").write_text(json.dumps(state))
    bare = tmp_path / "elsewhere"
    bare.mkdir()
    shutil.copy(exported / "model.onnx", bare / "other.onnx")
    options = ("--teacher", str(teacher), "--latency-rounds", "2", "--threads", "1")
    found = report(tmp_path / "out", data, small, exported, f"file={bare / 'other.onnx'}", options=options)
    assert [engine.name for engine in found.engines] == ["teacher", "small", "small-onnx", "file"]
    assert [engine.kind for engine in found.engines] == ["torch", "torch", "onnx", "onnx"]
    first, plain, folder, file = found.engines
    assert first.metrics["accuracy"] == 1.0
    assert plain.metrics["accuracy"] < 1.0
    assert folder.metrics == file.metrics  # it is a copy
    assert folder.parity is not None
    assert file.parity is None
    assert file.size == folder.size == (exported / "model.onnx").stat().st_size
    assert file.files["other.onnx"]["sha256"] == folder.files["model.onnx"]["sha256"]
    for engine in found.engines[1:]:
        low, high = engine.changes["accuracy"]
        assert low <= engine.metrics["accuracy"] - 1.0 <= high < 0
        assert engine.intervals.keys() == {"accuracy", "f1"}
        assert len(engine.latency.rounds) == 2
    assert found.curves == {"loss": [[1.0, 2.0], [2.0, 1.0]]}
    assert found.dataset.name == "rows.parquet"
    assert {layer.bits for layer in plain.layers} == {32}
    for engine in (folder, file):  # by the names of the model, in bits as they are on disk
        layers = {layer.name: layer for layer in engine.layers}
        assert layers["bert.encoder.layer.0.output.dense.weight"].bits == 8
        assert layers["bert.encoder.layer.0.output.dense.weight"].parameters == 64 * 32
        assert sum(layer.parameters for layer in engine.layers) == sum(layer.parameters for layer in plain.layers)
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {"report.json", "report.html", "report.md", "report.png"}
    assert capsys.readouterr().out.splitlines()[-1] == str(out / "report.html")
    # What is shown are rows that the teacher has right and the file wrong, as they are in the data.
    texts, labels = (Dataset.from_parquet(str(data))[name] for name in ("text", "label"))
    assert found.mistakes
    for mistake in found.mistakes:
        assert mistake.texts == {"text": texts[mistake.row]}
        assert mistake.label == mistake.said["teacher"] == labels[mistake.row]
        assert mistake.said["file"] in set(NAMES) - {mistake.label}
        assert texts[mistake.row] in (out / "report.html").read_text()
    wrong = round(40 * (1 - file.metrics["accuracy"]))
    assert len(found.mistakes) == min(12, wrong)


def test_without_a_teacher_the_first_is_the_reference(small, exported, data, tmp_path):
    found = report(tmp_path / "out", data, exported, small, options=("--latency-rounds", "0", "--examples", "0", "--resamples", "0"))  # fmt: skip
    assert [engine.name for engine in found.engines] == ["small-onnx", "small"]
    assert found.mistakes == ()
    assert set(found.engines[0].intervals) == {"accuracy"}  # by Wilson, which needs no draws
    assert found.engines[1].changes == {}
    assert {layer.bits for layer in found.engines[1].layers} == {32}


def test_a_trained_checkpoint_is_measured_with_its_bits(tmp_path, data):
    model = quantize(classifier(1), QuantizationSpec(), [tiny.batch(classifier(1))])
    found = report(tmp_path / "out", data, saved(model, tmp_path / "trained"))
    bits = {layer.name: layer.bits for layer in found.engines[0].layers}
    assert bits["bert.encoder.layer.0.output.dense.weight"] == 8


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (["nowhere/at/all"], "There is no file or folder nowhere/at/all."),
        (["{data}"], "neither an ONNX file nor a folder"),
        (["{empty}"], "no config.json"),
        (["{small}", "{small}"], "Two candidates are called"),
        (["{small}", "--batch-size", "0"], "--batch-size must be 1 or more, got 0."),
        (["{small}", "--latency-rounds", "-1"], "--latency-rounds must be 0 or more, got -1."),
        (["{small}", "--resamples", "-1"], "--resamples must be 0 or more, got -1."),
        (["{small}", "--output-dir", "{small}"], "exists"),
        (["{small}", "--eval-data", "{small}/none.csv"], "There is no file or folder"),
        (["{damaged}"], "damaged"),
        (["{broken}", "--teacher", "{small}"], "ONNX Runtime cannot run model.onnx"),
        (["{broken}"], "has no checkpoint beside its ONNX file"),
        (["{two}"], "Name the one to measure"),
        (["{changed}"], "does not hold what was exported"),
        (["name="], "There is no name of a checkpoint"),
        ([""], "There is no name of a checkpoint"),
    ],
)
def test_what_cannot_be_measured_is_one_line_and_leaves_nothing(what, words, small, data, tmp_path, capsys, request):
    places = {name: tmp_path / name for name in ("empty", "damaged", "broken", "two", "changed")}
    for place in places.values():
        place.mkdir()
    (places["damaged"] / "config.json").write_text("{")
    (places["broken"] / "model.onnx").write_bytes(b"no ONNX")
    for name in "ab":
        (places["two"] / f"{name}.onnx").write_bytes(b"x")
    if "{changed}" in what:
        shutil.copytree(request.getfixturevalue("exported"), places["changed"], dirs_exist_ok=True)
        with (places["changed"] / "model.onnx").open("ab") as file:
            file.write(b"more")
    known = {**places, "small": small, "data": data}
    given = [part.format(**known) for part in what]
    given += [] if "--eval-data" in given else ["--eval-data", str(data)]
    given += [] if "--output-dir" in given else ["--output-dir", str(tmp_path / "out")]
    assert main(["report", *given]) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("hfkdq report: ")
    assert words in told
    assert not (tmp_path / "out").exists()


@pytest.fixture
def others(small, exported, tmp_path):
    """A repository as others have them: a configuration, a tokenizer, and two files below `onnx/`."""
    folder = tmp_path / "others"
    (folder / "onnx").mkdir(parents=True)
    for file in small.glob("*.json"):
        shutil.copy(file, folder)
    for name in ("model.onnx", "model_quantized.onnx"):
        shutil.copy(exported / "model.onnx", folder / "onnx" / name)
    return folder


def test_a_file_in_the_layout_of_the_hub_has_its_configuration_above_it(others, teacher, data, tmp_path, capsys):
    file = others / "onnx" / "model_quantized.onnx"
    for command in ("report", "bench", "inspect"):
        given = ["--eval-data", str(data), "--output-dir", str(tmp_path / "out")] if command == "report" else []
        if command != "inspect":  # which is about the folder that the file belongs to
            assert main([command, str(others), *given]) == 1
            told = capsys.readouterr().err.splitlines()[-1]
            assert "onnx/model.onnx, onnx/model_quantized.onnx. Name the one to measure, such as" in told
            assert told.endswith(f"{others / 'onnx' / 'model.onnx'}.")
        if command == "inspect":
            assert main([command, str(file)]) == main([command, str(others)]) == 0
        if command == "bench":
            assert main([command, str(file), "--rounds", "1", "--length", "8"]) == 0
    assert "model_quantized" in capsys.readouterr().out
    found = report(tmp_path / "out", data, others / "onnx" / "model.onnx", file, options=("--teacher", str(teacher), "--latency-rounds", "0"))  # fmt: skip
    assert [engine.name for engine in found.engines] == ["teacher", "others", "model_quantized"]
    file.unlink()
    assert find_place("x", str(others)).path == others / "onnx" / "model.onnx"  # the only one
    assert find_place("x", str(others)).folder == others


def constant(file, logits):
    """A file that gives every text the same logits."""
    inputs = [onnx.helper.make_tensor_value_info("input_ids", onnx.TensorProto.INT64, ["b", "s"])]
    outputs = [onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["b", len(logits)])]
    value = onnx.helper.make_tensor("v", onnx.TensorProto.FLOAT, [1, len(logits)], logits)
    nodes = [
        onnx.helper.make_node("Cast", ["input_ids"], ["float"], to=onnx.TensorProto.FLOAT),
        onnx.helper.make_node("ReduceMax", ["float"], ["one"], axes=[1], keepdims=1),
        onnx.helper.make_node("Constant", [], ["value"], value=value),
        onnx.helper.make_node("Mul", ["one", "value"], ["logits"]),
    ]
    graph = onnx.helper.make_graph(nodes, "g", inputs, outputs)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), file)
    return file


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda folder: constant(folder / "file.onnx", [0, 1, 2, 3, 4]),
            "file: {}/file.onnx has logits of 5 classes, and",
        ),
        (
            lambda folder: constant(folder / "file.onnx", [float("nan")] * 3),
            "file computes outputs that are no numbers (NaN)",
        ),
        (
            lambda folder: saved(tiny.llama(), folder / "file"),
            "is for text-classification, and file for text-generation",
        ),
    ],
)
def test_what_would_look_like_a_measurement_is_refused(make, words, small, data, tmp_path, capsys):
    assert report(tmp_path / "out", data, small, make(tmp_path)) == 1
    assert words.format(tmp_path) in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_files_that_do_not_load_are_named_before_anything_is_measured(small, tmp_path, monkeypatch):
    file = tmp_path / "broken.onnx"
    file.write_bytes(b"no ONNX")
    model = tf.AutoModelForSequenceClassification.from_pretrained(small)
    monkeypatch.setattr(tf.Trainer, "predict", lambda *_, **__: pytest.fail("measured"))
    rows = [
        Candidate(
            name=name, model=model, path=path, eval_dataset=tiny.text_dataset(4), processing_class=tiny.tokenizer()
        )
        for name, path in (("first", None), ("file", file))
    ]
    with pytest.raises(RuntimeError, match=r"file: ONNX Runtime cannot run broken\.onnx"):
        CompressionReport.compare(rows, latency_rounds=0)


def test_a_pooling_that_the_model_cannot_have_is_refused(small, tmp_path, capsys, data):
    folder = export_onnx(
        tf.AutoModelForSequenceClassification.from_pretrained(small), tmp_path / "out", latency_rounds=0,
        processing_class=tiny.tokenizer(),
    )  # fmt: skip
    facts = json.loads((folder / "export_facts.json").read_text()) | {
        "pooling": {"modes": ["mean"], "normalize": True}
    }
    (folder / "export_facts.json").write_text(json.dumps(facts))
    assert report(tmp_path / "report", data, small, folder) == 1
    assert (
        "BertForSequenceClassification has no states that make an embedding"
        in capsys.readouterr().err.splitlines()[-1]
    )


def test_a_candidate_that_cannot_read_the_rows_is_named(teacher, data, tmp_path, capsys):
    other = saved(tiny.bert(labels=2), tmp_path / "two")
    assert report(tmp_path / "out", data, other, options=("--teacher", str(teacher), "--latency-rounds", "0")) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("hfkdq report: two: 40 rows of")


def test_blocks_of_texts_are_shown_as_they_are_read(data, tmp_path):
    """A language model reads all texts one after the other, so its rows are not those of the data."""
    places = [saved(tiny.llama(seed, layers=1), tmp_path / f"llama{seed}") for seed in (1, 0)]
    found = report(tmp_path / "out", data, *places, options=("--latency-rounds", "0", "--max-length", "16"))
    assert found.samples != 40
    assert found.mistakes
    assert all(set(mistake.texts["input_ids"].split()) <= set(tiny.WORDS) for mistake in found.mistakes)


def test_names_are_the_last_part_or_those_that_are_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a/onnx", "b/onnx", "c=d"):
        (tmp_path / name).mkdir(parents=True)
    assert split_names(["a/onnx"]) == [("onnx", "a/onnx")]
    assert split_names(["a/onnx", "b/onnx"]) == [("a/onnx", "a/onnx"), ("b/onnx", "b/onnx")]
    assert split_names(["one=a/onnx", "b/onnx"]) == [("one", "a/onnx"), ("onnx", "b/onnx")]
    assert split_names(["c=d"]) == [("c=d", "c=d")]
    assert split_names(["me/model"]) == [("model", "me/model")]
    with pytest.raises(ValueError, match="Two candidates are called 'x'"):
        split_names(["x=a/onnx", "x=b/onnx"])


def test_a_model_of_the_hub_is_downloaded_without_pickles(small, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: asked.append((a, k)) or str(small))
    place = find_place("model", "me/model")
    assert place.folder == small
    assert place.path is None
    assert asked[0][0] == ("me/model",)
    assert not any("bin" in pattern or pattern in ("*", "*.py") for pattern in asked[0][1]["allow_patterns"])
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: 1 / 0)
    with pytest.raises(OSError, match="me/model is no file or folder here, and could not be read from the Hub"):
        find_place("model", "me/model")


def test_a_tokenizer_of_openvino_is_no_model(tmp_path):
    for name in ("config.json", "openvino_model.xml", "openvino_tokenizer.xml", "openvino_detokenizer.xml"):
        (tmp_path / name).touch()
    assert find_place("model", str(tmp_path)).path == tmp_path / "openvino_model.xml"
    (tmp_path / "openvino_other.xml").touch()
    with pytest.raises(ValueError, match="Name the one to measure"):
        find_place("model", str(tmp_path))


def test_candidates_need_names(small):
    model = classifier(1)
    for names, words in ((["a", "a"], "Two candidates"), (["a\nb"], "can be printed"), ([], "no candidate")):
        rows = [Candidate(name=name, model=model, eval_dataset=tiny.text_dataset(8)) for name in names]
        with pytest.raises(ValueError, match=words):
            CompressionReport.compare(rows, latency_rounds=0)


def test_a_function_of_the_users_own_is_called_once_for_each_row(small):
    calls = []

    def own(prediction):
        calls.append(len(prediction.label_ids))
        return {"right": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    data, tokenizer = tiny.text_dataset(8), tiny.tokenizer()
    rows = [
        Candidate(name=n, model=tiny.bert(i), eval_dataset=data, processing_class=tokenizer)
        for i, n in enumerate("ab")
    ]
    settings = dict(compute_metrics=own, latency_rounds=0)
    assert CompressionReport.compare(rows, **settings).engines[0].intervals == {}
    assert calls == [8, 8]
    found = CompressionReport.compare(rows, **settings, resamples=5)
    assert len(found.engines[1].intervals["right"]) == 2
    assert len(calls) == 2 + 2 + 10


def test_boxes_are_drawn_into_the_images_that_lost_them(tmp_path):
    """Two detectors, of which the second finds nothing."""
    rows = Dataset.from_dict(
        {
            "image": [Picture.fromarray(np.full((16, 16, 3), 90, np.uint8))] * 3,
            "objects": [{"bbox": [[2.0, 2.0, 8.0, 8.0]], "category": [1]}] * 3,
        },
        features=Features({"image": Image(), "objects": {"bbox": List(List(Value("float32"))), "category": List(ClassLabel(names=["a", "b", "c"]))}}),
    )  # fmt: skip
    rows.to_parquet(tmp_path / "boxes.parquet")
    processor = tf.YolosImageProcessor(size={"height": 16, "width": 16}, do_pad=False)
    places = []
    for name, box in (("good", [6 / 16, 6 / 16, 8 / 16, 8 / 16]), ("bad", [0.1, 0.1, 0.1, 0.1])):
        model = tiny.yolos()
        model.config.id2label, model.config.label2id = {0: "a", 1: "b", 2: "c"}, {"a": 0, "b": 1, "c": 2}
        with torch.no_grad():  # every query says the same, whatever it sees
            for head, values in (
                (model.class_labels_classifier, [0.0, 9.0, 0.0, 0.0]),
                (model.bbox_predictor, torch.tensor(box).logit()),
            ):
                head.layers[-1].weight.zero_()
                head.layers[-1].bias.copy_(torch.as_tensor(values))
        places.append(saved(model, tmp_path / name, processor))
    options = ("--latency-rounds", "0", "--resamples", "20")
    found = report(tmp_path / "out", tmp_path / "boxes.parquet", *places, options=options)
    assert found.engines[0].metrics["map"] > 0.5  # all queries say it, and one can be right
    assert found.engines[1].metrics["map"] == 0.0
    assert [mistake.row for mistake in found.mistakes] == [0, 1, 2]
    assert found.mistakes[0].label == "b"
    assert set(found.mistakes[0].said["good"].split(", ")) == {"b"}
    drawn = Picture.open(io.BytesIO(base64.b64decode(found.mistakes[0].media["image"].partition(",")[2])))
    colors = {color for _, color in drawn.getcolors(100_000)}
    assert {(47, 111, 181), (224, 121, 58), (90, 90, 90)} <= colors  # of the first, of the last, of the picture


def test_sounds_can_be_heard(tmp_path):
    file = io.BytesIO()
    with wave.open(file, "wb") as written:
        written.setnchannels(2)
        written.setsampwidth(2)
        written.setframerate(8000)
        written.writeframes(np.zeros(8000 * 2 * 11, "<i2").tobytes())
    rows = Dataset.from_dict({"audio": [{"bytes": file.getvalue(), "path": None}]}).cast_column("audio", Audio())
    texts, media = _shown(_readable(rows)[0], None)
    assert texts == {}
    with wave.open(io.BytesIO(base64.b64decode(media["audio"].partition(",")[2]))) as heard:
        assert (heard.getnchannels(), heard.getframerate(), heard.getnframes()) == (1, 8000, 80_000)  # ten seconds


@pytest.mark.parametrize(
    ("precision", "bits"), [("int4_weights", 4), ("int8_weights", 8), ("float16", 16), ("dynamic", 8)]
)
def test_bits_of_a_file_are_those_on_disk(precision, bits, tmp_path):
    model = tiny.bert(layers=1, hidden=64)
    folder = export_onnx(model, tmp_path / "onnx", quantization=precision, latency_rounds=0)
    layers = {layer.name: layer for layer in describe_stored([folder / "model.onnx"], model)}
    whole = sum(weight.numel() for weight in model.parameters() if weight.dim() > 1)
    assert sum(layer.parameters for layer in layers.values()) == whole
    large = [layer for layer in layers.values() if layer.parameters == 128 * 64]  # the feed-forward layers
    assert [layer.bits for layer in large] == [bits, bits]
    assert all(layer.sparsity is None or layer.sparsity < 0.1 for layer in layers.values())


# ------------------------------------------------------------------ inspect, bench, push


def test_inspect_says_what_a_checkpoint_is(exported, capsys):
    assert main(["inspect", str(exported), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    model = classifier(1)
    assert found["architecture"] == "BertForSequenceClassification"
    assert found["task"] == "text-classification"
    assert found["sizes"]["hidden_size"] == 32
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    weights = {row["name"]: row for row in found["weights"]}
    assert weights["classifier.weight"]["shape"] == [3, 32]
    assert found["facts"]["quantization"]["spec"]["weight_bits"] == 8
    assert found["files"]["model.onnx"]["sha256"] == hashlib.sha256((exported / "model.onnx").read_bytes()).hexdigest()
    assert found["export"]["unchanged"] is True
    assert main(["inspect", str(exported)]) == 0
    told = capsys.readouterr().out
    for words in (
        "BertForSequenceClassification",
        "8-bit weights",
        "classifier.weight",
        "are those that were exported",
    ):
        assert words in " ".join(told.split())
    with (exported / "model.onnx").open("ab") as file:
        file.write(b"more")
    assert main(["inspect", str(exported)]) == 0
    assert "model.onnx has changed" in " ".join(capsys.readouterr().out.split())


def test_inspect_refuses_what_is_none(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["inspect", str(tmp_path / "empty")]) == 1
    assert "no config.json" in capsys.readouterr().err
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "bert", "hfkdq": [1]}')
    assert main(["inspect", str(tmp_path / "empty")]) == 1
    assert "damaged" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.one_line
def test_bench_times_files_and_checkpoints_at_every_size(small, exported, capsys):
    given = ["bench", str(exported), f"file={exported / 'model.onnx'}"]
    assert main([*given, "--batch-size", "1", "2", "--length", "8", "--rounds", "2", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["name"], row["batch_size"], row["length"], row["threads"]) for row in rows] == [
        ("small-onnx", 1, 8, 1), ("file", 1, 8, 1), ("small-onnx", 2, 8, 1), ("file", 2, 8, 1),
    ]  # fmt: skip
    for row in rows:
        shares = [row["latency"]["min_ms"], *(row["percentiles"][name] for name in ("p50", "p90", "p99"))]
        assert shares == sorted(shares)
        assert row["percentiles"]["p50"] == pytest.approx(row["latency"]["median_ms"])
        assert row["throughput"] == pytest.approx(1000 * row["batch_size"] / row["latency"]["median_ms"])
        assert len(row["latency"]["rounds"]) == 2
    assert rows[0]["speedup"] == rows[2]["speedup"] == 1.0
    assert main(["bench", f"torch={small}", "--length", "8", "--rounds", "1"]) == 0
    told = capsys.readouterr().out
    assert "Examples/s" in told
    assert "1.00x" in told
    assert main(["bench", f"torch={small}", "--rounds", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["length"] == 64  # it takes no more


@pytest.mark.one_line
def test_bench_tells_what_cannot_be_timed_in_one_line(small, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    shutil.copy(small / "config.json", tmp_path / "empty")
    assert main(["bench", str(tmp_path / "empty"), "--length", "8"]) == 1
    assert (
        capsys.readouterr().err.splitlines()[-1].startswith(f"hfkdq bench: empty: {tmp_path / 'empty'} has no weights")
    )
    file = constant(tmp_path / "file.onnx", [0, 1, 2])
    assert (
        main(["bench", str(small), str(file), "--length", "8", "--rounds", "1"]) == 0
    )  # with the inputs of the first
    weights = dict(safetensors.torch.load_file(small / "model.safetensors"))
    weights["classifier.weight"] = torch.zeros(7, 7)
    safetensors.torch.save_file(weights, tmp_path / "empty" / "model.safetensors", {"format": "pt"})
    capsys.readouterr()
    assert main(["bench", str(tmp_path / "empty"), "--length", "8"]) == 1
    told = [line for line in capsys.readouterr().err.splitlines() if line]
    assert told[-1].startswith("hfkdq bench: The process that times 'empty' ended with code 1: ")
    assert not any(line.startswith("Traceback") for line in told)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--threads", "0"), "--threads must be 1 or more, got 0."),
        (("--length", "8", "1"), "--length must be 2 or more, got 1."),
        (("--length", "100"), "takes 64 tokens at most, got --length 100."),
        (("--batch-size", "-1"), "--batch-size must be 1 or more, got -1."),
    ],
)
def test_bench_refuses_sizes_that_are_none(small, options, words, capsys):
    assert main(["bench", str(small), *options]) == 1
    assert words in capsys.readouterr().err


def test_push_is_one_commit_with_the_card_of_the_report(hub_server, exported, data, teacher, tmp_path, capsys):
    found = report(tmp_path / "out", data, teacher, exported)
    assert found.mistakes
    capsys.readouterr()
    given = ["push", str(exported), "me/tiny", "--report", str(tmp_path / "out" / "report.json")]
    assert main([*given, "--private"]) == 0
    assert capsys.readouterr().out.startswith("http")
    files = hub_server.repositories["me/tiny"].files()
    assert {"model.onnx", "README.md", "compression_report.json", "report.png", "tokenizer.json"} <= set(files)
    pushed = CompressionReport.from_json(files["compression_report.json"].decode())
    assert pushed.mistakes == ()  # rows of the data stay here
    assert pushed.engines == found.engines
    assert hub_server.commits == 1


def test_push_refuses_before_anything_is_sent(hub_server, exported, tmp_path, capsys):
    for given, words in (
        ([str(tmp_path / "none"), "me/tiny"], "There is no folder"),
        ([str(exported), "me/tiny", "--report", str(tmp_path / "none.json")], "There is no file"),
        ([str(exported), "a b"], "Repo id"),
    ):
        assert main(["push", *given]) == 1
        assert words in capsys.readouterr().err
    assert hub_server.requests == []
