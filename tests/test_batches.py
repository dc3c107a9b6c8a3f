# SPDX-License-Identifier: Apache-2.0
"""Batches of a user's data: what quantization, pruning and export make of data sets of every form."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorWithPadding, YolosImageProcessor

from hfkdq.modeling.batches import make_batches, on_device

from . import tiny


def raw() -> Dataset:
    """Texts that are not tokenized yet."""
    return Dataset.from_dict({"words": [[5, 6, 7], [8, 9], [4]], "label": [0, 1, 0]})


def tokens(words):
    return {"input_ids": [list(ids) for ids in words], "attention_mask": [[1] * len(ids) for ids in words]}


def tokenized() -> Dataset:
    return raw().map(lambda rows: tokens(rows["words"]), batched=True)


class FromWords:
    """A collator that makes inputs of a column which no model takes."""

    def __call__(self, rows):
        return tiny.tokenizer().pad(tokens([row["words"] for row in rows]), return_tensors="pt")


@pytest.mark.parametrize(
    ("data", "collator"),
    [
        (tokenized, None),
        (tokenized, DataCollatorWithPadding(tiny.tokenizer())),  # it cannot pad the column of words
        (lambda: tokenized().to_iterable_dataset(), None),
        (lambda: raw().with_transform(lambda rows: tokens(rows["words"])), None),
        (raw, FromWords()),
    ],
    ids=["columns", "collator", "iterable", "transform", "collator that makes inputs"],
)
@pytest.mark.parametrize("labels", [True, False])
def test_a_data_set_of_any_form_makes_batches_and_makes_them_again(data, collator, labels):
    model = tiny.bert()
    batches = make_batches(model, data(), 2, collator, tiny.tokenizer(), labels=labels)
    for _ in range(2):
        found = list(batches)
        assert [len(batch["input_ids"]) for batch in found] == [2, 1]
        for batch in found:
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            assert all(isinstance(value, torch.Tensor) for value in inputs.values())
            model(**inputs)


def test_labels_are_kept_only_where_they_are_wanted():
    has = {
        labels: "labels"
        in next(iter(make_batches(tiny.bert(), tokenized(), 2, None, tiny.tokenizer(), labels=labels)))
        for labels in (True, False)
    }
    assert has == {True: True, False: False}


def test_columns_that_the_model_does_not_take_are_named_at_once():
    with pytest.raises(ValueError, match="columns words, label; BertForSequenceClassification takes input_ids"):
        make_batches(tiny.bert(), raw(), 2, None, tiny.tokenizer())


def test_examples_that_make_no_batch_say_what_to_pass():
    with pytest.raises(ValueError, match=r"make no batch.*processing_class="):
        list(make_batches(tiny.bert(), tokenized(), 2, None, None))


def test_batches_that_were_given_stay_as_they_are():
    given = [{"input_ids": torch.ones(1, 3)}]
    assert make_batches(tiny.bert(), given, 2, None, None) is given


class Pictures(torch.utils.data.Dataset):
    """A data set of torch's, with labels."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return {"pixel_values": np.ones((1, 8, 8), np.float32), "labels": 0, "name": "a picture"}


class Numbered:
    """The same without a class of torch's."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        if index >= 3:
            raise IndexError(index)
        return Pictures()[index]


@pytest.mark.parametrize("data", [Pictures, Numbered])
@pytest.mark.parametrize("labels", [True, False])
def test_what_has_a_length_and_numbers_holds_examples(data, labels):
    batches = list(make_batches(tiny.vit(), data(), 2, None, None, labels=labels))
    assert [len(batch["pixel_values"]) for batch in batches] == [2, 1]
    assert all(("labels" in batch) == labels and "name" not in batch for batch in batches)


def test_an_image_processor_that_can_pad_does_not():
    data = Dataset.from_dict({"pixel_values": np.ones((3, 1, 8, 8), np.float32)}).with_format("torch")
    batches = list(make_batches(tiny.vit(), data, 2, None, YolosImageProcessor()))
    assert [len(batch["pixel_values"]) for batch in batches] == [2, 1]


@pytest.mark.parametrize("form", [np.asarray, lambda value: value.tolist()])
def test_arrays_and_lists_are_put_on_the_device_as_tensors(form):
    batch = {"input_ids": form(torch.ones(2, 3, dtype=torch.int64)), "labels": [{"boxes": torch.ones(1)}]}
    (placed,) = on_device(tiny.bert(), [batch], "Calibrating")
    assert torch.equal(placed["input_ids"], torch.ones(2, 3, dtype=torch.int64))
    assert placed["labels"] is batch["labels"]
