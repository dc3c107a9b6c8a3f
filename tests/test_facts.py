# SPDX-License-Identifier: Apache-2.0
from transformers import BertConfig, BertForSequenceClassification

from hfkdq.facts import read_facts, record_fact

from . import tiny


def test_a_model_without_facts_has_none():
    model = tiny.bert()
    assert read_facts(model) == {}
    assert read_facts(model.config) == {}


def test_topics_are_kept_apart_and_replaced_one_by_one():
    model = tiny.bert()
    record_fact(model, "student", {"layers": [1]})
    record_fact(model, "pruning", {"sparsity": 0.5})
    record_fact(model, "student", {"layers": [2]})
    assert read_facts(model) == {"student": {"layers": [2]}, "pruning": {"sparsity": 0.5}}
    assert read_facts(model.config) == read_facts(model)


def test_facts_are_handed_out_as_copies():
    model = tiny.bert()
    record_fact(model, "student", {"layers": [1]})
    read_facts(model)["student"]["layers"].append(2)
    assert read_facts(model) == {"student": {"layers": [1]}}


def test_another_model_of_the_same_configuration_object_learns_nothing_from_the_recorded_dict():
    model = tiny.bert()
    record_fact(model, "student", {"layers": [1]})
    before = model.config.hfkdq
    record_fact(model, "pruning", {"sparsity": 0.5})
    assert before == {"student": {"layers": [1]}}


def test_facts_survive_saving_and_loading(tmp_path):
    model = tiny.bert()
    record_fact(model, "pruning", {"sparsity": 0.5, "patterns": ["query"], "nothing": None})
    model.save_pretrained(tmp_path)
    assert read_facts(BertConfig.from_pretrained(tmp_path)) == read_facts(model)
    assert read_facts(BertForSequenceClassification.from_pretrained(tmp_path)) == read_facts(model)
