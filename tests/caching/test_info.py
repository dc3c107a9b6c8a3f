# SPDX-License-Identifier: Apache-2.0
"""What is known of cached outputs goes where the dataset goes, or its absence is told."""

from __future__ import annotations

import pickle

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorWithPadding

from hfkdq.caching import CachedCollator, CachedOutput, CachedTeacher, CacheInfo, cache_info
from hfkdq.caching.shards import decode, encode, quantize
from tests import tiny
from tests.caching.common import KINDS, cached, padder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    teacher = tiny.bert(id2label={0: "a} --> b", 1: "ü", 2: "c"}, label2id={"a} --> b": 0, "ü": 1, "c": 2})
    rows = tiny.text_dataset(12)
    rows.info.description = "Rows of words."
    return cached(teacher, rows, KINDS["class"][2](), tmp_path_factory.mktemp("cache"), hidden_states=[1])


def written_and_read(dataset, folder):
    dataset.save_to_disk(folder)
    return datasets.load_from_disk(folder)


WAYS = {
    "itself": lambda d, folder: d,
    "select": lambda d, folder: d.select([3, 1]),
    "shuffle": lambda d, folder: d.shuffle(seed=0),
    "filter": lambda d, folder: d.filter(lambda row: row["labels"] > 0),
    "train": lambda d, folder: d.train_test_split(0.3, seed=0)["train"],
    "test": lambda d, folder: d.train_test_split(0.3, seed=0)["test"],
    "map": lambda d, folder: d.map(lambda row: {"length": len(row["input_ids"])}),
    "batched map": lambda d, folder: d.map(lambda rows: {"one": [1] * len(rows["labels"])}, batched=True),
    "add_column": lambda d, folder: d.add_column("one", [1] * len(d)),
    "concatenate": lambda d, folder: datasets.concatenate_datasets([d.select([0]), d.select([5, 6])]),
    "disk": written_and_read,
    "disk of a split": lambda d, folder: written_and_read(d.train_test_split(0.3, seed=0)["train"], folder),
    "pickle": lambda d, folder: pickle.loads(pickle.dumps(d)),
    "torch": lambda d, folder: d.with_format("torch"),
}


@pytest.mark.parametrize("way", WAYS)
def test_it_travels_with_the_dataset(way, dataset, tmp_path):
    moved = WAYS[way](dataset, tmp_path)
    info = cache_info(moved)
    assert info == cache_info(dataset)
    assert info.columns == ("teacher_logits", "teacher_hidden_state_1", "teacher_row_check")
    rows = list(moved)[:2]
    collator = CachedCollator(DataCollatorWithPadding(padder()), info)
    rows = [{k: v for k, v in row.items() if k in ("input_ids", "attention_mask", *info.columns)} for row in rows]
    batch = collator(rows)  # which compares each row with its check
    assert batch["teacher_hidden_state_1"].shape == (*batch["input_ids"].shape, 32)


def test_it_says_what_was_cached_and_of_what(dataset):
    info = cache_info(dataset)
    assert dataset.info.description.startswith("Rows of words.\n")
    assert info.outputs == (
        CachedOutput("logits", None, (), "float16"),
        CachedOutput("hidden_state_1", "attended", (32,), "float16"),
    )
    assert (info.layers, info.inputs, info.key["rows"]) == ((1,), ("input_ids",), 12)
    outline = CachedTeacher(info, "cpu").outline
    assert outline.model_class == "BertForSequenceClassification"
    assert outline.config.id2label == {0: "a} --> b", 1: "ü", 2: "c"}
    assert outline.shape("logits") == (1, 3)
    assert outline.states() == ((1, 4, 32),) * 3
    assert CacheInfo.from_json(info.to_json()) == info


def test_a_dataset_without_outputs_has_no_info(dataset):
    assert cache_info(tiny.text_dataset()) is None
    assert cache_info(dataset.remove_columns(cache_info(dataset).columns)) is None
    assert cache_info([1, 2]) is None
    assert cache_info(None) is None


def test_lost_metadata_is_told(dataset, tmp_path):
    dataset.to_parquet(tmp_path / "rows.parquet")
    read = Dataset.from_parquet(str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path))
    assert "teacher_logits" in read.column_names
    for lost in (read, dataset.to_iterable_dataset()):
        with pytest.raises(ValueError, match=r"lost: it is kept in dataset\.info\.description"):
            cache_info(lost)
        lost.info.description = dataset.info.description
        assert cache_info(lost) == cache_info(dataset)


def test_missing_columns_are_told(dataset):
    with pytest.raises(ValueError, match="columns teacher_logits were removed or renamed"):
        cache_info(dataset.rename_column("teacher_logits", "old_logits"))


def test_outputs_of_two_teachers_in_one_dataset_are_told(dataset, tmp_path):
    collator, rows = KINDS["class"][2](), tiny.text_dataset(6, seed=5)
    teacher = tiny.bert(id2label={0: "a} --> b", 1: "ü", 2: "c"}, label2id={"a} --> b": 0, "ü": 1, "c": 2})
    same = cached(teacher, rows, collator, tmp_path / "same", hidden_states=[1])
    assert cache_info(datasets.concatenate_datasets([dataset, same])).key["teacher"] == cache_info(same).key["teacher"]
    other = cached(tiny.bert(7), rows, collator, tmp_path / "other", hidden_states=[1])
    with pytest.raises(ValueError, match="cached in different ways: teacher 'BertFor"):
        cache_info(datasets.concatenate_datasets([dataset, other]))


def test_cached_twice_is_refused_until_the_columns_are_removed(dataset, tmp_path):
    collator = KINDS["class"][2]()
    with pytest.raises(ValueError, match="holds cached teacher outputs already"):
        cached(tiny.bert(), dataset, collator, tmp_path)
    bare = dataset.remove_columns(cache_info(dataset).columns)
    again = cached(tiny.bert(3), bare, collator, tmp_path)
    assert again.info.description.count("hfkdq-cache") == 1
    assert cache_info(again).key["teacher"] != cache_info(dataset).key["teacher"]


def test_the_format_and_the_transform_of_a_dataset_stay(tmp_path):
    collator = KINDS["class"][2]()
    formatted = cached(tiny.bert(), tiny.text_dataset(6).with_format("torch"), collator, tmp_path / "a")
    assert isinstance(formatted[0]["input_ids"], torch.Tensor)
    assert isinstance(formatted[0]["teacher_logits"], torch.Tensor)

    def doubled(rows):
        return {"input_ids": [[*ids, *ids] for ids in rows["input_ids"]], "labels": rows["labels"]}

    rows = tiny.text_dataset(6)
    transformed = cached(tiny.bert(), rows.with_transform(doubled), collator, tmp_path / "b")
    assert transformed[1]["input_ids"] == rows[1]["input_ids"] * 2
    info = cache_info(transformed)
    assert set(info.columns) <= transformed[1].keys()
    CachedCollator(collator, info)([transformed[0], transformed[1]])


def test_a_format_that_cuts_bytes_is_told(tmp_path):
    output = CachedOutput("hidden_state_1", "attended", (3,), "float16")
    cell = encode(output, np.array([[1, 2, 3], [1, 0, 0]], dtype=np.float32))
    row = {output.column: np.array([cell[output.column]])[0]}
    with pytest.raises(ValueError, match=r"no multiple of 3.*numpy format|numpy format"):
        decode(output, row)


@pytest.mark.parametrize("shape", [(), (5,), (3, 4)])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_codes_are_near_what_they_stand_for(dtype, shape):
    values = np.random.default_rng(0).normal(size=(7, *shape)).astype(np.float32) * 20
    output = CachedOutput("x", None, shape, dtype)
    got = decode(output, encode(output, values))
    assert got.shape == values.shape
    bound = (
        np.abs(values) * 2**-11 if dtype == "float16" else (values.max(-1) - values.min(-1))[..., None] / 510 + 1e-5
    )
    assert (np.abs(got.astype(np.float32) - values) <= bound).all()


def test_equal_values_and_empty_rows_survive_int8():
    codes, scale, minimum = quantize(np.full((2, 3), 7.5, dtype=np.float32))
    assert (codes == 0).all()
    assert (scale == 0).all()
    assert (minimum == 7.5).all()
    output = CachedOutput("x", "attended", (4,), "int8")
    assert decode(output, encode(output, np.zeros((0, 4), dtype=np.float32))).shape == (0, 4)
