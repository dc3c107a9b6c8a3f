# SPDX-License-Identifier: Apache-2.0
import pytest
from transformers import BertConfig, BertForSequenceClassification

from hfkdq import PruningSpec, QuantizationSpec, make_student, prune, quantize
from hfkdq.facts import Facts, describe_facts, read_facts, record_fact
from hfkdq.pruning.clustering import cluster_weights
from hfkdq.pruning.sharing import share_layers

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


# ------------------------------------------------------------------ descriptions


def test_of_a_student_the_stacks_that_lost_layers_are_told():
    whole = {"teacher_layers": 1, "layers": [1], "teacher_decoder_layers": 3, "decoder_layers": [1, 2, 3]}
    assert describe_facts({"student": whole}) == ["Layers: all of the teacher, copied from it."]
    assert describe_facts({"student": {**whole, "decoder_layers": [3]}}) == [
        "Layers: 1 of the teacher's 3 decoder layers, copied from it (numbers 3, counted from 1)."
    ]


SENTENCES = {
    "student": (
        {"teacher_layers": 6, "layers": [2, 4], "teacher_decoder_layers": 4, "decoder_layers": [4]},
        "Layers: 2 of the teacher's 6 layers, copied from it (numbers 2, 4, counted from 1); "
        "1 of the teacher's 4 decoder layers, copied from it (numbers 4, counted from 1).",
    ),
    "sharing": (
        {"layers": [[1, 2], [3, 4]]},
        "Sharing: the layers 1, 2 and the layers 3, 4 have the same weights.",
    ),
    "distillation": (
        {"objectives": [{"name": "TaskLoss", "weight": 0.5}, {"name": "LogitKD"}], "steps": 1200, "teacher": "Bert"},
        "Distillation from a Bert, 1,200 optimizer steps: TaskLoss(weight=0.5), LogitKD().",
    ),
    "vocabulary": (
        {
            "tokens_before": 3000, "tokens_after": 1200, "rows_before": 3000, "rows_after": 1200, "min_count": 2,
            "parameters_before": 5000, "parameters_after": 4000,
        },
        "Vocabulary: 1,200 of 3,000 tokens are left (min_count=2). Parameters: 5.00k before, 4.00k after.",
    ),
    "pruning": (
        {
            "spec": PruningSpec(sparsity=0.5, structure="head", criterion="taylor", ranking="global").to_dict(),
            "achieved_sparsity": 0.5, "parameters_before": 2000, "parameters_after": 1000,
            "earlier": [{"spec": PruningSpec(structure="n:m").to_dict(), "achieved_sparsity": 0.5}],
        },
        "Pruning: 50.0% of the weights of the pruned layers are zero, 2:4; their shapes are unchanged; "
        "chosen by magnitude.\n"
        "Pruning: 50.0% of the attention heads are removed; chosen by taylor; ranking=global. "
        "Parameters: 2.00k before, 1.00k after.",
    ),
    "unfinished_pruning": (
        {"structure": "neuron", "sparsity": 0.25},
        "Recorded as unfinished_pruning: {'structure': 'neuron', 'sparsity': 0.25}.",
    ),
    "clustering": (
        {"clusters": 16, "modules": 1200, "relative_error": 0.0123},
        "Clustering: the weights of 1,200 layers take at most 16 values each; squared error 1.23% of the variance.",
    ),
    "quantization": (
        {
            "spec": QuantizationSpec(
                weight_bits=4, group_size=32, activation_bits=None, weight_estimator="mse", exclude_modules=["classifier"],
            ).to_dict(),
            "enabled": False, "unobserved": ["query"], "weight_bits": {"query": 8},
        },
        "Quantization of weights alone: 4-bit weights (symmetric, scales per 32 inputs), embeddings 8-bit, head 8-bit; "
        "in floating point: classifier; weight_estimator=mse; 1 activations that no data reached have no range; "
        "1 weights are still wider, as training has not ended; off until training reaches it.",
    ),
    "shapes": (
        {"tensors": {"a.weight": [2, 3], "b.weight": [3, 2]}, "counts": {}},
        "Shapes: 2 tensors have shapes that the configuration cannot say.",
    ),
}  # fmt: skip


def test_every_topic_is_described():
    assert SENTENCES.keys() == Facts.__annotations__.keys()


@pytest.mark.parametrize("topic", SENTENCES)
def test_a_fact_describes_itself(topic):
    fact, expected = SENTENCES[topic]
    assert "\n".join(describe_facts({topic: fact})) == expected


@pytest.mark.parametrize("topic", SENTENCES)
def test_what_no_sentence_is_made_for_is_told_as_it_is_recorded(topic):
    told = "\n".join(describe_facts({topic: {**SENTENCES[topic][0], "colour": "green"}, "paint": {"coats": 2}}))
    assert "colour=green." in told or "'colour': 'green'" in told
    assert told.endswith("Recorded as paint: {'coats': 2}.")
    empty = {"tensors": {}, "counts": {}} if topic == "shapes" else {}
    assert describe_facts({topic: {**empty, "colour": "green"}})[0].startswith(f"Recorded as {topic}: ")


@pytest.mark.parametrize("structure", PruningSpec.STRUCTURES)
def test_every_structure_is_described(structure):
    spec = PruningSpec(structure=structure, **({} if structure in ("n:m", "vocab") else {"sparsity": 0.5}))
    words = PruningSpec.describe(spec.to_dict())
    assert words.startswith(("of the weights", "of the feed-forward", "of the attention", "of the layers", "of the hidden",
                             "of the vocabulary", "of the inner channels"))  # fmt: skip
    assert "structure" not in words
    assert "structure=spiral" in PruningSpec.describe({"structure": "spiral"})


@pytest.mark.parametrize("spec", [PruningSpec(sparsity=0.5), QuantizationSpec()])
def test_a_setting_that_no_sentence_tells_is_told_by_its_name(spec):
    usual = type(spec).describe(spec.to_dict())
    for name, value in spec.to_dict().items():
        other = {bool: lambda v: not v, int: lambda v: v + 1, float: lambda v: v + 0.25}.get(
            type(value), lambda v: "green"
        )
        other = {"exclude_modules": ["green"], "overrides": {"green": None}}.get(name, other(value))
        changed = type(spec).describe({**spec.to_dict(), name: other})
        assert changed != usual or name in ("sparsity", "pattern"), name
    assert "colour=green" in type(spec).describe({"colour": "green"})


def test_what_was_done_is_recorded_and_told():
    student = make_student(tiny.bert(layers=4), num_layers=2)
    prune(student, PruningSpec(sparsity=0.5, structure="neuron"))
    share_layers(student)
    cluster_weights(student, clusters=8)
    quantize(student, QuantizationSpec(activation_bits=None))
    words = [sentence.split()[0].rstrip(":") for sentence in describe_facts(read_facts(student))]
    assert words == ["Layers", "Sharing", "Pruning", "Clustering", "Quantization"]
