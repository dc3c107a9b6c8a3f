# SPDX-License-Identifier: Apache-2.0
"""Cached outputs reach the batch with the rows that they were made of, and with no others."""

from __future__ import annotations

import pytest
import torch
from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding

from hfkdq.caching import CachedCollator, CachedTeacher, cache_info
from tests import tiny
from tests.caching.common import KINDS, cached, padder


def of_class(tmp_path, teacher=None, rows=None):
    collator = KINDS["class"][2]()
    dataset = cached(teacher or tiny.bert(), rows or tiny.text_dataset(8), collator, tmp_path)
    return dataset, CachedCollator(collator, cache_info(dataset))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_recognised_in_any_order_and_company(kind, tmp_path):
    make, rows, collator = KINDS[kind]
    dataset = cached(make(), rows(), collator(), tmp_path)
    collate = CachedCollator(collator(), cache_info(dataset))
    for taken in ([0], [5, 2], [4, 3, 2, 1, 0]):
        batch = collate(dataset.__getitems__(taken))
        assert all(len(value) == len(taken) for value in batch.values())


def test_rows_without_outputs_are_left_to_the_wrapped_collator(tmp_path):
    dataset, collate = of_class(tmp_path)
    rows = tiny.text_dataset(3, seed=4)
    expected = DataCollatorWithPadding(padder())(list(rows))
    batch = collate(list(rows))
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], expected[name]) for name in batch)
    with pytest.raises(ValueError, match="1 of the 3 rows of a batch have no cached"):
        collate([dataset[0], rows[0], dataset[1]])


def test_the_rows_themselves_are_not_changed(tmp_path):
    dataset, collate = of_class(tmp_path)
    rows = dataset.__getitems__([0, 1])
    before = [dict(row) for row in rows]
    collate(rows)
    assert rows == before


def truncated(row):
    return {"input_ids": row["input_ids"][:-1], "attention_mask": row["attention_mask"][:-1]}


def replaced(row):
    return {"input_ids": [2, 7, *row["input_ids"][2:]]}


def test_rows_that_were_changed_since_are_refused(tmp_path):
    dataset, collate = of_class(tmp_path)
    row = dataset[1]
    n = len(row["input_ids"])
    with pytest.raises(ValueError, match=rf"Row 1 .* {n} positions then, {n - 1} now in input_ids.*tokenized"):
        collate([dataset[0], dataset.map(truncated)[1]])
    with pytest.raises(ValueError, match=r"Row 0 .* other values in input_ids"):
        collate([dataset.map(replaced)[1], dataset[0]])
    # Of what the teacher does not read all may change.
    collate([dataset.map(lambda row: {"labels": 0, "note": "x"}).remove_columns("note")[1]])


@pytest.mark.parametrize("kind", ["image", "ctc"])
def test_pixels_and_samples_that_were_changed_since_are_refused(kind, tmp_path):
    make, rows, collator = KINDS[kind]
    dataset = cached(make(), rows(), collator(), tmp_path)
    collate = CachedCollator(collator(), cache_info(dataset))
    name = cache_info(dataset).inputs[0]
    values = dataset[1][name]  # a tensor in the format of images
    row = {**dataset[1], name: values * 1.001 if isinstance(values, torch.Tensor) else [v * 1.001 for v in values]}
    with pytest.raises(ValueError, match=f"Row 1 .* other values in {name}"):
        collate([dataset[0], row])


def test_a_collator_that_changes_rows_is_refused(tmp_path):
    dataset, collate = of_class(tmp_path)

    def shifted(features):
        batch = DataCollatorWithPadding(padder())(features)
        return {**batch, "input_ids": batch["input_ids"].roll(1, 1)}

    with pytest.raises(ValueError, match="this collator changes rows"):
        CachedCollator(shifted, collate.info)([dataset[0], dataset[1]])


def test_a_swapped_pair_of_outputs_is_noticed(tmp_path):
    dataset, collate = of_class(tmp_path)
    cells = {name: dataset[1][name] for name in collate.info.columns}
    with pytest.raises(ValueError, match="not what the teacher saw"):
        collate([{**dataset[0], **cells}])


def test_a_wrong_number_of_positions_is_told(tmp_path):
    make, rows, collator = KINDS["tokens"]
    dataset = cached(make(), rows(), collator(), tmp_path)
    collate = CachedCollator(collator(), cache_info(dataset))
    row = dataset[0]
    n = len(row["input_ids"])
    with pytest.raises(ValueError, match=rf"teacher_logits is cached at \[{n - 1}\] positions .* which has \[{n}\]"):
        collate([{**row, "teacher_logits": row["teacher_logits"][:-6]}])


def test_a_missing_column_is_told_by_the_collator_or_the_teacher(tmp_path):
    dataset, collate = of_class(tmp_path)
    without = [{k: v for k, v in row.items() if k != "teacher_logits"} for row in dataset.__getitems__([0, 1])]
    with pytest.raises(ValueError, match="without teacher_logits"):
        collate(without)
    no_input = [{k: v for k, v in row.items() if k != "teacher_row_check"} for row in dataset.__getitems__([0, 1])]
    with pytest.raises(ValueError, match="batch has no 'teacher_logits'"):
        CachedTeacher(collate.info, "cpu")(collate(no_input), frozenset({"logits"}), {}, 1)


def test_an_input_that_is_gone_is_told(tmp_path):
    rows = tiny.text_dataset(8).map(lambda row: {"token_type_ids": [0, *[1] * (len(row["input_ids"]) - 1)]})
    dataset, collate = of_class(tmp_path, rows=rows)
    assert collate.info.inputs == ("input_ids", "token_type_ids")
    collate([dataset[0]])
    with pytest.raises(ValueError, match="read token_type_ids, which this batch lacks"):
        collate([dataset.remove_columns("token_type_ids")[0]])


def test_labels_are_inputs_of_a_decoder(tmp_path):
    make, rows, collator = KINDS["seq2seq"]
    dataset = cached(make(), rows(), collator(), tmp_path)
    collate = CachedCollator(collator(), cache_info(dataset))
    with pytest.raises(ValueError, match="other values in input_ids, labels"):
        collate([{**dataset[0], "labels": [9, *dataset[0]["labels"][1:]]}])


def test_a_collator_that_packs_rows_is_refused(tmp_path):
    def packed(features):
        return {"input_ids": torch.tensor([[token for f in features for token in f["input_ids"]]])}

    with pytest.raises(ValueError, match=r"made 1 rows of 4.*keeps rows apart"):
        cached(tiny.bert(), tiny.text_dataset(8).remove_columns("labels"), packed, tmp_path)
    dataset, collate = of_class(tmp_path / "good")
    with pytest.raises(ValueError, match="made 1 rows of 2"):
        CachedCollator(packed, collate.info)(dataset.__getitems__([0, 1]))


def test_workers_of_a_data_loader_collate_too(tmp_path):
    dataset, collate = of_class(tmp_path)
    own = collate(dataset.__getitems__([0, 1, 2, 3]))
    loader = torch.utils.data.DataLoader(dataset, batch_size=4, collate_fn=collate, num_workers=1)
    first = next(iter(loader))
    assert torch.equal(first["teacher_logits"], own["teacher_logits"])


def test_padding_by_another_side_places_the_same_values(tmp_path):
    make, rows, collator = KINDS["causal"]
    dataset = cached(make(), rows(), collator(), tmp_path)
    info = cache_info(dataset)
    right, left = (
        CachedCollator(DataCollatorForTokenClassification(padder(side)), info)(dataset.__getitems__([0, 3, 1]))
        for side in ("right", "left")
    )
    assert not torch.equal(right["attention_mask"], left["attention_mask"])
    values = [batch["teacher_logits"][batch["attention_mask"] == 1] for batch in (right, left)]
    assert torch.equal(*values)
