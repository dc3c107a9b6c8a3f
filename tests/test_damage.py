# SPDX-License-Identifier: Apache-2.0
"""Damaged files and names of nothing get one line that names them, in Python and on the command line, and nothing is lost."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file

from hfkdq import DistillationTrainer, LogitKD, QuantizationSpec, load_pruned, load_quantized, quantize
from hfkdq.cli import main
from hfkdq.cli.data import load_rows
from hfkdq.files import looks_local
from tests import tiny


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "checkpoint"
    model = tiny.bert()
    quantize(model, QuantizationSpec(), [tiny.batch(model)])
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "checkpoint")


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def cut(path, share=0.5):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def without(folder, key):
    weights = load_file(folder / "model.safetensors")
    del weights[key]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def reshaped(folder):
    weights = load_file(folder / "model.safetensors")
    weights["classifier.weight"] = torch.zeros(5, 32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def sharded(folder, edit):
    model = load_quantized(str(folder))
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    edit(folder)


# What is damaged, and what the line names.
DAMAGE = {
    "weights cut in the middle": (lambda f: cut(f / "model.safetensors"), "model.safetensors is damaged"),
    "weights cut at the end": (lambda f: cut(f / "model.safetensors", 0.99), "model.safetensors is damaged"),
    "weights cut in the header": (lambda f: cut(f / "model.safetensors", 0.01), "model.safetensors is damaged"),
    "empty weights": (lambda f: cut(f / "model.safetensors", 0), "model.safetensors is damaged"),
    "weights that are text": (lambda f: (f / "model.safetensors").write_text("<html>404"), "model.safetensors is damaged"),
    "a weight missing": (lambda f: without(f, "classifier.weight"), "lacks 1 of the weights .* classifier.weight"),
    "a weight of another shape": (reshaped, "classifier.weight|size mismatch"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "safetensors"),
    "pickles alone": (
        lambda f: [(f / "model.safetensors").unlink(), (f / "pytorch_model.bin").write_bytes(b"x")], "pytorch_model.bin alone",
    ),
    "a shard missing": (
        lambda f: sharded(f, lambda g: next(iter(sorted(g.glob("model-*.safetensors")))).unlink()), "lacks model-00001",
    ),
    "a shard cut": (lambda f: sharded(f, lambda g: cut(next(iter(g.glob("model-*.safetensors"))))), "model-0.* is damaged"),
    "an index cut": (lambda f: sharded(f, lambda g: cut(g / "model.safetensors.index.json")), "index.json is damaged"),
    "an index of nothing": (
        lambda f: sharded(f, lambda g: (g / "model.safetensors.index.json").write_text("{}")), "index.json is damaged",
    ),
    "a configuration cut": (lambda f: cut(f / "config.json"), "config.json is damaged"),
    "an empty configuration": (lambda f: cut(f / "config.json", 0), "config.json is damaged"),
    "a configuration that is a list": (lambda f: (f / "config.json").write_text("[1]"), "config.json is damaged"),
    "a configuration in UTF-16": (
        lambda f: (f / "config.json").write_bytes((f / "config.json").read_text().encode("utf-16")), "config.json is damaged",
    ),
    "no configuration": (lambda f: (f / "config.json").unlink(), "has no config.json, .* Name a folder of save_pretrained"),
    "an adapter": (
        lambda f: (f / "config.json").rename(f / "adapter_config.json"), "no config.json, .* an adapter .*merge_and_unload",
    ),
    "the folder above": (
        lambda f: [(f / "checkpoint-7").mkdir(), (f / "config.json").rename(f / "checkpoint-7" / "config.json")],
        "no config.json, .* It holds checkpoint-7: name one",
    ),
    "a class that is none": (lambda f: edited(f, architectures=["os"]), "architecture"),
    "a class that is a function": (lambda f: edited(f, architectures=["pipeline"]), "architecture"),
    "a class that is a number": (lambda f: edited(f, architectures=[3]), "architecture"),
    "a family there is not": (lambda f: edited(f, model_type="nothing"), "nothing"),
    "code of its own": (
        lambda f: edited(f, model_type="own", auto_map={"AutoConfig": "code.Own"}), "trust_remote_code|own",
    ),
}  # fmt: skip


def edited(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_named(name, checkpoint):
    damage, told = DAMAGE[name]
    damage(checkpoint)
    for load in (load_quantized, load_pruned):
        with pytest.raises((ValueError, OSError), match=told):
            load(str(checkpoint))


@pytest.mark.parametrize("name", DAMAGE)
def test_the_command_says_so_and_writes_nothing(name, checkpoint, capsys):
    DAMAGE[name][0](checkpoint)
    capsys.readouterr()
    before = names(checkpoint.parent)
    assert main(["export", str(checkpoint), "--latency-rounds", "0"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("hfkdq export: ")
    assert "Traceback" not in said
    assert names(checkpoint.parent) == before


TOKENIZERS = {
    "cut": lambda f: cut(f / "tokenizer.json"),
    "not JSON": lambda f: (f / "tokenizer.json").write_text("{"),
    "another object": lambda f: (f / "tokenizer.json").write_text('{"model": {"type": "Nothing"}}'),
    "settings cut": lambda f: cut(f / "tokenizer_config.json"),
    "no tokenizer.json": lambda f: (f / "tokenizer.json").unlink(),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_damaged_tokenizer_is_not_passed_by(name, checkpoint, capsys):
    TOKENIZERS[name](checkpoint)
    assert main(["export", str(checkpoint), "--latency-rounds", "0"]) == 1
    said = capsys.readouterr().err
    assert "tokenizer" in said
    assert said.count("\n") == 1
    assert names(checkpoint.parent) == sorted({"checkpoint", *(f"checkpoint/{each}" for each in names(checkpoint))})


@pytest.mark.parametrize(("options", "told"), [
    (["./nothing"], "There is no file or folder ./nothing"),
    (["/nowhere/at/all"], "There is no file or folder /nowhere/at/all"),
    (["{}/nothing"], "There is no file or folder .*nothing"),
    (["{}/checkpoint/config.json"], "is a file"),
    (["{}/checkpoint", "{}/checkpoint"], "exists"),
    (["{}/checkpoint", "{}/checkpoint/config.json/out"], "is a file"),
    (["{}/checkpoint", "--tolerance", "nan"], "--tolerance must be a positive number"),
    (["{}/checkpoint", "--tolerance", "-1"], "--tolerance must be a positive number"),
    (["{}/checkpoint", "--eval-data", "{}/rows.csv", "--max-drop", "nan"], "--max-drop must be 0 or"),
    (["{}/checkpoint", "--eval-data", "{}/rows.csv", "--max-drop", "inf"], "--max-drop must be 0 or"),
    (["{}/checkpoint", "--threads", "0"], "--threads must be 1 or more"),
    (["{}/checkpoint", "--latency-rounds", "-1"], "--latency-rounds must be 0 or more"),
    (["{}/checkpoint", "--max-length", "0"], "--max-length must be 1 or more"),
    (["{}/checkpoint", "--eval-data", "{}/nothing.csv"], "There is no file or folder"),
    (["{}/checkpoint", "--eval-data", "nothing.parquet"], "There is no file or folder nothing.parquet"),
    (["{}/checkpoint", "--calibration-data", "{}/empty.csv"], "empty.csv is empty"),
    (["{}/checkpoint", "--calibration-data", "{}/folder"], "The folder .* is empty"),
    (["{}/checkpoint", "--calibration-data", "a:b:c:d"], "Cannot read"),
])  # fmt: skip
def test_what_is_wrong_is_told_before_anything_heavy_is_imported(options, told, checkpoint, tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\nw1,0\n")
    (tmp_path / "empty.csv").touch()
    (tmp_path / "folder").mkdir()
    before = names(tmp_path)
    code = (
        "import sys; from hfkdq.cli import main; code = main(sys.argv[1:]); "
        "assert not {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "export", *(option.format(tmp_path) for option in options)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("\n") == 1
    assert re.search(told, done.stderr), done.stderr
    assert names(tmp_path) == before


@pytest.fixture
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.usefixtures("_own_cache")
@pytest.mark.parametrize("name", ["a[1].csv", "a*.csv", "a?.csv", "a{b,c}.csv", "folder[2]/rows.csv", "plain.csv"])
def test_a_file_is_a_file_whatever_it_is_called(name, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("text,label\nw1,0\nw2,1\n")
    (tmp_path / "a1.csv").write_text("other\n1\n")
    rows, described = load_rows(str(path), ("train",), None)
    assert rows["text"][:] == ["w1", "w2"]
    assert name in described


DATA = {
    "rows.csv": b'a,b\n"1,2\n3,4,5,6\n',
    "rows.json": b'[{"a": 1}, {"a": ',
    "rows.jsonl": b"not json\n",
    "rows.parquet": b"PAR1 cut off",
    "rows.arrow": b"ARROW1 cut off",
    "binary.csv": bytes(range(256)),
    "empty.csv": b"",
    "header.csv": b"text,label\n",
}


@pytest.mark.usefixtures("_own_cache")
@pytest.mark.parametrize("name", DATA)
def test_damaged_data_are_named(name, checkpoint, tmp_path, capsys):
    (tmp_path / name).write_bytes(DATA[name])
    assert main(["export", str(checkpoint), "--calibration-data", str(tmp_path / name), "--latency-rounds", "0"]) == 1
    said = capsys.readouterr().err
    assert name in said
    assert "Traceback" not in said
    assert not (tmp_path / "checkpoint-onnx").exists()


def test_names_of_the_hub_and_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "broken").symlink_to("nowhere")
    local = ["broken", "./a", "../a", "/a/b", "~/a", "a/b/c", "out", "out/checkpoint-5", "a/", "a\\b"]
    assert [name for name in local if not looks_local(name)] == []
    assert [name for name in ("bert-base-uncased", "me/model", "squad") if looks_local(name)] == []


def test_an_interrupted_export_says_that_nothing_was_written(checkpoint, tmp_path, capsys, monkeypatch):
    import hfkdq.export

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(hfkdq.export, "export_onnx", interrupted)
    assert main(["export", str(checkpoint), str(tmp_path / "onnx")]) == 130
    assert "interrupted. Nothing was written; the same command begins again." in capsys.readouterr().err
    assert not (tmp_path / "onnx").exists()


def test_a_teacher_with_too_few_token_ids_is_told_before_training(training_arguments, caplog):
    student, rows = tiny.bert(), tiny.text_dataset()
    teacher = tiny.bert(1, vocab_size=60)
    largest = max(max(ids) for ids in rows["input_ids"])
    assert largest >= 60
    settings = dict(
        model=student, args=training_arguments(max_steps=1), objectives=[LogitKD()], processing_class=tiny.tokenizer()
    )
    with pytest.raises(ValueError, match=rf"has 60 token ids, and input_ids of the data set goes up to {largest}"):
        DistillationTrainer(**settings, teacher_model=teacher, train_dataset=rows)
    few = rows.filter(lambda row: max(row["input_ids"]) < 60)
    assert len(few)
    DistillationTrainer(
        **settings, teacher_model=teacher, train_dataset=few
    ).train()  # a padded vocabulary may be larger
    DistillationTrainer(**settings, teacher_model=teacher, train_dataset=few.with_transform(lambda batch: batch))
    own = rows.add_column("teacher_input_ids", [[1, 2]] * len(rows))
    DistillationTrainer(**settings, teacher_model=teacher, train_dataset=own)


def test_the_advice_about_pickles_works(checkpoint):
    from transformers import BertForSequenceClassification

    model = load_quantized(str(checkpoint))
    torch.save(model.state_dict(), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(OSError, match="pickle"):
        load_quantized(str(checkpoint))
    BertForSequenceClassification.from_pretrained(checkpoint).save_pretrained(checkpoint)
    load_quantized(str(checkpoint))
    assert os.path.exists(checkpoint / "model.safetensors")
