# SPDX-License-Identifier: Apache-2.0
"""Parts outlive a run that is killed, are shared by processes, and are refused where they are of something else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    ViTImageProcessor,
    Wav2Vec2FeatureExtractor,
)

from hfkdq.caching import cache_info, cache_teacher_outputs, writer
from hfkdq.caching.info import processor_fingerprint
from hfkdq.teachers import weights_fingerprint
from tests import tiny
from tests.caching.common import KINDS, cached, language_rows, padder
from tests.caching.runs import run
from tests.launch import accelerate_launch, python_path

SCRIPT = Path(__file__).parent / "runs.py"


def calls(log: Path) -> list[int]:
    return [int(line.split()[1]) for line in log.read_text().splitlines()]


def test_a_run_that_was_killed_goes_on_where_it_was(tmp_path):
    folder, log = tmp_path / "cache", tmp_path / "log"
    environment = {**os.environ, "PYTHONPATH": python_path()}
    command = [sys.executable, str(SCRIPT), str(folder), str(log), "6", str(tmp_path / "result")]
    killed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    done = sorted(path.name for path in folder.glob("part-*.arrow"))
    assert done == ["part-00000.arrow", "part-00001.arrow"]  # 8 rows of 22; the third part was begun
    assert len(list(folder.glob("*.tmp"))) == 1
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob("part-*.arrow")}
    log.unlink()
    dataset = run(folder, log)
    assert sum(calls(log)) == 22 - 8
    assert times == {name: (folder / name).stat().st_mtime_ns for name in done}
    assert not list(folder.glob("*.tmp"))
    log.unlink()
    assert run(folder, log)[:] == dataset[:]
    assert not log.exists()  # nothing is left to ask
    whole = run(tmp_path / "other", log)
    assert dataset[:] == whole[:]


@pytest.mark.one_line
def test_two_processes_make_the_dataset_of_one(tmp_path):
    told = accelerate_launch(SCRIPT, tmp_path / "two", tmp_path / "log", 0, tmp_path / "result")
    assert told.count("rows 22 shards 6") == 2
    lines = (tmp_path / "log").read_text().splitlines()
    by_process = {pid: sum(int(line.split()[1]) for line in lines if line.startswith(pid)) for pid in
                  {line.split()[0] for line in lines}}  # fmt: skip
    assert sorted(by_process.values()) == [10, 12]  # shards 1, 3 and 5, the last of 2 rows; shards 0, 2 and 4
    two, one = datasets.load_from_disk(tmp_path / "result"), run(tmp_path / "one", tmp_path / "log1")
    assert two[:] == one[:]
    assert cache_info(two) == cache_info(one)
    # What two processes left half done a single one finishes.
    (tmp_path / "two" / "part-00003.arrow").unlink()
    (tmp_path / "log").unlink()
    assert run(tmp_path / "two", tmp_path / "log")[:] == one[:]
    assert sum(calls(tmp_path / "log")) == 4


def make(folder, **changed):
    settings = dict(
        teacher=tiny.bert(), dataset=tiny.text_dataset(6), processing_class=padder(), folder=folder, hidden_states=[1]
    )
    return cache_teacher_outputs(**{**settings, **changed})


def nudged(model):
    """One weight out of all changed, and not one that a sample would see."""
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[7, 11] += 1e-3
    return model


def other_words():
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["w90"])
    return tokenizer


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda: {"teacher": nudged(tiny.bert())}, "teacher was 'BertForSequenceClassification .*' and is 'BertFor"),
        (lambda: {"teacher": tiny.bert(hidden_act="relu")}, "teacher was"),
        (lambda: {"teacher": tiny.bert().bfloat16()}, r"precision was 'float32.*' and is 'bfloat16"),
        (lambda: {"dataset": tiny.text_dataset(6, seed=1)}, r"for something else: dataset was '\w+' and is '\w+'\. "),
        (lambda: {"processing_class": other_words()}, r"else: processor was '\w+ \w+' and is '\w+ \w+'\. "),
        (
            lambda: {"data_collator": DataCollatorForTokenClassification(padder(), label_pad_token_id=0)},
            "else: collator was '.*DataCollatorWithPadding' and is '.*DataCollatorForTokenClassification'",
        ),
        (lambda: {"top_k": 2}, r"else: temperature was None and is 1\.0; top_k was None and is 2\. "),
        (lambda: {"hidden_states": [0, 1]}, r"else: hidden_states was \[1\] and is \[0, 1\]\. "),
        (lambda: {"dtype": "int8"}, "else: dtype was 'float16' and is 'int8'"),
    ],
    ids=["weight", "config", "precision", "data", "tokenizer", "collator", "top_k", "layers", "dtype"],
)
def test_a_stale_folder_is_refused_with_the_reason(change, told, tmp_path):
    make(tmp_path)
    changed = change()
    if isinstance(changed.get("data_collator"), DataCollatorForTokenClassification):
        changed["dataset"] = tiny.text_dataset(6)
        changed["data_collator"].torch_call = DataCollatorWithPadding(padder()).__call__
    with pytest.raises(ValueError, match=told) as refused:
        make(tmp_path, **changed)
    assert str(tmp_path) in str(refused.value)
    assert "Give another folder" in str(refused.value)
    make(tmp_path)  # what is there was not touched


def test_another_release_is_refused(tmp_path, monkeypatch):
    make(tmp_path)
    monkeypatch.setattr(writer, "FORMAT_VERSION", 0)
    monkeypatch.setattr("hfkdq.caching.info.FORMAT_VERSION", 0)
    with pytest.raises(ValueError, match="version was 1 and is 0"):
        make(tmp_path)


def test_temperature_matters_where_the_likeliest_classes_are_kept(tmp_path):
    make(tmp_path / "all", temperature=1.0)
    make(tmp_path / "all", temperature=3.0)  # logits have none
    make(tmp_path / "top", top_k=2, temperature=1.0)
    with pytest.raises(ValueError, match=r"temperature was 1\.0 and is 3\.0"):
        make(tmp_path / "top", top_k=2, temperature=3.0)


def test_without_a_folder_each_key_has_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    make(None)
    make(None)
    make(None, dtype="int8")
    made = sorted((tmp_path / "hfkdq").iterdir())
    assert len(made) == 2
    assert {json.loads((p / "cache.json").read_text())["key"]["dtype"] for p in made} == {"float16", "int8"}


def test_fingerprints_tell_contents_from_how_they_were_used():
    assert weights_fingerprint(tiny.bert()) == weights_fingerprint(tiny.bert().train())
    assert weights_fingerprint(nudged(tiny.bert())) != weights_fingerprint(tiny.bert())
    used = tiny.tokenizer()
    used(["w1", "w2 w3"], padding=True, truncation=True, max_length=4)
    assert (
        processor_fingerprint(used) == processor_fingerprint(tiny.tokenizer()) != processor_fingerprint(other_words())
    )
    for one, other in (
        (ViTImageProcessor(), ViTImageProcessor(size={"height": 8, "width": 8})),
        (Wav2Vec2FeatureExtractor(), Wav2Vec2FeatureExtractor(do_normalize=False)),
    ):
        assert processor_fingerprint(one) == processor_fingerprint(type(one)()) != processor_fingerprint(other)
    assert processor_fingerprint(None) is None


def test_outputs_that_are_no_numbers_are_refused_by_row(tmp_path):
    teacher, rows = tiny.bert(), tiny.text_dataset(20)
    word = rows[7]["input_ids"][1]
    with torch.no_grad():
        teacher.bert.embeddings.word_embeddings.weight[word] = float("nan")
    bad = [i for i, ids in enumerate(rows["input_ids"]) if word in ids]
    assert 0 < len(bad) < 5
    with pytest.raises(ValueError, match=f"teacher_logits is NaN or infinite for rows {bad[0]}"):
        make(tmp_path, teacher=teacher, dataset=rows)
    assert not list(tmp_path.glob("part-*"))
    assert not list(tmp_path.glob("*.tmp"))
    make(tmp_path / "good", teacher=teacher, dataset=rows.select([i for i in range(20) if i not in bad]))


def test_values_beyond_float16_are_refused_and_int8_takes_them(tmp_path):
    teacher = tiny.bert()
    with torch.no_grad():
        teacher.classifier.bias[0] = 1e6
    with pytest.raises(ValueError, match=r"teacher_logits of row 0 has values up to 1e\+06.*dtype='int8'"):
        make(tmp_path, teacher=teacher)
    make(tmp_path / "int8", teacher=teacher, dtype="int8")


def test_a_collator_that_draws_at_random_is_refused(tmp_path):
    masking = DataCollatorForLanguageModeling(tiny.tokenizer(), mlm_probability=0.15)
    rows = tiny.text_dataset(8).remove_columns("labels")
    with pytest.raises(ValueError, match="DataCollatorForLanguageModeling draws at random"):
        cached(tiny.bert_mlm(), rows, masking, tmp_path)

    def noisy(features):
        batch = DataCollatorWithPadding(padder())(features)
        batch["input_ids"] = torch.where(torch.rand(batch["input_ids"].shape) < 0.5, 5, batch["input_ids"])
        return batch

    teacher, state = tiny.bert(), torch.get_rng_state()
    with pytest.raises(ValueError, match="function draws at random"):
        cached(teacher, rows, noisy, tmp_path)
    assert torch.equal(state, torch.get_rng_state())
    cached(tiny.llama(), rows, DataCollatorForLanguageModeling(tiny.tokenizer(), mlm=False), tmp_path / "clm")


def test_padding_that_nothing_tells_of_is_refused(tmp_path):
    def blind(features):
        batch = DataCollatorForTokenClassification(padder())(features)
        del batch["attention_mask"]
        return batch

    with pytest.raises(ValueError, match="no attention_mask tells where"):
        cached(tiny.llama(), language_rows(), blind, tmp_path)
    cached(tiny.bert(), tiny.text_dataset(6), lambda f: blind([{**r, "labels": [0]} for r in f]), tmp_path / "class")


@pytest.mark.parametrize(
    ("changed", "error", "told"),
    [
        ({"dataset": tiny.text_dataset(4).to_iterable_dataset()}, TypeError, "IterableDataset"),
        ({"dataset": datasets.DatasetDict(train=tiny.text_dataset(4))}, TypeError, "one split at a time"),
        ({"dataset": tiny.text_dataset(4).select([])}, ValueError, "no rows"),
        ({"dataset": datasets.Dataset.from_dict({"text": ["w1"]})}, ValueError, "Tokenize the dataset first"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"top_k": 0}, ValueError, "top_k must be 'auto', None or a positive"),
        ({"top_k": 3}, ValueError, "top_k=3 of 3 classes leaves none out"),
        ({"temperature": 0.0}, ValueError, "temperature must be larger than 0"),
        ({"dtype": "float32"}, ValueError, "dtype must be 'float16' or 'int8', got 'float32'"),
        ({"hidden_states": [3]}, ValueError, r"hidden_states=\[3\].*has 0 to 2"),
        ({"teacher": tiny.bert(labels=1), "top_k": 2}, ValueError, "likeliest of classes that exclude one another"),
    ],
)
def test_what_cannot_be_cached_is_refused(changed, error, told, tmp_path):
    with pytest.raises(error, match=told):
        make(tmp_path / "none", **changed)
    assert not (tmp_path / "none").exists()


def test_a_collator_that_tokenizes_gets_all_columns_on_request(tmp_path):
    rows = datasets.Dataset.from_dict({"text": ["w1 w2 w3", "w4", "w5 w6"]})

    def tokenize(features):
        return dict(padder()([f["text"] for f in features], padding=True, return_tensors="pt"))

    dataset = cached(tiny.bert(), rows, tokenize, tmp_path, remove_unused_columns=False)
    assert dataset.column_names == ["text", "teacher_logits", "teacher_row_check"]


def test_the_progress_bar_starts_at_what_is_done(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("hfkdq.bars.bars_are_seen", lambda: True)  # as on a terminal
    monkeypatch.setattr(writer, "SHARD_ROWS", 2)
    make(tmp_path)
    (tmp_path / "part-00001.arrow").unlink()
    capsys.readouterr()
    make(tmp_path)
    shown = capsys.readouterr().err
    assert "4/6" in shown
    assert "6/6" in shown
    assert "0/6" not in shown


def test_shuffled_rows_keep_their_own_outputs(tmp_path):
    collator = KINDS["class"][2]()
    plain = cached(tiny.bert(), tiny.text_dataset(10), collator, tmp_path / "plain")
    shuffled = cached(tiny.bert(), tiny.text_dataset(10).shuffle(seed=3), collator, tmp_path / "shuffled")
    expected = {tuple(row["input_ids"]): row["teacher_logits"] for row in plain}
    for row in shuffled:
        assert row["teacher_logits"] == pytest.approx(expected[tuple(row["input_ids"])], rel=1e-3, abs=1e-3)
