# SPDX-License-Identifier: Apache-2.0
"""Records name modules, never patterns; what comes from a checkpoint is held against a schema before anything is made."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from hfkdq import QuantizationSpec, export_onnx, load_pruned, load_quantized, quantize
from hfkdq.facts import read_facts
from hfkdq.quantization import means_the_same, prepare_qat_, quantized_modules, quantized_spec
from hfkdq.quantization.naming import named_spec
from tests import tiny

SPECS = {
    "all": QuantizationSpec(),
    "list": QuantizationSpec(exclude_modules=["query", "classifier"]),
    "expression": QuantizationSpec(target_modules=r".*\.(key|value)"),
    "both": QuantizationSpec(target_modules=["key", "query"], exclude_modules=r".*layer\.0\..*"),
    "class": QuantizationSpec(overrides={"Linear": {"weight_bits": 4, "group_size": 32}, "classifier": None}),
    "order": QuantizationSpec(overrides={"dense": {"weight_bits": 4}, r".*layer\.1\..*dense": {"weight_bits": 6}}),
    "attention": QuantizationSpec(attention=True, exclude_modules=r".*layer\.0\.attention\.self"),
    "low": QuantizationSpec(weight_bits=2, overrides={"classifier": {"weight_bits": 8}, "key": {"weight_bits": 4}}),
}


@pytest.mark.parametrize("name", SPECS)
def test_a_record_has_names_alone_and_gives_the_same_model(name, tmp_path):
    spec, model = SPECS[name], tiny.bert()
    quantize(model, spec, [tiny.batch(model)])
    model.save_pretrained(tmp_path)
    recorded = json.loads((tmp_path / "config.json").read_text())["hfkdq"]["quantization"]["spec"]
    known = {name for name, _ in model.named_modules()}
    for key in ("target_modules", "exclude_modules", "overrides"):
        assert isinstance(recorded[key], (list, dict, type(None)))
        assert set(recorded[key] or ()) <= known
    loaded = load_quantized(str(tmp_path))
    schemes = {key: module.quantization_scheme for key, module in quantized_modules(model).items()}
    assert schemes == {key: module.quantization_scheme for key, module in quantized_modules(loaded).items()}
    batch = tiny.batch(model)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    # Whoever has the spec that it was trained with may go on with it.
    assert means_the_same(loaded, spec)
    prepare_qat_(loaded, spec)
    assert not any(means_the_same(loaded, other) for key, other in SPECS.items() if key != name)


def test_names_that_are_parts_of_others_mean_themselves(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.body = nn.Linear(4, 4), nn.ModuleDict({"head": nn.Linear(4, 4), "a": nn.Linear(4, 4)})

    model = tiny.bert()
    model.net = Net()
    for spec in (
        QuantizationSpec(target_modules=r"net\.head", activation_bits=None),
        QuantizationSpec(exclude_modules=r"net\.head", activation_bits=None),
        QuantizationSpec(overrides={r"net\.head": {"weight_bits": 4}}, activation_bits=None),
    ):
        prepared = prepare_qat_(copy.deepcopy(model), spec)
        again = prepare_qat_(copy.deepcopy(model), named_spec(prepared, spec))
        schemes = [
            {n: m.quantization_scheme for n, m in quantized_modules(each).items()} for each in (prepared, again)
        ]
        assert schemes[0] == schemes[1]


def test_a_loaded_model_is_exported_with_the_spec_it_was_trained_with(tmp_path):
    model = tiny.bert()
    quantize(model, SPECS["order"], [tiny.batch(model)])
    model.save_pretrained(tmp_path / "model")
    loaded = load_quantized(str(tmp_path / "model"))
    export_onnx(loaded, tmp_path / "onnx", quantization=SPECS["order"], latency_rounds=0)
    with pytest.raises(ValueError, match="The model was trained with"):
        export_onnx(loaded, tmp_path / "other", quantization=SPECS["low"], latency_rounds=0)


@pytest.fixture
def saved(tmp_path):
    model = tiny.bert()
    quantize(
        model, QuantizationSpec(exclude_modules=["query"], overrides={"key": {"weight_bits": 4}}), [tiny.batch(model)]
    )
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def change(folder, edit):
    config = json.loads((folder / "config.json").read_text())
    edit(config["hfkdq"])
    (folder / "config.json").write_text(json.dumps(config))


HOSTILE = "([a-z._0-9]+)*!"
SECTION = {
    "a pattern to exclude": lambda q: q["spec"].update(exclude_modules=HOSTILE),
    "a pattern in a list": lambda q: q["spec"].update(exclude_modules=[HOSTILE]),
    "a pattern to target": lambda q: q["spec"].update(target_modules=HOSTILE),
    "a pattern to override": lambda q: q["spec"].update(overrides={HOSTILE: None}),
    "a repeat that takes memory": lambda q: q["spec"].update(exclude_modules="((a{999}){999}){999}"),
    "a long name": lambda q: q["spec"].update(exclude_modules=["a" * 10**6]),
    "no spec": lambda q: q.pop("spec"),
    "no ranges": lambda q: q.pop("ranges"),
    "a spec that is a list": lambda q: q.update(spec=[1]),
    "an unknown field": lambda q: q["spec"].update(code="import os"),
    "a width that is a text": lambda q: q["spec"].update(weight_bits="8"),
    "a truth that is a text": lambda q: q["spec"].update(per_channel="no"),
    "a width there is not": lambda q: q["spec"].update(weight_bits=7),
    "overrides that are a list": lambda q: q["spec"].update(overrides=[1]),
    "an override that is a number": lambda q: q["spec"].update(overrides={"key": 4}),
    "half of the ranges": lambda q: [q["ranges"].pop(name) for name in list(q["ranges"])[::2]],
    "one range": lambda q: q["ranges"].pop(next(iter(q["ranges"]))),
    "a range of another model": lambda q: q["ranges"].update({"nowhere": {"scale": 1.0, "zero_point": 0}}),
    "a range that is a number": lambda q: q["ranges"].update(dict.fromkeys(q["ranges"], 1.0)),
    "ranges that are a list": lambda q: q.update(ranges=[]),
    "a scale of 0": lambda q: next(iter(q["ranges"].values())).update(scale=0.0),
    "a scale that is infinite": lambda q: next(iter(q["ranges"].values())).update(scale=float("inf")),
    "a scale that is no number": lambda q: next(iter(q["ranges"].values())).update(scale=float("nan")),
    "a scale that is a text": lambda q: next(iter(q["ranges"].values())).update(scale="1"),
    "a zero point out of range": lambda q: next(iter(q["ranges"].values())).update(zero_point=256),
    "a zero point that is a truth": lambda q: next(iter(q["ranges"].values())).update(zero_point=True),
    "a width of nothing": lambda q: q.update(weight_bits={"nowhere.weight": 4}),
    "a width of 99": lambda q: q.update(weight_bits={"classifier.weight": 99}),
    "weights of nothing": lambda q: q.update(weights={"nowhere": {"scale": {"shape": [1], "float32": "AACAPw=="}}}),
    "weights that are no base64": lambda q: q.update(weights={"classifier.weight": {"scale": {"shape": [3], "float32": "?"}}}),
    "weights of another shape": lambda q: q.update(weights={"classifier.weight": {"scale": {"shape": [9, 9], "float32": ""}}}),
    "weights of a huge shape": lambda q: q.update(weights={"classifier.weight": {"smoothing": {"shape": [2**40], "float32": ""}}}),
    "enabled by a text": lambda q: q.update(enabled="no"),
    "nested without end": lambda q: q.update(spec=json.loads("[" * 500 + "]" * 500)),
}  # fmt: skip


@pytest.mark.parametrize("name", SECTION)
def test_a_damaged_record_is_refused_in_a_sentence(name, saved):
    change(saved, lambda facts: SECTION[name](facts["quantization"]))
    with pytest.raises(ValueError, match=r"^\S.{20,}") as refused:
        load_quantized(str(saved))
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 1000


TOPICS = {
    "hfkdq": lambda facts: [facts.clear(), facts.update({"shapes": "x"})],
    "shapes without counts": lambda facts: facts.update(shapes={"tensors": {}}),
    "shapes that are negative": lambda facts: facts.update(shapes={"tensors": {"classifier.weight": [-1, 3]}, "counts": {}}),
    "shapes that are texts": lambda facts: facts.update(shapes={"tensors": {"classifier.weight": ["3"]}, "counts": {}}),
    "shapes that are larger": lambda facts: facts.update(shapes={"tensors": {"classifier.weight": [2**40, 32]}, "counts": {}}),
    "shapes of nothing": lambda facts: facts.update(shapes={"tensors": {"nowhere.weight": [1]}, "counts": {}}),
    "a count of anything": lambda facts: facts.update(shapes={"tensors": {}, "counts": {"bert": {"__class__": 1}}}),
    "sharing of texts": lambda facts: facts.update(sharing={"layers": "all"}),
    "sharing of no layer": lambda facts: facts.update(sharing={"layers": [[1, 99]]}),
    "unfinished": lambda facts: facts.update(unfinished_pruning=[1]),
    "a student of texts": lambda facts: facts.update(student={"layers": "1, 2"}),
}  # fmt: skip


@pytest.mark.parametrize("name", TOPICS)
def test_other_topics_are_held_against_their_types_too(name, saved):
    change(saved, lambda facts: [facts.pop("quantization"), TOPICS[name](facts)])
    with pytest.raises(ValueError, match=r"^\S.{20,}") as refused:
        load_pruned(str(saved))
    assert "\n" not in str(refused.value)


def test_a_section_that_is_no_object_is_refused(saved):
    config = json.loads((saved / "config.json").read_text())
    for value in ("x", 5, [1], True):
        (saved / "config.json").write_text(json.dumps({**config, "hfkdq": value}))
        with pytest.raises(ValueError, match="is damaged: hfkdq is"):
            read_facts(AutoConfig.from_pretrained(saved))


def test_ranges_that_no_data_gave_are_named_and_missed_at_export(tmp_path):
    model = tiny.bert()
    prepare_qat_(model, QuantizationSpec())
    model.train()(**tiny.batch(model))
    model.eval()
    quantizer = quantized_modules(model)["classifier"].activation_quantizer
    quantizer.initialized = False
    with pytest.raises(ValueError, match=r"1 quantized activations of the model have no range.*classifier"):
        export_onnx(model, tmp_path / "onnx", quantization=QuantizationSpec(), latency_rounds=0)
    from hfkdq.quantization.records import record_ranges

    record_ranges(model)
    assert read_facts(model)["quantization"]["unobserved"] == ["classifier"]
    model.save_pretrained(tmp_path / "model")
    loaded = load_quantized(str(tmp_path / "model"))
    assert not quantized_modules(loaded)["classifier"].activation_quantizer.initialized
    assert quantized_spec(loaded) == QuantizationSpec()


@pytest.mark.parametrize("settings", [
    dict(per_channel="no"), dict(per_channel=1), dict(symmetric=None), dict(attention="yes"), dict(weight_bits=8.0),
    dict(weight_bits=True), dict(activation_bits="8"), dict(group_size=64.0), dict(power=float("nan")), dict(power="0.5"),
    dict(percentile=float("inf")), dict(averaging_constant=float("nan")), dict(range_estimator=3), dict(storage_dtype=None),
    dict(head_bits="8"),
])  # fmt: skip
def test_a_setting_of_another_type_is_refused(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=re.escape(name)):
        QuantizationSpec(**settings)


@pytest.mark.parametrize("exclude", [["nothing"], "nothing.*", ["classifier", "clasifier"]])
def test_a_pattern_that_excludes_nothing_is_refused(exclude):
    with pytest.raises(ValueError, match=r"matches exclude_modules: '(nothing|clasifier)"):
        prepare_qat_(tiny.bert(), QuantizationSpec(exclude_modules=exclude))
