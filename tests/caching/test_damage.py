# SPDX-License-Identifier: Apache-2.0
"""Damaged shards of a cache are named, the advice works, and nothing goes that the cache did not write."""

from __future__ import annotations

import uuid

import pyarrow as pa
import pytest

from hfkdq.caching import cache_info, cache_teacher_outputs, writer
from hfkdq.caching.info import CacheInfo
from tests import tiny
from tests.caching.common import padder


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "SHARD_ROWS", 2)
    make(tmp_path / "cache")
    return tmp_path / "cache"


def make(folder):
    return cache_teacher_outputs(tiny.bert(), tiny.text_dataset(6), processing_class=padder(), folder=folder)


def with_rows(path, rows):
    with pa.ipc.open_stream(path.read_bytes()) as reader:
        table = reader.read_all().slice(0, rows)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)


def without_column(path):
    with pa.ipc.open_stream(path.read_bytes()) as reader:
        table = reader.read_all().drop_columns(["teacher_logits"])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)


def cut(path, share):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


PARTS = {
    "cut in the middle": lambda path: cut(path, 0.5),
    "cut at the end": lambda path: cut(path, 0.9),
    "empty": lambda path: cut(path, 0),
    "another file": lambda path: path.write_bytes(b"<html>not found</html>"),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a row less": lambda path: with_rows(path, 1),
    "a column less": without_column,
}


@pytest.mark.parametrize("name", PARTS)
def test_a_damaged_part_is_named_and_computed_anew_once_it_is_deleted(name, folder):
    whole = make(folder)[:]
    part = folder / "part-00001.arrow"
    PARTS[name](part)
    with pytest.raises(ValueError, match=r"part-00001\.arrow is damaged.*Delete it, and the same call") as refused:
        make(folder)
    assert "\n" not in str(refused.value)
    part.unlink()
    assert make(folder)[:] == whole


RECORDS = {
    "cut": lambda path: cut(path, 0.5),
    "empty": lambda path: cut(path, 0),
    "a list": lambda path: path.write_text("[]"),
    "no key": lambda path: path.write_text("{}"),
    "a key that is a text": lambda path: path.write_text('{"key": "x"}'),
    "nested without end": lambda path: path.write_text("[" * 100_000),
    "other bytes": lambda path: path.write_bytes(bytes(range(256))),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_damaged_record_is_named(name, folder):
    RECORDS[name](folder / "cache.json")
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(ValueError, match=r"cache\.json is damaged.*Give another folder, or delete") as refused:
        make(folder)
    assert "\n" not in str(refused.value)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_parts_of_nobody_knows_what_are_not_taken(folder):
    (folder / "cache.json").unlink()
    with pytest.raises(ValueError, match=r"holds shards of teacher outputs and no cache\.json"):
        make(folder)


def test_only_its_own_unfinished_parts_go(tmp_path):
    own = [f".part-00000.arrow.{uuid.uuid4().hex}.tmp", f".cache.json.{uuid.uuid4().hex}.tmp"]
    others = ["notes.tmp", "part-00000.arrow.tmp", ".part-00000.arrow.0.tmp", "part.arrow", f"{uuid.uuid4().hex}.tmp"]
    for name in (*own, *others):
        (tmp_path / name).write_text("something")
    make(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {*others, "cache.json", "part-00000.arrow"}


def test_an_interruption_says_what_is_kept(folder, monkeypatch, tmp_path, caplog):
    from transformers.utils import logging

    calls, encode = [], writer.encode

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode(*args)

    monkeypatch.setattr(writer, "encode", interrupted)
    before = logging.get_verbosity()
    logging.set_verbosity_warning()
    logging.enable_propagation()
    try:
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "other")
    finally:
        logging.set_verbosity(before)
        logging.disable_propagation()
    assert "Interrupted: 1 of 3 shards are kept in" in caplog.text
    monkeypatch.setattr(writer, "encode", encode)
    assert make(tmp_path / "other")[:] == make(folder)[:]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"key": {}}', '{"key": {"version": 1}}', '{"key": {"version": 1}, "outputs": [1]}',
                                  '{"key": {"version": [1]}}', '{"key": {"version": 1}, "outputs": [], "inputs": 3, "teacher": {}}'])  # fmt: skip
def test_a_damaged_description_is_refused(text, folder):
    dataset = make(folder)
    with pytest.raises(ValueError, match=r"damaged|cached in format"):
        CacheInfo.from_json(text)
    dataset.info.description = f"<!-- hfkdq-cache {text} -->"
    if text.startswith("{") and text.endswith("}"):
        with pytest.raises(ValueError, match=r"damaged|cached in format"):
            cache_info(dataset)
