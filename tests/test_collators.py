# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

from hfkdq.collators import TeacherCollator

from . import tiny


def collator():
    theirs = tiny.tokenizer()
    theirs.padding_side = "left"
    theirs.pad_token = "[MASK]"
    return TeacherCollator(DataCollatorWithPadding(tiny.tokenizer()), DataCollatorForSeq2Seq(theirs))


def row(length, other, **columns):
    own = {"input_ids": [5] * length, "attention_mask": [1] * length, "label": length % 3}
    ids = [6] * other
    return {**own, "teacher_input_ids": ids, "teacher_attention_mask": [1] * other, "teacher_labels": ids, **columns}


def test_each_kind_of_columns_is_collated_by_its_own_collator():
    batch = collator()([row(2, 3), row(3, 1)])
    expected = {
        "input_ids": [[5, 5, 0], [5, 5, 5]],
        "attention_mask": [[1, 1, 0], [1, 1, 1]],
        "labels": [2, 0],
        "teacher_input_ids": [[6, 6, 6], [4, 4, 6]],
        "teacher_attention_mask": [[1, 1, 1], [0, 0, 1]],
        "teacher_labels": [[6, 6, 6], [-100, -100, 6]],
    }
    assert {name: value.tolist() for name, value in batch.items()} == expected


def test_rows_without_columns_of_a_teacher_are_left_to_the_first():
    rows = [{k: v for k, v in row(n, 2).items() if not k.startswith("teacher_")} for n in (2, 3)]
    both, alone = collator()(rows), DataCollatorWithPadding(tiny.tokenizer())(rows)
    assert both.keys() == alone.keys()
    assert all(torch.equal(both[name], alone[name]) for name in alone)


def test_rows_of_which_some_lack_columns_of_the_teacher_are_refused():
    with pytest.raises(ValueError, match="1 of the 2 rows of a batch have no columns that begin with 'teacher_'"):
        collator()([row(2, 3), {"input_ids": [5], "attention_mask": [1], "label": 1}])


def test_rows_are_left_as_they_are():
    rows = [row(2, 3), row(3, 1)]
    kept = [dict(r) for r in rows]
    collator()(rows)
    assert rows == kept
