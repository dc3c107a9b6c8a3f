# SPDX-License-Identifier: Apache-2.0
"""The commands end to end: what they write, print and refuse."""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from safetensors import SafetensorError

from hfkdq import CompressionReport, QuantizationSpec, __version__, quantize
from hfkdq.cli import main
from hfkdq.cli.checkpoint import load_model
from hfkdq.cli.export import default_folder
from hfkdq.cli.main import run_command
from hfkdq.cli.messages import as_options
from hfkdq.cli.summary import print_summary, summary_lines
from hfkdq.quantization import quantized_spec
from hfkdq.report.markdown import one_line

from . import tiny

on_optimum = pytest.mark.skipif(transformers.__version__.startswith("5"), reason="Optimum is the other line")
quick = pytest.mark.skipif(
    transformers.__version__.startswith("5"), reason="as on the other line, where tracing is quick"
)
NAMES = ["red", "green", "blue"]
UNTIMED = ("--latency-rounds", "0")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def model():
    """A classifier whose classes are about as frequent, so that the least change moves some texts to another one."""
    model = tiny.bert(layers=1, id2label=dict(enumerate(NAMES)), label2id={name: i for i, name in enumerate(NAMES)})
    batch = tiny.tokenizer()(sentences(64), padding=True, return_tensors="pt")
    with torch.no_grad():
        model.classifier.bias -= model(**batch).logits.mean(0)
    return model


@pytest.fixture
def checkpoint(model, tmp_path):
    model.save_pretrained(tmp_path / "checkpoint")
    tiny.tokenizer().save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def predictions(model, texts):
    """The classes of texts, one at a time."""
    with torch.no_grad():
        return [int(model(**tiny.tokenizer()(text, return_tensors="pt")).logits.argmax()) for text in texts]


def sentences(rows=24):
    rng = np.random.default_rng(0)
    return [" ".join(f"w{i}" for i in rng.integers(90, size=rng.integers(3, 12))) for _ in range(rows)]


def export(checkpoint, folder, *options):
    return main(["export", str(checkpoint), str(folder), *UNTIMED, *map(str, options)])


def report(folder):
    return json.loads((folder / "export_facts.json").read_text())


def test_help_names_every_command():
    done = subprocess.run([sys.executable, "-m", "hfkdq", "--help"], capture_output=True, text=True, check=True)
    assert all(command in done.stdout for command in ("demo", "export", "card"))
    version = subprocess.run([sys.executable, "-m", "hfkdq", "--version"], capture_output=True, text=True, check=True)
    assert version.stdout.split() == ["hfkdq", __version__]


def test_help_loads_nothing_heavy():
    code = "import sys; from hfkdq.cli.main import _parser; _parser(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "datasets", "rich"} & set(done.stdout.split())


def test_the_folder_may_follow_options(tmp_path, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr("hfkdq.cli.export.run", lambda options: seen.append((options.checkpoint, options.folder)))
    orders = (["in", "out", "--task", "x"], ["in", "--task", "x", "out"], ["--task", "x", "in", "out"], ["in"])
    assert [main(["export", *order]) for order in orders] == [0] * 4
    assert seen == [("in", "out")] * 3 + [("in", None)]
    for wrong in (["in", "out", "more"], ["in", "--task", "x", "out", "more"], ["in", "--tusk"]):
        with pytest.raises(SystemExit):
            main(["export", *wrong])
    assert len(seen) == 4
    assert "unrecognized arguments: more" in capsys.readouterr().err


def test_errors_are_one_line_and_a_status(capsys, tmp_path):
    assert main(["card", str(tmp_path / "nothing.json")]) == 1
    assert "hfkdq card:" in capsys.readouterr().err


def test_a_trained_checkpoint_is_exported_with_its_integers_beside_it(checkpoint, model, capsys):
    spec = QuantizationSpec()
    quantize(model, spec, [tiny.batch(model)]).save_pretrained(checkpoint)
    assert main(["export", str(checkpoint), *UNTIMED]) == 0
    beside = checkpoint.parent / "checkpoint-onnx"
    assert capsys.readouterr().out.splitlines()[-1] == str(beside)
    assert QuantizationSpec.from_dict(report(beside)["spec"]) == spec
    assert (beside / "tokenizer.json").is_file()
    assert export(checkpoint, beside) == 1
    assert "exists" in capsys.readouterr().err


def test_the_card_of_an_export_shows_what_its_call_prints(checkpoint, tmp_path, capsys):
    Dataset.from_dict({"text": sentences(4)}).to_parquet(tmp_path / "rows.parquet")
    config = checkpoint / "tokenizer_config.json"  # Transformers 5 has no default for an input that the call lacks
    names = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
    config.write_text(json.dumps({**json.loads(config.read_text()), **names}))
    assert export(checkpoint, tmp_path / "out", "--calibration-data", tmp_path / "rows.parquet") == 0
    recorded = CompressionReport.from_export(tmp_path / "out")
    assert recorded.processor == "AutoTokenizer"
    assert any(name in recorded.sample.printed for name in (*NAMES, "logits"))
    assert not {"sample", "processor"} & recorded.engines[-1].parity.keys()
    capsys.readouterr()
    assert main(["card", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert "When the file was measured, this printed" in told
    assert one_line(recorded.sample.printed) in told


def test_fake_quantizers_are_loaded_for_the_kinds_that_need_them(checkpoint, model):
    spec = QuantizationSpec(weight_bits=8, activation_bits=8)
    quantize(model, spec, [tiny.batch(model)]).save_pretrained(checkpoint)
    # int8 is what it was trained for, so that it needs no data; "none" is float32.
    for kind, wanted in {None: spec, "trained": spec, "int8": spec, "auto": "auto"}.items():
        loaded, quantization = load_model(str(checkpoint), kind, calibrated=False)
        assert quantized_spec(loaded) == spec
        assert quantization == wanted
    for kind, wanted in {"none": "float32", "float16": "float16", "int4_weights": "int4_weights"}.items():
        loaded, quantization = load_model(str(checkpoint), kind, calibrated=False)
        assert quantized_spec(loaded) is None
        assert quantization == wanted


def test_kinds_without_what_they_need_are_refused_before_anything_is_loaded_or_written(checkpoint, tmp_path, capsys):
    for options, words in {
        ("--quantization", "trained"): "records no quantization",
        ("--quantization", "int8"): "needs --calibration-data",
        ("--quantization", "auto"): "--quantization auto needs --eval-data",
        ("--max-drop", "0.1"): "--max-drop needs --eval-data",
        ("--calibration-samples", "0"): "--calibration-samples must be 1 or more",
    }.items():
        assert export(checkpoint, tmp_path / "out", *options) == 1
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@quick
def test_the_default_is_float32_for_what_was_not_trained(checkpoint):
    assert export(checkpoint, checkpoint.parent / "out") == 0
    assert report(checkpoint.parent / "out")["kind"] == "float32"


def test_data_from_files_calibrate_and_measure(checkpoint, model, tmp_path, capsys):
    texts = sentences()
    right = predictions(model, texts)
    # A third of the labels is wrong, and they are names in another order than the model's numbers.
    labels = [NAMES[(label + (i % 3 == 0)) % 3] for i, label in enumerate(right)]
    (tmp_path / "data").mkdir()
    Dataset.from_dict({"text": texts}).to_csv(tmp_path / "calibration.csv")
    Dataset.from_dict({"text": texts, "label": labels}).to_json(tmp_path / "data" / "validation.jsonl")
    Dataset.from_dict({"text": texts[:2], "label": labels[:2]}).to_json(tmp_path / "data" / "train.jsonl")
    data = (
        "--calibration-data",
        tmp_path / "calibration.csv",
        "--calibration-samples",
        16,
        "--eval-data",
        tmp_path / "data",
    )
    assert export(checkpoint, tmp_path / "out", "--quantization", "int8", *data) == 0
    facts = report(tmp_path / "out")
    assert facts["kind"] == "int8"
    assert facts["samples"] == 16
    assert facts["metrics"]["examples"] == 24
    assert facts["metrics"]["torch"]["accuracy"] == pytest.approx(16 / 24)
    printed = capsys.readouterr()
    assert "in PyTorch 0.6667 (24 examples)" in printed.out
    assert "(validation): text" in printed.err
    assert max(map(len, printed.out.splitlines()[:-1])) <= 80


def test_a_drop_beyond_the_bound_is_refused_in_the_words_of_the_command(checkpoint, model, tmp_path, capsys):
    texts = sentences(300)
    Dataset.from_dict({"text": texts, "label": predictions(model, texts)}).to_parquet(tmp_path / "rows.parquet")
    bounded = ("--quantization", "int4_weights", "--eval-data", tmp_path / "rows.parquet", "--max-drop", "0")
    assert export(checkpoint, tmp_path / "out", *bounded) == 1
    error = capsys.readouterr().err
    assert "Pass a larger --max-drop, or --allow-drop to keep the file" in error
    assert not (tmp_path / "out").exists()


@quick
def test_a_drop_can_be_allowed(checkpoint, model, tmp_path, capsys):
    texts = sentences(300)
    Dataset.from_dict({"text": texts, "label": predictions(model, texts)}).to_parquet(tmp_path / "rows.parquet")
    bounded = ("--quantization", "int4_weights", "--eval-data", tmp_path / "rows.parquet", "--max-drop", "0")
    assert export(checkpoint, tmp_path / "out", *bounded, "--allow-drop") == 0
    assert report(tmp_path / "out")["accepted"] is False
    assert "not accepted" in capsys.readouterr().out


@quick
def test_auto_prints_what_it_chose_from(checkpoint, model, tmp_path, capsys):
    texts = sentences(8)
    Dataset.from_dict({"text": texts, "label": predictions(model, texts)}).to_parquet(tmp_path / "rows.parquet")
    options = ("--quantization", "auto", "--eval-data", tmp_path / "rows.parquet", "--max-drop", "1")
    assert export(checkpoint, tmp_path / "out", *options) == 0
    lines = capsys.readouterr().out.splitlines()
    chosen = report(tmp_path / "out")["choice"]["chosen"]
    for name in ("int8", "dynamic", "int8_weights", "int4_weights", "float16", "float32"):
        row = next(line for line in lines if line.split()[:1] == [name])
        assert row.endswith("chosen") == (name == chosen)
    assert "int8: left out: it needs --calibration-data" in lines
    assert any(line.startswith(f"{chosen} is the smallest of") for line in lines)
    assert max(map(len, lines[:-1])) <= 80


def test_the_summary_has_the_numbers_of_the_report(tmp_path, capsys):
    facts = {
        "kind": "int8", "spec": QuantizationSpec().to_dict(), "task": "text-classification", "opset": 18,
        "bytes": 250_000, "max_abs_diff": 0.02, "max_abs_logit": 4.0, "tolerance": 0.1, "samples": 64,
        "metrics": {
            "metric": "accuracy", "torch": {"accuracy": 0.91}, "float": {"accuracy": 0.92}, "onnx": {"accuracy": 0.9},
            "examples": 1000, "top1_compared": 1000, "top1_different": 10,
        },
        "latency": {
            "inputs": {"input_ids": [1, 32], "attention_mask": [1, 32]}, "threads": 1, "speedup": 2.5,
            "onnx": {"median_ms": 2.0}, "float32": {"median_ms": 5.0},
        },
        "quantized_linears": 14, "fused_linears": 13, "float_linears": 1,
        "accepted": False, "reason": "accuracy goes from 0.91 to 0.9; max_drop allows 0.",
    }  # fmt: skip
    (tmp_path / "report.json").write_text(json.dumps(facts))
    (tmp_path / "model.safetensors").write_bytes(bytes(1_000_000))
    print_summary(tmp_path, sys.stdout)
    text = " ".join(capsys.readouterr().out.split())
    assert "size 0.250 MB, 0.25 of the float32 weights (1.00 MB)" in text
    assert "at most 0.02 from PyTorch, 0.005 of the largest output" in text
    assert "accuracy 0.9000, in PyTorch 0.9100, without fake quantizers 0.9200 (1,000 examples)" in text
    assert "other class 10 of 1,000 examples" in text
    assert "layers 14 with integer weights, 13 of them in an integer kernel; 1 linear layer in floating point" in text
    assert "latency 2.00 ms a call, 2.50 times as fast as float32 (5.00 ms); input_ids 1 x 32, 1 thread" in text
    assert "not accepted accuracy goes from 0.91 to 0.9" in text
    facts["latency"]["speedup_interval"] = [2.4, 2.75]
    (tmp_path / "report.json").write_text(json.dumps(facts))
    print_summary(tmp_path, sys.stdout)
    assert "2.50 times as fast as float32 (5.00 ms), 2.40 to 2.75 in the rounds;" in " ".join(
        capsys.readouterr().out.split()
    )
    busy = {key: value for key, value in facts["latency"].items() if not key.startswith("speedup")}
    told = dict(summary_lines({**facts, "latency": {**busy, "speedup_left_out": "the machine was too busy"}}, 0))
    assert (
        told["latency"] == "2.00 ms a call; no ratio to float32: the machine was too busy; input_ids 1 x 32, 1 thread"
    )
    facts["latency"]["parts"] = {"encoder": {"times": 1}, "prompt": {"times": 1}, "next token": {"times": 31}}
    (tmp_path / "report.json").write_text(json.dumps(facts))
    print_summary(tmp_path, sys.stdout)
    assert "latency 2.00 ms for 32 tokens, 2.50 times as fast" in " ".join(capsys.readouterr().out.split())
    del facts["latency"]["parts"]["next token"]  # there is no cache
    (tmp_path / "report.json").write_text(json.dumps(facts))
    print_summary(tmp_path, sys.stdout)
    assert "latency 2.00 ms for a token, 2.50 times as fast" in " ".join(capsys.readouterr().out.split())


def test_arguments_become_options_in_messages():
    message = 'Pass a larger max_drop=, or allow_drop=True, or quantization="dynamic"; max_dropped= stays.'
    assert as_options(message) == (
        "Pass a larger --max-drop, or --allow-drop, or --quantization dynamic; max_dropped= stays."
    )
    assert as_options("metric='bleu' is none of them") == "--metric bleu is none of them"


def test_errors_of_libraries_are_told_in_one_line_and_bugs_with_their_place(monkeypatch, capsys):
    def fails(options):
        raise options.error

    monkeypatch.setattr("hfkdq.cli.inspect.run", fails)
    for error, told in (
        (SafetensorError("I/O error: No space left on device\n(os error 28)"), "SafetensorError: I/O error: No space left on device (os error 28)"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (MemoryError(), "MemoryError"),
    ):  # fmt: skip
        assert run_command("inspect", argparse.Namespace(error=error)) == 1
        assert capsys.readouterr().err == f"hfkdq inspect: {told}\n"
    with pytest.raises(KeyError):
        run_command("inspect", argparse.Namespace(error=KeyError("a bug")))


@pytest.mark.parametrize(("number", "told"), [(signal.SIGINT, "interrupted."), (signal.SIGTERM, "ended by a signal.")])
def test_a_signal_at_any_time_is_told_in_one_line(monkeypatch, capsys, number, told):
    def ask(*_):
        os.kill(os.getpid(), number)
        time.sleep(9)

    before = [signal.signal(signal.SIGINT, signal.default_int_handler), signal.signal(signal.SIGTERM, signal.SIG_DFL)]
    try:
        monkeypatch.setattr("hfkdq.cli.compress.parse", ask)  # which imports Transformers for its options
        monkeypatch.setattr("hfkdq.cli.inspect.run", ask)
        for words in (["compress"], ["inspect", "model"]):
            with contextlib.suppress(SystemExit):
                assert main(words) == 128 + number
            assert capsys.readouterr().err.startswith(f"\nhfkdq {words[0]}: {told}")
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])


def test_a_checkpoint_of_the_hub_is_written_to_the_current_folder(tmp_path, monkeypatch):
    assert str(default_folder("me/model")) == "model-onnx"
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    assert default_folder(".") == tmp_path / "run-onnx"


@on_optimum
def test_optimum_has_the_command(checkpoint, tmp_path, monkeypatch, capsys):
    from optimum.commands.optimum_cli import main as optimum_main

    command = ["optimum-cli", "export", "hfkdq", str(checkpoint), str(tmp_path / "out"), *UNTIMED]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as first:
        optimum_main()
    assert first.value.code == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "out")
    assert report(tmp_path / "out")["kind"] == "float32"
    with pytest.raises(SystemExit) as second:
        optimum_main()
    assert second.value.code == 1
    assert "hfkdq export:" in capsys.readouterr().err


def test_the_folders_of_optimum_stay_open_to_others():
    root = Path(__file__).parents[1] / "packages" / "optimum-hfkdq" / "optimum"
    assert [path.name for path in root.rglob("*.py")] == ["register_hfkdq.py"]


def test_an_encoder_of_texts_is_exported_for_other_tools(tmp_path, capsys):
    tiny.bert().bert.save_pretrained(tmp_path / "encoder")
    tiny.tokenizer().save_pretrained(tmp_path / "encoder")
    wanted = ("--layout", "hub", "--pooling", "mean", "--normalize", "--quantization", "float16")
    assert export(tmp_path / "encoder", tmp_path / "out", *wanted) == 0
    assert report(tmp_path / "out")["pooling"] == {"modes": ["mean"], "normalize": True}
    assert [path.name for path in (tmp_path / "out" / "onnx").glob("*.onnx")] == ["model_fp16.onnx"]
    capsys.readouterr()
    # What it wrote says by itself how its embeddings are made, unless told otherwise.
    assert export(tmp_path / "out", tmp_path / "again", "--no-normalize") == 0
    assert report(tmp_path / "again")["pooling"] == {"modes": ["mean"], "normalize": False}
    with pytest.raises(SystemExit):
        export(tmp_path / "encoder", tmp_path / "x", "--pooling", "average")
    assert "invalid choice: 'average'" in capsys.readouterr().err


def test_several_precisions_are_written_in_one_call(checkpoint, tmp_path, capsys):
    several = ("--quantization", "float16", "--quantization", "float32")
    assert export(checkpoint, tmp_path / "x", *several) == 1
    assert (
        "--quantization float32 is one too many: several precisions in one folder need --layout hub"
        in capsys.readouterr().err
    )
    assert export(checkpoint, tmp_path / "x", *several, "--quantization", "float16", "--layout", "hub") == 1
    assert "--quantization float16 is given twice" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    assert export(checkpoint, tmp_path / "out", *several, "--layout", "hub", "--latency-rounds", "0") == 0
    facts = report(tmp_path / "out")
    assert (facts["kind"], list(facts["precisions"])) == ("float16", ["float16", "float32"])
    assert {path.name for path in (tmp_path / "out" / "onnx").glob("*.onnx")} == {"model.onnx", "model_fp16.onnx"}
