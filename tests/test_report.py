# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import functools
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import rich.console
import torch
import transformers
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from torch import nn
from transformers import PreTrainedModel, ViTImageProcessor
from transformers.utils.generic import find_labels

from hfkdq import LogitKD, NoisyKD, PruningSpec, QuantizationSpec, export_onnx, prune, quantize
from hfkdq.cli import card, main
from hfkdq.export.record import EXPORT_FACTS
from hfkdq.export.runtime import OnnxSession, onnx_call
from hfkdq.export.sample import run_sample
from hfkdq.facts import describe_facts, objective_call, record_fact
from hfkdq.measuring import latency
from hfkdq.measuring.latency import TimedEngine, time_engines
from hfkdq.metrics import classification_metrics
from hfkdq.provenance import describe_files, describe_model
from hfkdq.quantization import prepare_qat_
from hfkdq.report import CompressionReport, DatasetInfo, Engine, Latency, Sample
from hfkdq.report.citations import citations
from hfkdq.report.curves import read_settings, settings_of
from hfkdq.report.environment import publishable
from hfkdq.report.markdown import one_line

from . import tiny

GOLDEN = Path(__file__).parent / "golden" / "model_card.md"
SECRET = "hf_" + "A1b2C3d4E5" * 3


def write_onnx(folder: Path, kind: str = "int8", labels: int = 3) -> np.ndarray:
    """A bag of words as an export would write it: logits are the sum of a table's rows that the mask keeps."""
    folder.mkdir(parents=True)
    table = np.random.default_rng(7).normal(size=(len(tiny.VOCABULARY), labels)).astype("float32")
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["column"]),
        helper.make_node("Mul", ["rows", "column"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "sequence"], ["logits"], keepdims=0),
    ]
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"])
        for name in ("input_ids", "attention_mask")
    ]
    constants = {"table": table, "last": np.array([2]), "sequence": np.array([1])}
    graph = helper.make_graph(
        nodes, "bag", inputs, [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", labels])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )  # fmt: skip
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), folder / "model.onnx"
    )
    parity = {
        "kind": kind, "opset": 17, "max_abs_diff": 0.01, "samples": 4, "folder": str(folder), "note": SECRET,
        "metrics": {"onnx": {"accuracy": 0.5}}, "latency": {}, "choice": {}, "batches": [],  # measured again, or told elsewhere
    }  # fmt: skip
    (folder / EXPORT_FACTS).write_text(json.dumps(parity))
    return table


def seal(folder: Path, student) -> None:
    """Writes into the report of a stand-in which files and which model it is about, as an export does."""
    facts = json.loads((folder / EXPORT_FACTS).read_text())
    known = {"files": describe_files(folder), "model": describe_model(student)}
    (folder / EXPORT_FACTS).write_text(json.dumps({**facts, **known}))


def measure(onnx, sealed: bool = True, **kwargs) -> CompressionReport:
    if sealed:
        for folder in onnx.values() if isinstance(onnx, dict) else [onnx]:
            if Path(folder, EXPORT_FACTS).is_file() and isinstance(kwargs.get("student"), PreTrainedModel | None):
                seal(Path(folder), kwargs.get("student") or tiny.bert(seed=1))
    settings = dict(
        student=tiny.bert(seed=1), onnx=onnx, eval_dataset=tiny.text_dataset(30), latency_rounds=0,
        compute_metrics=classification_metrics, processing_class=tiny.tokenizer(), batch_size=8,
    )  # fmt: skip
    return CompressionReport.measure(**{**settings, **kwargs})


@pytest.fixture(autouse=True)
def _one_thread(_alone):
    # Threads that wait for one another on a busy machine make tiny models slow.
    torch.set_num_threads(1)


@pytest.fixture
def folder(tmp_path) -> Path:
    write_onnx(tmp_path / "onnx")
    return tmp_path / "onnx"


@pytest.fixture
def report() -> CompressionReport:
    """A report with every fact in it."""
    parity = dict(max_abs_diff=0.031, mean_abs_diff=0.0042, max_abs_logit=4.21, top1_agreement=0.9961, samples=256)
    engines = (
        Engine(name="teacher", kind="torch", metrics={"accuracy": 0.8799, "f1": 0.8798}, size=90_864_000,
               parameters=22_713_986, sparsity=0.0, latency=Latency(median_ms=7.3, min_ms=7.0, calls=210)),
        Engine(name="student", kind="torch", metrics={"accuracy": 0.8621, "f1": 0.862}, size=69_560_000,
               parameters=17_389_442, sparsity=0.5, latency=Latency(median_ms=3.9, min_ms=3.6, calls=300)),
        Engine(name="ONNX float", kind="onnx", metrics={"accuracy": 0.863, "f1": 0.8629}, size=69_700_000,
               latency=Latency(median_ms=1.6, min_ms=1.5, calls=300),
               parity={**parity, "kind": "float", "max_abs_diff": 1.2e-6, "mean_abs_diff": 2e-7, "top1_agreement": 1.0,
                       "tolerance": 1e-3}),
        Engine(name="ONNX int8", kind="onnx", metrics={"accuracy": 0.8618, "f1": 0.8617}, size=17_600_000,
               latency=Latency(median_ms=0.62, min_ms=0.55, calls=300),
               parity={**parity, "kind": "int8", "tolerance": 0.1, "opset": 17,
                       "quantized_linears": 20, "fused_linears": 19}),
    )  # fmt: skip
    objectives = [{"name": "TaskLoss", "weight": 0.5}, {"name": "LogitKD", "weight": 1.0, "temperature": 2.0}]
    return CompressionReport(
        engines=engines, architecture="BertForSequenceClassification", samples=1066, task="text-classification",
        processor="AutoTokenizer",
        facts={
            "student": {"teacher_layers": 6, "layers": [2, 4, 6]},
            "distillation": {"teacher": "BertForSequenceClassification", "objectives": objectives, "steps": 801},
            "pruning": {
                "spec": {"sparsity": 0.5, "structure": "weight", "criterion": "magnitude"}, "achieved_sparsity": 0.5,
                "parameters_before": 17_389_442, "parameters_after": 17_389_442,
            },
            "quantization": {"spec": {"weight_bits": 8, "activation_bits": 8, "range_estimator": "moving_average",
                                      "exclude_modules": ["classifier"]}},
        },
        timing={"device": "cpu", "threads": 2, "rounds": 3, "inputs": {"input_ids": [1, 32], "attention_mask": [1, 32]}},
        environment={"processor": "Some CPU", "platform": "Linux x86_64", "hfkdq": "0.1.0", "torch": "2.13.0"},
        dataset=DatasetInfo(name="Rotten Tomatoes", id="cornell-movie-review-data/rotten_tomatoes", split="test"),
        base_model="sentence-transformers/all-MiniLM-L6-v2", license="apache-2.0", language="en",
        training={"optimizer steps": 801, "epochs": 3.0, "rows in a step": 32, "learning rate": 5e-05, "schedule": "linear"},
        curves={"loss": [[50.0, 0.81], [800.0, 0.4265]], "logit_kd": [[50.0, 0.9], [800.0, 0.31]]},
        sample=Sample(runner="optimum", printed="[{'label': 'positive', 'score': 0.9231}]"),
    )  # fmt: skip


# ------------------------------------------------------------------ measuring


def test_metric_of_the_file_equals_the_one_computed_by_hand(folder):
    dataset, table = tiny.text_dataset(30), write_onnx(folder.parent / "again")
    right = [int(table[row["input_ids"]].sum(0).argmax() == row["labels"]) for row in dataset]
    engine = measure(folder).engines[-1]
    assert engine.name == "ONNX int8"
    assert engine.metrics["accuracy"] == pytest.approx(np.mean(right))
    assert engine.size == (folder / "model.onnx").stat().st_size


def test_metrics_of_the_models_equal_the_ones_computed_by_hand(folder):
    teacher, student = tiny.bert(layers=3), tiny.bert(seed=1)
    dataset = tiny.text_dataset(30)
    report = measure(folder, teacher=teacher, student=student)
    assert [engine.name for engine in report.engines] == ["teacher", "student", "ONNX int8"]
    for engine, model in zip(report.engines, (teacher, student), strict=False):
        with torch.no_grad():
            logits = [model(input_ids=torch.tensor([row["input_ids"]])).logits for row in dataset]
        right = [int(value.argmax()) == row["labels"] for value, row in zip(logits, dataset, strict=True)]
        assert engine.metrics["accuracy"] == pytest.approx(np.mean(right))
        assert engine.parameters == sum(p.numel() for p in model.parameters())


def test_sizes_and_zeros_are_those_of_the_checkpoint(folder, tmp_path):
    student = tiny.bert(seed=1)
    linears = [module for module in student.modules() if isinstance(module, nn.Linear)]
    with torch.no_grad():
        linears[0].weight.zero_()
    student.save_pretrained(tmp_path / "checkpoint")
    engine = measure(folder, student=student).engines[0]
    assert engine.size == (tmp_path / "checkpoint" / "model.safetensors").stat().st_size
    assert engine.sparsity == pytest.approx(linears[0].weight.numel() / sum(m.weight.numel() for m in linears))


def test_a_student_with_fake_quantizers_is_measured_with_them(folder):
    student = tiny.bert(seed=1)
    prepare_qat_(student, QuantizationSpec(range_estimator="learned"))
    student.train()(**tiny.batch(student))  # the first batch sets the ranges, which are parameters in memory
    logits = []

    def keep(prediction):
        logits.append(prediction.predictions)
        return classification_metrics(prediction)

    engine = measure(folder, student=student, compute_metrics=keep).engines[0]
    plain = measure(folder, compute_metrics=keep).engines[0]
    assert (engine.size, engine.parameters) == (plain.size, plain.parameters)
    assert not np.allclose(logits[0], logits[2], atol=1e-4)
    assert engine.sparsity == plain.sparsity


def test_measuring_leaves_the_model_as_it_was(folder):
    student = tiny.bert(seed=1).train()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    measure(folder, student=student)
    assert student.training
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_rows_keep_the_names_and_the_order_of_the_mapping(folder, tmp_path):
    write_onnx(tmp_path / "float", kind="float")
    report = measure({"small": folder, "plain": tmp_path / "float"})
    assert [engine.name for engine in report.engines] == ["student", "small", "plain"]
    assert [engine.parity["kind"] for engine in report.engines[1:]] == ["int8", "float"]
    assert measure(tmp_path / "float").engines[-1].name == "ONNX float"


def test_records_of_earlier_releases_are_read(folder):
    """Their file was called as a report is, and weights alone had one name whatever their width."""
    student = tiny.bert(seed=1)
    seal(folder, student)
    facts = json.loads((folder / EXPORT_FACTS).read_text())
    (folder / EXPORT_FACTS).unlink()
    for kind, spec, name in (
        ("weights", QuantizationSpec(weight_bits=4, activation_bits=None), "ONNX int4 weights"),
        ("int8", QuantizationSpec(weight_bits=2), "ONNX w2a8"),
        ("int8", QuantizationSpec(), "ONNX int8"),
        ("float", None, "ONNX float"),
    ):
        known = {**facts, "kind": kind, "spec": None if spec is None else spec.to_dict()}
        (folder / "report.json").write_text(json.dumps(known))
        report = measure(folder, sealed=False, student=student)
        assert report.engines[-1].name == name
        tag = name.removeprefix("ONNX ").replace(" ", "_")
        assert set(ModelCard(report.to_card()).data.tags) == {
            "hfkdq",
            "onnx",
            *(["quantization", tag] if spec else []),
        }


def test_external_data_counts(folder):
    before = measure(folder).engines[-1].size
    (folder / "model.onnx_data").write_bytes(b"x" * 1000)
    assert measure(folder).engines[-1].size == before + 1000


def test_missing_masks_are_filled_as_models_do(folder):
    report = measure(folder, eval_dataset=tiny.text_dataset(12).remove_columns("attention_mask"), batch_size=1,
                     processing_class=None)  # fmt: skip
    assert report.engines[-1].metrics == measure(folder, eval_dataset=tiny.text_dataset(12)).engines[-1].metrics


def test_facts_are_copied_without_ranges_paths_and_tokens(folder, tmp_path):
    student = tiny.bert(seed=1)
    student.config._name_or_path = str(tmp_path / "teacher")
    record_fact(
        student,
        "quantization",
        {"spec": {"weight_bits": 8}, "ranges": {"a": {"scale": 1.0, "zero_point": 0}}, "weights": {}},
    )
    record_fact(student, "distillation", {"teacher": str(tmp_path / "teacher"), "notes": ["~/secret", SECRET, "kept"]})
    report = measure(folder, student=student)
    assert report.facts == {"quantization": {"spec": {"weight_bits": 8}}, "distillation": {"notes": ["kept"]}}
    assert report.engines[-1].parity == {"kind": "int8", "opset": 17, "max_abs_diff": 0.01, "samples": 4}
    assert report.base_model is None
    for text in (report.to_json(), report.to_card()):
        assert str(tmp_path) not in text
        assert SECRET not in text
        assert str(Path.home()) not in text
    assert student.config.hfkdq["quantization"]["ranges"] == {"a": {"scale": 1.0, "zero_point": 0}}


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (dict(weight_bits=2), "2-bit weights (ternary, symmetric, scales per output channel), embeddings 8-bit, head 8-bit, 8"),
        (dict(weight_bits=4, group_size=64, activation_bits=None, symmetric=False, embedding_bits=4),
         "4-bit weights (affine, scales per 64 inputs), head 8-bit."),
        (dict(weight_bits=4, weight_mapping="kmeans", per_channel=False), "symmetric, k-means codebook, scales per tensor)"),
        (dict(weight_bits=16, storage_dtype="float16"), "float16 weights, 8-bit activations"),
        (dict(activation_bits=4, attention=True, activation_symmetric=True),
         "4-bit activations, inside attention too (symmetric, per tensor, ranges: moving average)"),
        (dict(overrides={"query": None, "key": {"weight_bits": 4}}), "; 2 settings for single modules"),
    ],
)  # fmt: skip
def test_card_says_what_a_spec_asks_for(spec, words):
    (line,) = describe_facts({"quantization": {"spec": QuantizationSpec(**spec).to_dict()}})
    assert words in line


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (dict(structure="head", sparsity=0.5, criterion="taylor"), "of the attention heads are removed; chosen by taylor"),
        (dict(structure="neuron", sparsity=0.5, cut="mask"), "of the feed-forward neurons of every layer are zero"),
        (dict(structure="n:m"), "are zero, 2:4; their shapes are unchanged"),
        (dict(structure="block", sparsity=0.5, pattern="1x8"), "in blocks of 1x8"),
        (dict(structure="vocab"), "of the vocabulary, which a corpus did not use, is removed. Parameters: 1.00k before"),
        *((dict(structure=name, sparsity=0.5), "removed") for name in ("channel", "layer", "hidden")),
    ],
)  # fmt: skip
def test_card_says_what_was_pruned(spec, words):
    fact = {"spec": PruningSpec(**spec).to_dict(), "achieved_sparsity": 0.5}
    fact |= {"parameters_before": 1000, "parameters_after": 600}
    assert words in describe_facts({"pruning": fact})[0]


def test_card_tells_every_pruning_and_how_to_load_the_result(folder):
    student = tiny.bert(seed=1)
    prune(student, PruningSpec(sparsity=0.5, structure="neuron"))
    prune(student, PruningSpec(sparsity=0.5, structure="head", plain_checkpoint=False))
    card = measure(folder, student=student).to_card()
    assert card.index("50.0% of the feed-forward neurons") < card.index("50.0% of the attention heads")
    assert 'model = load_pruned("."' in card
    assert "AutoModelForSequenceClassification.from_pretrained" not in card


def test_base_model_comes_from_the_configuration_if_it_names_one(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "local").mkdir(parents=True)
    for name, expected in {"me/model": "me/model", "me/local": None, "out/checkpoint-5": None, "": None}.items():
        student = tiny.bert(seed=1)
        student.config._name_or_path = name
        assert measure(folder, student=student).base_model == expected
    student.save_pretrained(tmp_path / "runs" / "teacher")
    student = type(student).from_pretrained("runs/teacher")
    shutil.rmtree(tmp_path / "runs")  # which was no model on the Hub
    assert measure(folder, student=student).base_model is None
    assert measure(folder, base_model="me/other").base_model == "me/other"


def test_environment_names_versions_and_processor(folder):
    environment = measure(folder).environment
    assert environment["torch"].startswith(torch.__version__.split("+")[0])
    assert {"platform", "python", "hfkdq", "transformers", "onnxruntime"} <= set(environment)


def test_images_and_their_processor_need_no_tokenizer(folder, tmp_path):
    write_image_onnx(tmp_path / "image")
    report = measure(
        tmp_path / "image", student=tiny.vit(), eval_dataset=tiny.image_dataset(12), processing_class=None
    )
    assert (report.task, report.processor) == ("image-classification", None)
    assert report.engines[-1].metrics["accuracy"] == np.mean(
        [int(row["pixel_values"].flatten()[:3].argmax() == row["labels"]) for row in tiny.image_dataset(12)]
    )
    assert "ORTModelForImageClassification" in report.to_card()
    assert "pipeline(" not in report.to_card()


def test_a_transform_finds_its_columns(folder):
    def read(rows):
        return {"input_ids": rows["words"], "attention_mask": rows["attention_mask"], "labels": rows["labels"]}

    data = tiny.text_dataset(8)
    lazy = data.rename_column("input_ids", "words").with_transform(read)
    assert measure(folder, eval_dataset=lazy).engines == measure(folder, eval_dataset=data).engines


def test_integer_weights_are_refused_before_anything_is_measured(folder):
    teacher = tiny.bert()
    teacher.is_quantized = True
    with pytest.raises(ValueError, match="teacher was loaded with integer weights"):
        measure(folder, teacher=teacher)


def write_image_onnx(folder: Path) -> None:
    """Logits are the first three pixels."""
    folder.mkdir()
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["pixel_values"], ["flat"]),
         helper.make_node("Slice", ["flat", "start", "end", "axis"], ["logits"])],
        "pixels", [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(np.array([v]), n) for n, v in (("start", 0), ("end", 3), ("axis", 1))],
    )  # fmt: skip
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), folder / "model.onnx"
    )
    (folder / EXPORT_FACTS).write_text("{}")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(onnx="nowhere"), ValueError, "no model.onnx and no export_facts.json"),
        (dict(onnx={}), ValueError, "names no folder"),
        (dict(student=nn.Linear(2, 2)), TypeError, "student must be a PreTrainedModel"),
        (dict(eval_dataset=iter([])), TypeError, "data set with a length"),
        (dict(eval_dataset=tiny.text_dataset(4).select([])), ValueError, "no examples"),
        (dict(eval_dataset=tiny.text_dataset(4).remove_columns("labels")), ValueError, "no labels"),
        (dict(dataset={"name": "x"}), TypeError, "DatasetInfo"),
        (dict(batch_size=0), ValueError, "batch_size must be an integer of at least 1"),
        (dict(latency_rounds=-1), ValueError, "latency_rounds"),
        (dict(threads=0), ValueError, "threads"),
        (dict(compute_metrics=lambda p: {"accuracy": float("nan")}), ValueError, "accuracy=nan for 'student'"),
    ],
)
def test_bad_input_gets_a_clear_error(folder, change, error, message):
    with pytest.raises(error, match=message):
        measure(**{"onnx": folder, **change})


def test_a_row_of_a_file_cannot_take_the_name_of_a_model(folder):
    with pytest.raises(ValueError, match="cannot be called 'student'"):
        measure({"student": folder})


# ------------------------------------------------------------------ latency


def engine_of(folder: Path, name: str) -> TimedEngine:
    ids = np.arange(6, dtype="int64")[None]
    return TimedEngine(name, onnx_call, folder / "model.onnx", {"input_ids": ids, "attention_mask": np.ones_like(ids)})


@pytest.fixture
def processes(monkeypatch) -> list[subprocess.Popen]:
    """The processes that are started."""
    started = []

    class Recorded(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            started.append(self)

    monkeypatch.setattr(latency.subprocess, "Popen", Recorded)
    return started


def test_engines_are_timed_in_turn_and_their_processes_end(folder, processes, monkeypatch):
    order, time = [], latency._Worker.time
    monkeypatch.setattr(
        latency._Worker, "time", lambda worker, seconds: order.append(worker.name) or time(worker, 0.01)
    )
    results = time_engines([engine_of(folder, "a"), engine_of(folder, "b")], threads=1, rounds=3)
    assert order == ["a", "b", "a", "b", "a", "b"]
    for result in results:
        assert 0 < result.min_ms <= result.median_ms
        assert 30 <= result.calls <= 6000
    assert len(processes) == 2
    assert all(process.poll() == 0 for process in processes)


@pytest.mark.one_line
def test_measured_latency_covers_torch_and_onnx(folder):
    report = measure(folder, latency_rounds=1, threads=1)
    assert all(engine.latency.calls >= 10 for engine in report.engines)
    length = len(tiny.text_dataset(30)[0]["input_ids"])
    assert report.timing == {
        "device": "cpu", "threads": 1, "rounds": 1, "inputs": {"input_ids": [1, length], "attention_mask": [1, length]},
    }  # fmt: skip
    assert report.speedup(report.engines[0]) == 1.0
    assert report.speedup(report.engines[1]) > 1.0


def test_a_worker_that_cannot_start_says_why_and_leaves_no_process(folder, processes):
    broken = TimedEngine("broken", onnx_call, folder / "nothing.onnx", {"input_ids": np.zeros((1, 2), "int64")})
    with pytest.raises(RuntimeError, match=r"times 'broken' ended with code 1(.|\n)*There is no ONNX file"):
        time_engines([engine_of(folder, "a"), broken], threads=1, rounds=1)
    assert [process.poll() is None for process in processes] == [False, False]


def test_a_worker_that_dies_on_the_way_is_reported(folder, processes, monkeypatch):
    time = latency._Worker.time

    def kill_then_time(worker, seconds):
        worker._process.kill()
        worker._process.wait()
        return time(worker, seconds)

    monkeypatch.setattr(latency._Worker, "time", kill_then_time)
    with pytest.raises(RuntimeError, match=r"times 'a' ended with code -9"):
        time_engines([engine_of(folder, "a"), engine_of(folder, "b")], threads=1, rounds=1)
    assert all(process.poll() is not None for process in processes)


def test_the_process_that_times_a_file_carries_no_torch():
    code = "import sys, hfkdq.measuring.worker, hfkdq.export.runtime; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


# ------------------------------------------------------------------ JSON and tables


def test_json_round_trip(report, tmp_path):
    assert CompressionReport.from_json(report.to_json()) == report
    path = report.save(tmp_path / "report.json")
    assert CompressionReport.load(path) == report
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_a_failed_save_keeps_the_old_file(report, tmp_path):
    path = report.save(tmp_path / "report.json")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        replace(report, facts={"student": {"layers": float("nan")}}).save(path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        report.save(tmp_path / "folder")
    assert path.read_bytes() == before
    assert {file.name for file in tmp_path.iterdir()} == {"report.json", "folder"}


def test_json_that_is_no_report_is_refused(report):
    with pytest.raises(ValueError, match="no list `engines`"):
        CompressionReport.from_json("{}")
    with pytest.raises(ValueError, match="CompressionReport has no field colour"):
        CompressionReport.from_json(json.dumps({**json.loads(report.to_json()), "colour": 1}))
    with pytest.raises(ValueError, match="no compression report"):
        CompressionReport.from_json('{"engines": [{"name": "a"}]}')


def test_table_fits_a_terminal(report):
    console = rich.console.Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report.table())
    text = console.export_text()
    assert "…" not in text
    last = next(line.split() for line in text.splitlines() if "int8" in line)
    assert last == ["ONNX", "int8", "86.18", "86.17", "–", "–", "17.6", "0.19", "0.620", "0.550", "11.8x"]  # noqa: RUF001


def test_markdown_table(report):
    lines = report.to_markdown().splitlines()
    assert lines[0].startswith("| Model | accuracy (%) | f1 (%) | Params | Zeros (%) | Size (MB) | Size ratio |")
    assert lines[2] == "| teacher | 87.99 | 87.98 | 22.7M | 0.0 | 90.9 | 1.00 | 7.30 | 7.00 | 1.00x |"
    bare = replace(report, engines=tuple(replace(e, latency=None, sparsity=0.001, metrics={}) for e in report.engines))
    assert bare.to_markdown().splitlines()[0] == "| Model | Params | Size (MB) | Size ratio |"


def test_only_shares_are_percent(report):
    engines = tuple(replace(engine, metrics={"mse": 0.25, "accuracy": 0.5}) for engine in report.engines)
    assert "| mse | accuracy (%) |" in replace(report, engines=engines).to_markdown()
    assert "| 0.25 | 50.00 |" in replace(report, engines=engines).to_markdown()
    engines = tuple(replace(engine, metrics={"accuracy": 50.0}) for engine in report.engines)
    assert "| Model | accuracy | Params" in replace(report, engines=engines).to_markdown()


# ------------------------------------------------------------------ card


def test_card_equals_the_golden_file(report):
    assert report.to_card(repo_id="me/tiny-int8") == GOLDEN.read_text(encoding="utf-8")


def test_card_is_accepted_and_its_results_are_those_of_the_file(report):
    data = ModelCard(report.to_card()).data
    assert data.base_model == "sentence-transformers/all-MiniLM-L6-v2"
    assert (data.pipeline_tag, data.library_name, data.license) == (
        "text-classification",
        "transformers",
        "apache-2.0",
    )
    assert data.datasets == ["cornell-movie-review-data/rotten_tomatoes"]
    assert data.tags == ["hfkdq", "distillation", "pruning", "quantization", "int8", "onnx"]
    assert {r.metric_type: r.metric_value for r in data.eval_results} == report.engines[-1].metrics
    result = data.eval_results[0]
    assert (result.task_type, result.dataset_split, result.dataset_name) == (
        "text-classification", "test", "Rotten Tomatoes",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "gone"),
    [
        (dict(base_model=None), "all-MiniLM"),
        (dict(license=None), "license"),
        (dict(language=None), "language"),
        (dict(dataset=None), "Rotten|model-index|datasets"),
        (dict(task=None), "model-index|pipeline|ORTModel|AutoModel"),
        (dict(processor=None), "AutoTokenizer|pipeline\\("),
        (dict(environment={}), "Environment|Some CPU"),
        (dict(timing={}), "How latency|Latency is that"),
        (dict(sample=None), "printed|positive"),
        (dict(training={}), "rows in a step|schedule"),
        (dict(curves={}), "Logged|step 800"),
        (dict(training={}, curves={}), "How it was trained"),
        (
            dict(facts={}),
            "Sources|Hinton|Distillation|Pruning|Quantization\\*|Layers|- (distillation|pruning|quantization|int8)\\n",
        ),
    ],
)
def test_a_missing_fact_leaves_no_line(report, change, gone):
    assert re.search(gone, report.to_card())
    card = replace(report, **change).to_card()
    assert not re.search(gone, card)
    assert "None" not in card
    assert ModelCard(card).data.library_name == "transformers"
    assert "\n\n\n" not in card


def test_every_topic_has_its_own_line(report):
    full = report.to_card().splitlines()
    for topic, words in {
        "student": "**Layers**",
        "distillation": "**Distillation**",
        "pruning": "**Pruning**",
    }.items():
        facts = {key: value for key, value in report.facts.items() if key != topic}
        left = replace(report, facts=facts).to_card().splitlines()
        assert any(words in line for line in full if line not in left)


def test_parity_stands_in_the_card_as_it_was_recorded(report):
    assert "| ONNX int8 | 3.10e-02 | 4.20e-03 | 4.21 | 99.61 | 256 | 10 |" in report.to_card()
    engines = tuple(replace(engine, parity=None) for engine in report.engines)
    assert "How close" not in replace(report, engines=engines).to_card()


def test_rough_latencies_stand_in_the_card(report):
    assert "Latency varied" not in report.to_card()
    rough = replace(report.engines[0], latency=Latency(median_ms=14.1, min_ms=7.0, calls=30))
    assert "Latency varied" in replace(report, engines=(rough, *report.engines[1:])).to_card()


def test_training_without_a_teacher_is_not_called_distillation(report):
    fact = {"objectives": [{"name": "TaskLoss", "weight": 1.0}], "steps": 10}
    card = replace(report, facts={"distillation": fact}).to_card()
    assert "**Training**, 10 optimizer steps: `TaskLoss(weight=1.0)`." in card
    assert "istillation" not in card


def test_a_data_set_that_is_not_on_the_hub_still_gives_results(report):
    data = ModelCard(replace(report, dataset=DatasetInfo(name="scikit-learn digits")).to_card()).data
    assert data.datasets is None
    assert data.eval_results[0].dataset_type == "scikit-learn-digits"


def test_the_code_in_the_card_runs(tmp_path, monkeypatch):
    pytest.importorskip("optimum.onnxruntime", reason="the card's second program is Optimum's, of the optimum line")
    data, tokenizer = tiny.text_dataset(16), tiny.tokenizer()
    student = quantize(tiny.bert(seed=1), QuantizationSpec(), data, processing_class=tokenizer)
    settings = dict(processing_class=tokenizer, calibration=data, latency_rounds=0)
    folders = {
        "ONNX float": export_onnx(student, tmp_path / "float", quantization="float32", **settings),
        "ONNX int8": export_onnx(student, tmp_path / "int8", quantization=QuantizationSpec(), **settings),
    }
    report = measure(folders, sealed=False, student=student, eval_dataset=data)
    quantized, plain, small = report.engines
    assert quantized.parameters == sum(p.numel() for p in tiny.bert(seed=1).parameters())
    assert small.size < plain.size
    assert small.parity["max_abs_diff"] <= small.parity["tolerance"] * small.parity["max_abs_logit"]
    programs = re.findall(r"```python\n(.*?)```", report.to_card(), flags=re.DOTALL)
    assert len(programs) == 2
    monkeypatch.chdir(folders["ONNX int8"])
    names = {}
    for program in programs:
        exec(program, names)
    assert names["pipe"]("w1 w2 w3")[0]["label"] in student.config.label2id
    assert report.sample.printed == str(names["pipe"]("A text that the model has not seen."))


def test_the_code_in_the_card_of_images_with_one_channel_runs(report, tmp_path, monkeypatch, capsys):
    """A pipeline makes three channels of every image."""
    pytest.importorskip("optimum.onnxruntime", reason="Transformers' own exporters load no image")
    model = tiny.vit(channels=1)
    processor = ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5])
    folder = export_onnx(model, tmp_path / "onnx", processing_class=processor, latency_rounds=0)
    facts, image = json.loads((folder / EXPORT_FACTS).read_text()), Image.new("L", (8, 8), 200)
    image.save(folder / "image.png")
    sample = Sample(**run_sample(folder, facts, type(model).__name__, "AutoImageProcessor", image))
    told = dict(
        architecture=type(model).__name__, task="image-classification", processor="AutoImageProcessor", facts={}
    )
    engines = (*report.engines[:-1], replace(report.engines[-1], parity=facts))
    environment = {"transformers": transformers.__version__}
    card = replace(report, engines=engines, environment=environment, sample=sample, **told).to_card()
    for count, calls in ((3, True), (4, False)):
        other = replace(engines[-1], parity={**facts, "fixed_axes": {"num_channels": count}})
        found = replace(report, engines=(*engines[:-1], other), environment=environment, **told).to_card()
        assert ('pipe("image.png")' in found) == calls
    monkeypatch.chdir(folder)
    capsys.readouterr()
    for program in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        exec(program, {})
    assert capsys.readouterr().out.strip() == sample.printed
    assert sample.printed in model.config.label2id


CARDS = {
    "text-classification": tiny.bert, "token-classification": tiny.bert_tokens, "fill-mask": tiny.bert_mlm,
    "question-answering": tiny.bert_qa, "image-classification": functools.partial(tiny.vit, channels=3),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of the pipeline that finds answers
@pytest.mark.parametrize("task", CARDS)
def test_the_code_in_the_card_of_a_task_runs_and_prints_what_it_says(report, task, tmp_path, monkeypatch, capsys):
    model = CARDS[task]()
    is_image = task == "image-classification"
    processor = ViTImageProcessor(size={"height": 8, "width": 8}) if is_image else tiny.tokenizer()
    assert is_image or "token_type_ids" not in processor.model_input_names  # which files of BERT read
    if task == "fill-mask":
        processor.add_special_tokens({"mask_token": "w1"})
    folder = export_onnx(model, tmp_path / "onnx", processing_class=processor, latency_rounds=0)
    environment = {"transformers": transformers.__version__}
    processor_class = "AutoImageProcessor" if is_image else "AutoTokenizer"
    Image.new("RGB", (8, 8), "red").save(folder / "image.png")
    found = run_sample(
        folder, json.loads((folder / EXPORT_FACTS).read_text()), type(model).__name__, processor_class,
        Image.open(folder / "image.png") if is_image else None,
    )  # fmt: skip
    sample = None if found is None else Sample(**found)
    told = dict(architecture=type(model).__name__, task=task, processor=processor_class, facts={}, sample=sample)
    card = replace(report, environment=environment, **told).to_card()
    programs = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    is_4 = transformers.__version__.startswith("4")
    assert len(programs) == (2 if is_4 else 3)
    programs = programs[-2:]  # without Optimum's where it does not run
    monkeypatch.chdir(folder)
    names = {}
    capsys.readouterr()
    exec(programs[0], names)
    printed = capsys.readouterr().out.strip()
    assert (sample.printed if sample else "") == printed
    if sample:
        assert (
            f"printed{', of the first image of the data' if is_image else ''}:\n\n```text\n{one_line(printed)}\n```"
            in card
        )
    if is_4:
        found = names["pipe"]("image.png") if is_image else None
        assert found is None or found[0]["label"] in model.config.label2id
    batch = tiny.batch(model, 1)
    if is_image:
        batch["pixel_values"] = batch["pixel_values"].expand(-1, 3, -1, -1)
    else:
        batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    output = next(name for name in model(**batch) if name not in ("loss", "hidden_states"))
    ours = names["model"](**{name: value for name, value in batch.items() if name not in find_labels(type(model))})
    torch.testing.assert_close(ours[output], model.eval()(**batch)[output], rtol=1e-4, atol=1e-5)
    exec(programs[1], names)
    assert type(names["model"]) is type(model)


def test_sources_are_those_of_what_was_recorded(report):
    def titles(facts):
        return {title for _, title, _ in citations(facts)}

    def of(name, **settings):
        return titles({"distillation": {"objectives": [{"name": name, **settings}]}})

    assert of("TaskLoss") == of("MyOwn") == titles({}) == set()
    assert of("LogitKD", divergence="forward_kl") == {"Distilling the Knowledge in a Neural Network"}
    more = of("LogitKD", divergence="DKD(alpha=1, beta=4)", standardize=True) - of("LogitKD")
    assert more == {"Decoupled Knowledge Distillation", "Logit Standardization in Knowledge Distillation"}
    assert of("HiddenStateKD", layers="dynamic") - of("HiddenStateKD", layers="uniform") == {"CoFi"}
    assert of("NoisyKD", objective={"name": "RKD"}) - of("NoisyKD") == of("RKD")

    def pruned(**spec):
        return titles({"pruning": {"spec": spec}})

    assert pruned(criterion="magnitude") == set()
    assert pruned(criterion="movement") == {"Movement Pruning"}
    assert pruned(criterion="activation", structure="layer") == {"ShortGPT"}
    assert "ShortGPT" not in pruned(criterion="activation", structure="neuron")
    assert titles({"pruning": {"spec": {}, "earlier": [{"spec": {"criterion": "movement"}}]}}) == {"Movement Pruning"}

    def quantized(**spec):
        return titles({"quantization": {"spec": spec}})

    assert quantized(weight_bits=4, activation_bits=None) == set()
    observed = quantized(weight_bits=8, activation_bits=8)
    assert len(observed) == 1
    learned = quantized(weight_bits=2, activation_bits=8, weight_estimator="learned", range_estimator="learned")
    assert learned - observed == {"Learned Step Size Quantization", "LSQ+"}
    # They are what the documentation of the classes says.
    assert citations(report.facts)[0] == ("Hinton et al.", "Distilling the Knowledge in a Neural Network", "2015")
    assert "Hinton et al." in LogitKD.__doc__


def test_settings_of_a_training_are_those_of_its_arguments_and_log(training_arguments, tmp_path):
    args = training_arguments(max_steps=6, gradient_accumulation_steps=2, warmup_steps=3, lr_scheduler_type="cosine")
    log = [{"step": 3, "loss": 1.0}, {"step": 6, "loss": 0.5, "learning_rate": 1e-3}]
    found = settings_of(args, log)
    assert found.items() >= {"optimizer steps": 6, "rows in a step": 16, "learning rate": 1e-3, "schedule": "cosine", "warm-up steps": 3}.items()  # fmt: skip
    assert found["seed"] == 0
    assert not {"weight decay", "label smoothing", "epochs"} & found.keys()
    state = {"global_step": 6, "epoch": 2.0, "train_batch_size": 8, "log_history": log}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    assert read_settings(tmp_path) == {
        "optimizer steps": 6, "epochs": 2.0, "rows in a batch": 8, "largest learning rate in the log": 1e-3,
    }  # fmt: skip


def test_what_was_printed_makes_no_markup(report):
    for text in HOSTILE:
        card = replace(report, sample=Sample(runner="optimum", printed=f"[{{'label': '{text}'}}]")).to_card()
        tokens = MarkdownIt("commonmark").parse(card.split("---\n", 2)[2])
        assert [token.tag for token in tokens if token.type == "heading_open"].count("h1") == 1
        blocks = [token.content for token in tokens if token.type == "fence" and token.info == "text"]
        assert len(blocks) <= 1
        assert all(block.count("\n") == 1 for block in blocks)


HOSTILE = [
    "x\n# Heading\n", "x\r\r# Heading", "\u2028# Heading", "# Heading", "```\ncode", "~~~", "](http://evil)", "![i](http://evil)",
    "<script>alert(1)</script>", "&lt;script&gt;", "{{ 7*7 }}{% for x in y %}", "a | b |", "---\nlicense: mit\n---",
    "http://evil", "www.evil and more", "$x$", "\x1b[2J", "\u202eabc", "[/red]", "- item", "1. item", "> quote", "`a` b", "@someone",
]  # fmt: skip


def with_text(report: CompressionReport, text: str) -> CompressionReport:
    """The report with a text wherever a checkpoint, a data set or an export can bring one in."""
    facts = json.loads(json.dumps(report.facts))
    facts["distillation"]["teacher"] = text
    facts["distillation"]["objectives"][0].update({"name": text, "layers": [text], text: text})
    facts["pruning"]["spec"] |= {"structure": "block", "criterion": text, "pattern": text}
    facts["quantization"]["spec"] |= {"exclude_modules": [text], "range_estimator": text}
    engines = [replace(e, name=f"{text}{e.name}", metrics={text: 0.5, **e.metrics}) for e in report.engines]
    engines[-1] = replace(engines[-1], parity={**engines[-1].parity, "kind": text})
    return replace(
        report, engines=tuple(engines), facts=facts, base_model=text, license=text, language=[text],
        environment={text: text, **report.environment}, timing={**report.timing, "inputs": {text: [1, 2]}},
        dataset=DatasetInfo(name=text, id=text, config=text, split=text, revision=text),
    )  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=repr)
def test_text_from_elsewhere_stays_text_in_a_card(report, text):
    card = with_text(report, text).to_card("me/tiny-int8")
    body, plain = (part.split("---\n", 2)[2] for part in (card, report.to_card("me/tiny-int8")))
    rendered, expected = (
        MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(part) for part in (body, plain)
    )

    def kinds(tokens):
        inner = [child.type for token in tokens for child in token.children or []]
        counted = (*(token.type for token in tokens), *inner)
        return Counter(kind for kind in counted if kind not in ("text", "text_special", "code_inline"))

    # The link to the base model is gone; a metric's column and a line of the environment have come.
    difference = kinds(rendered)
    difference.subtract(kinds(expected))
    names = {"link_open": -1, "link_close": -1, "td_open": 4, "td_close": 4, "th_open": 1, "th_close": 1, "inline": 6}
    names |= {"list_item_open": 1, "list_item_close": 1, "paragraph_open": 1, "paragraph_close": 1}
    assert {kind: number for kind, number in difference.items() if number} == names
    assert "49" not in body.replace("4.49", "")
    assert not any(link in body for link in ("http://", "www.", "<script", "\x1b", "\u202e"))
    data = ModelCard(card).data
    assert data.tags == ModelCard(report.to_card()).data.tags
    assert (data.base_model, data.datasets) == (None, None)


@pytest.mark.parametrize("text", HOSTILE, ids=repr)
def test_text_from_elsewhere_stays_text_in_tables_and_plots(report, text, tmp_path):
    hostile = with_text(report, text)
    console = rich.console.Console(width=250, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(hostile.table())
    printed = console.export_text()
    assert "\x1b" not in printed
    assert "ONNX int8" in printed
    assert len(hostile.to_markdown().splitlines()) == 6
    pytest.importorskip("matplotlib")
    assert hostile.save_plot(tmp_path / "report.png").stat().st_size > 1000


@pytest.mark.parametrize("name", ['x"); evil(', "a b", "me/tiny/x", "me/x\n", "../x"])
def test_code_in_a_card_is_made_of_names_alone(report, name):
    with pytest.raises(ValueError, match="Repo id"):
        report.to_card(name)
    for field in ("architecture", "processor"):
        with pytest.raises(ValueError, match=f"{field} is .*expected the name of a class"):
            replace(report, **{field: name}).to_card()
    assert "pipeline(" not in replace(report, task=name).to_card()


def test_no_secret_reaches_card_json_or_table(report):
    hostile = with_text(report, SECRET)
    for text in (hostile.to_card(), hostile.to_json()):
        assert SECRET not in text
        assert "hf_***" in text


def test_what_may_be_published_names_no_folder_and_no_secret():
    facts = {
        "a": "/home/me/x", "b": ["see /home/me/x", "C:\\Users\\me", "kept"], "c": {SECRET: 1, "d": Path("/x"), "e": (1, SECRET)},
        "f": "ghp_" + "a1B2" * 9, "g": "me/model", "h": "https://me:pass@host/x", "i": "50/50",
    }  # fmt: skip
    assert publishable(facts) == {"b": ["kept"], "c": {"e": [1]}, "g": "me/model", "i": "50/50"}


def _changed(path: str, value):
    def change(data):
        *way, last = [int(part) if part.isdigit() else part for part in path.split("/")]
        for part in way:
            data = data[part]
        data[last] = value

    return change


MALFORMED = {
    "engines": ["x", {}, [], None, 1, [1], ["x"], [None], [{}]],
    "engines/0/name": [1, None, "a\nb", ["x"]],
    "engines/0/kind": ["tflite", 1],
    "engines/0/metrics": ["x", [1], None, {"a": "b"}, {"a": None}, {"a": True}, {"a\nb": 1.0}],
    "engines/0/size": [0, -1, "1", 1.5, True, None, 10**30],
    "engines/0/parameters": [-1, "x", 1.5],
    "engines/0/sparsity": [-0.1, 2, "x"],
    "engines/0/latency": ["x", 1, {}, [], {"median_ms": -1, "min_ms": -1, "calls": 1}, {"median_ms": 0, "min_ms": 0, "calls": 1}],
    "engines/0/latency/median_ms": ["x", None, -1.0, 0.0],
    "engines/0/files": ["x", {"a": 1}, {"a": {"bytes": "x", "sha256": "x"}}, {"a": {}}],
    "engines/3/parity": ["x", [1], {"max_abs_diff": "x"}, {"samples": "many"}, {"opset": [17]}, {"fixed_axes": [1]}],
    "architecture": ["a b", 1, None, "x\n# y"],
    "samples": ["x", -1, 1.5, None],
    "task": [1, ["x"]],
    "processor": ["x y", 1],
    "facts": ["x", [1], None],
    "facts/student": ["x", {"teacher_layers": "x"}, {"layers": 3}, {"layers": ["x"]}],
    "facts/distillation": ["x", {"objectives": "x"}, {"objectives": ["x"]}, {"steps": "x"}],
    "facts/pruning": ["x", {"spec": "x"}, {"achieved_sparsity": "x"}, {"earlier": "x"}, {"earlier": [1]}, {"spec": {"structure": []}}],
    "facts/quantization": ["x", {"spec": [1]}, {"spec": {"weight_bits": "x"}}, {"spec": {"exclude_modules": 3}}],
    "timing": ["x", {"threads": 1}, {"inputs": "x"}, {"inputs": {"a": "x"}, "threads": 1, "rounds": 1}],
    "environment": ["x", {"a": 1}, [1]],
    "dataset": ["x", {}, {"name": 1}, {"name": "x", "colour": 1}],
    "base_model": [1], "license": [1], "language": [1, {"a": 1}, [1]],
    "colour": [1],
}  # fmt: skip


@pytest.mark.parametrize(
    ("where", "value"), [(where, value) for where, values in MALFORMED.items() for value in values], ids=repr
)
def test_a_report_of_wrong_types_is_refused_in_one_line(report, tmp_path, where, value):
    data = json.loads(report.to_json())
    _changed(where, value)(data)
    check_refused(tmp_path / "report.json", json.dumps(data))


def check_refused(path: Path, text: str | bytes) -> None:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        CompressionReport.load(path)
    assert "\n" not in str(caught.value)
    if isinstance(text, str):
        with pytest.raises(ValueError, match="no compression report"):
            CompressionReport.from_json(text)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "null",
        lambda text: "[]",
        lambda text: "[" * 100_000,
        lambda text: '{"a":' * 100_000,
        lambda text: '{"engines": ' + "[" * 200 + "]" * 200 + "}",
        lambda text: text.replace('"samples": 1066', '"samples": NaN'),
        lambda text: text.replace('"samples": 1066', '"samples": 1e999'),
        lambda text: text.replace('"samples": 1066', '"samples": -Infinity'),
        lambda text: text.replace('"samples": 1066', '"samples": ' + "9" * 5000),
        lambda text: text.replace('"samples": 1066', '"samples": 1066, "samples": 1'),
        lambda text: text.replace("Rotten Tomatoes", "\\ud800"),
        lambda text: text.encode("utf-16"),
        lambda text: b"\xff\xfe\x00binary",
    ],
)  # fmt: skip
def test_a_damaged_report_is_refused_in_one_line(report, tmp_path, damage):
    check_refused(tmp_path / "report.json", damage(report.to_json()))


# ------------------------------------------------------------------ files


def spoil(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: spoil(folder, "model.onnx"), r"model\.onnx has changed: its SHA-256"),
        (lambda folder: (folder / "model.onnx").write_bytes(b"short"), r"model\.onnx has changed: it has 5 bytes"),
        (lambda folder: (folder / "model.onnx_data").write_bytes(b"x"), r"model\.onnx_data is not one of the files"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"model\.safetensors is missing"),
        (lambda folder: (folder / EXPORT_FACTS).write_text('{"kind": "int8"}'), "does not say which files.*Export the model again"),
        (lambda folder: (folder / EXPORT_FACTS).write_text('{"kind": '), r"export_facts\.json is "),
        (lambda folder: (folder / EXPORT_FACTS).write_text("[" * 100_000), r"export_facts\.json is "),
        (lambda folder: (folder / EXPORT_FACTS).write_text('{"kind": ["x"]}'), r"export_facts\.json is not what export_onnx writes"),
        (lambda folder: (folder / EXPORT_FACTS).write_text('{"files": {"a": 1}, "model": {}}'), r"export_facts\.json is not what"),
    ],
)  # fmt: skip
def test_files_that_were_not_exported_are_refused_before_anything_is_measured(folder, change, message):
    student = tiny.bert(seed=1)
    student.save_pretrained(folder)
    seal(folder, student)
    change(folder)
    with pytest.raises(ValueError, match=message) as caught:
        measure(folder, sealed=False, student=student, compute_metrics=None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: tiny.vit(), "is of the class BertForSequenceClassification, the student's is ViT"),
        (lambda: tiny.bert(layers=3), "has so many parameters"),
        (lambda: relabelled(tiny.bert()), "has the labels"),
        (lambda: reshaped(tiny.bert()), "names and shapes"),
    ],
)
def test_another_model_than_the_exported_one_is_refused(folder, other, message):
    seal(folder, tiny.bert(seed=1))
    with pytest.raises(ValueError, match=message):
        measure(folder, sealed=False, student=other())


def relabelled(model):
    model.config.id2label = {0: "other", **{key: value for key, value in model.config.id2label.items() if key}}
    return model


def reshaped(model):
    layer = model.bert.encoder.layer[0].intermediate.dense
    layer.weight = nn.Parameter(layer.weight.detach().T.contiguous())
    return model


@pytest.mark.parametrize("quantized", [False, True])
def test_an_export_records_its_files_and_its_model(tmp_path, quantized):
    data = tiny.text_dataset(16)
    student = tiny.bert(seed=1)
    if quantized:
        student = quantize(student, QuantizationSpec(), data, processing_class=tiny.tokenizer())
    spec = QuantizationSpec() if quantized else None
    folder = export_onnx(
        student,
        tmp_path / "onnx",
        quantization=spec,
        calibration=data,
        processing_class=tiny.tokenizer(),
        latency_rounds=0,
    )
    facts = json.loads((folder / EXPORT_FACTS).read_text())
    names = {path.name for path in folder.iterdir() if ".onnx" in path.name or path.suffix == ".safetensors"}
    assert set(facts["files"]) == names >= {"model.onnx", "model.safetensors"}
    for name, known in facts["files"].items():
        content = (folder / name).read_bytes()
        assert known == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert facts["model"]["architecture"] == "BertForSequenceClassification"
    assert facts["model"]["parameters"] == sum(p.numel() for p in tiny.bert(seed=1).parameters())
    report = measure(folder, sealed=False, student=student, eval_dataset=data)
    assert report.engines[-1].files == facts["files"]
    assert not {"files", "model"} & set(report.engines[-1].parity)
    assert CompressionReport.from_json(report.to_json()) == report
    spoil(folder, "model.onnx")
    with pytest.raises(ValueError, match=r"model\.onnx has changed.*Export the model again"):
        measure(folder, sealed=False, student=student, eval_dataset=data)


def test_a_card_is_written_only_for_the_files_that_were_measured(folder, tmp_path, capsys):
    report = measure(folder)
    assert set(report.engines[-1].files) == {"model.onnx"}
    path = report.save(tmp_path / "report.json")
    assert report.to_card(folder=folder) == report.to_card()
    options = argparse.Namespace(report=str(path), repo_id=None, folder=None)
    card.run(options)
    spoil(folder, "model.onnx")
    with pytest.raises(ValueError, match=r"model\.onnx has changed.*Measure the folder again"):
        report.to_card(folder=folder)
    for chosen in (None, str(folder)):
        options.folder = chosen
        with pytest.raises(ValueError, match=r"model\.onnx has changed"):
            card.run(options)


def test_a_card_of_an_export_alone_states_what_was_recorded(tmp_path, capsys):
    student = tiny.bert(seed=1)
    record_fact(student, "student", {"teacher_layers": 4, "layers": [2, 4]})
    data = tiny.text_dataset(16)
    folder = export_onnx(student, tmp_path / "onnx", quantization="int8", calibration=data, latency_rounds=0,
                         processing_class=tiny.tokenizer(), eval_dataset=data, compute_metrics=classification_metrics)  # fmt: skip
    facts = json.loads((folder / EXPORT_FACTS).read_text())
    assert main(["card", str(folder)]) == 0
    text = capsys.readouterr().out
    report = CompressionReport.from_export(folder)
    assert text == report.to_card()
    assert [engine.name for engine in report.engines] == ["student", "ONNX int8"]
    assert report.engines[1].metrics == facts["metrics"]["onnx"]
    assert report.engines[1].size == facts["bytes"]
    assert report.engines[0].size == (folder / "model.safetensors").stat().st_size
    assert "2 of the teacher's 4 layers" in text
    assert "**Quantization**: 8-bit weights (symmetric, scales per output channel)" in text
    assert "**Export** to ONNX, opset 18, with the quantization above" in text
    assert "Latency" not in text
    assert ModelCard(text).data.tags == ["hfkdq", "pruning", "quantization", "int8", "onnx"]
    (folder / EXPORT_FACTS).rename(folder / "report.json")  # as earlier releases called it
    assert main(["card", str(folder / "report.json")]) == 0
    assert capsys.readouterr().out == text
    spoil(folder, "model.onnx")
    assert main(["card", str(folder)]) == 1
    assert "model.onnx has changed" in capsys.readouterr().err


def test_a_card_needs_a_record(report, tmp_path, capsys):
    assert main(["card", str(tmp_path)]) == 1
    assert "has no report.json" in capsys.readouterr().err
    (tmp_path / "report.json").write_text("{}")
    assert main(["card", str(tmp_path)]) == 1
    assert "lacks bytes, files, kind, model, task" in capsys.readouterr().err
    report.save(tmp_path / "report.json")
    assert main(["card", str(tmp_path)]) == 0
    assert capsys.readouterr().out == report.to_card()


# ------------------------------------------------------------------ plot


def test_plot_is_a_picture_of_sane_size(report, tmp_path):
    pytest.importorskip("matplotlib")
    path = report.save_plot(tmp_path / "report.png")
    data = path.read_bytes()
    width, height = (int.from_bytes(data[start : start + 4], "big") for start in (16, 20))
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert 800 < width < 3000
    assert 300 < height < 1500
    assert [file.name for file in tmp_path.iterdir()] == ["report.png"]


def test_plot_leaves_out_what_was_not_measured(report, tmp_path):
    pytest.importorskip("matplotlib")
    engines = tuple(replace(engine, latency=None, metrics={}) for engine in report.engines[-1:])
    assert replace(report, engines=engines, timing={}).save_plot(tmp_path / "report.png").stat().st_size > 1000


def test_plot_without_matplotlib_says_what_to_install(report, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"hfkdq\[plots\]"):
        report.save_plot(tmp_path / "report.png")
    assert list(tmp_path.iterdir()) == []


def test_the_stand_in_file_runs(folder):
    ids = np.array([[5, 6, 0]])
    logits = OnnxSession(folder / "model.onnx")({"input_ids": ids, "attention_mask": np.array([[1, 1, 0]])})["logits"]
    assert logits.shape == (1, 3)


def test_an_objective_within_another_is_written_as_one():
    inner = LogitKD(divergence="mse").describe()
    outer = NoisyKD(objective=LogitKD(divergence="mse"), std=0.2).describe()
    assert outer["objective"] == inner
    assert "objective=LogitKD(weight=1.0, divergence=mse, temperature=2.0, per=token), kind=gaussian" in "".join(
        map(str, objective_call(outer))
    )
