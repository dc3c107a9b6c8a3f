# SPDX-License-Identifier: Apache-2.0
"""Fake quantizers put into whole models and taken out again."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import BertForSequenceClassification

from hfkdq import QuantizationSpec
from hfkdq.facts import read_facts, record_fact
from hfkdq.modeling.checkpoints import plain_weights
from hfkdq.quantization import (
    QuantizedConv2d,
    QuantizedLinear,
    activation_ranges,
    prepare_qat_,
    quantized_modules,
    quantized_spec,
    set_activation_ranges_,
    strip_quantizers_,
)
from tests import tiny


def observe(model):
    model.train()(**tiny.batch(model))
    return model.eval()


@pytest.mark.parametrize("make", [tiny.bert, tiny.distilbert, tiny.llama, tiny.vit])
def test_swaps_classes_and_keeps_parameters_and_keys(make):
    model = make()
    parameters, keys = dict(model.named_parameters()), list(model.state_dict())
    assert prepare_qat_(model, QuantizationSpec()) is model
    modules = quantized_modules(model)
    inputs = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    kinds = (QuantizedLinear, QuantizedConv2d)
    assert sorted(name for name in modules if isinstance(modules[name], kinds)) == sorted(inputs)
    assert list(model.state_dict()) == keys
    assert all(model.get_parameter(name) is parameter for name, parameter in parameters.items())
    observe(model)
    assert set(activation_ranges(model)) == set(inputs)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(**tiny.batch(model)).logits, model(**tiny.batch(model)).logits)


def test_stays_close_to_the_float_model():
    model = tiny.bert()
    batch = tiny.batch(model)
    expected = model(**batch).logits
    observe(prepare_qat_(model, QuantizationSpec(range_estimator="min_max")))
    difference = (model(**batch).logits - expected).abs().max()
    assert 0 < difference < 0.1 * expected.abs().max()


def test_saved_files_are_plain(tmp_path):
    model = observe(prepare_qat_(tiny.bert(), QuantizationSpec(range_estimator="learned")))
    model.save_pretrained(tmp_path)
    with plain_weights():
        loaded, info = BertForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(loaded.classifier) is nn.Linear
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    )


def test_evaluates_before_any_range_is_known():
    model = tiny.bert()
    batch = tiny.batch(model)
    weights_only = prepare_qat_(copy.deepcopy(model), QuantizationSpec(activation_bits=None))
    assert torch.equal(prepare_qat_(model, QuantizationSpec())(**batch).logits, weights_only(**batch).logits)
    assert activation_ranges(model) == {}


def test_targets_and_exclusions():
    model = prepare_qat_(tiny.bert(), QuantizationSpec(target_modules=["query", "key"], exclude_modules=r".*\.0\..*"))
    prefix = "bert.encoder.layer.1.attention.self"
    assert list(quantized_modules(model)) == [f"{prefix}.query", f"{prefix}.key"]


def test_subclasses_with_a_forward_of_their_own_stay_float():
    class Doubled(nn.Linear):
        def forward(self, input):
            return super().forward(input) * 2

    model = tiny.bert()
    model.classifier = Doubled(32, 3)
    prepare_qat_(model, QuantizationSpec())
    assert type(model.classifier) is Doubled
    assert "classifier" not in quantized_modules(model)


def test_no_match_names_patterns_and_modules():
    model = tiny.bert()
    with pytest.raises(ValueError, match=r"target_modules=\('quary',\).*bert\.embeddings\.word_embeddings"):
        prepare_qat_(model, QuantizationSpec(target_modules=["quary"]))
    assert quantized_spec(model) is None
    assert read_facts(model) == {}


def test_prepared_twice():
    spec = QuantizationSpec()
    model = observe(prepare_qat_(tiny.bert(), spec))
    ranges = activation_ranges(model)
    prepare_qat_(model, QuantizationSpec())
    assert activation_ranges(model) == ranges
    assert quantized_spec(model) == spec
    with pytest.raises(ValueError, match="strip_quantizers_"):
        prepare_qat_(model, QuantizationSpec(range_estimator="learned"))
    with pytest.raises(TypeError, match="QuantizationSpec"):
        prepare_qat_(tiny.bert(), {"weight_bits": 8})


def test_refuses_integer_weights_and_hooked_forwards():
    model = tiny.bert()
    model.classifier.weight = nn.Parameter(torch.zeros(3, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"classifier.*int8.*bitsandbytes"):
        prepare_qat_(model, QuantizationSpec())
    assert not quantized_modules(model), "nothing is changed before everything is checked"
    model = tiny.bert()
    model.classifier.forward = model.classifier.forward
    with pytest.raises(ValueError, match=r"classifier.*device_map"):
        prepare_qat_(model, QuantizationSpec())


def test_strip_gives_the_float_model_back():
    model = tiny.bert()
    expected = model(**tiny.batch(model)).logits
    record_fact(model, "student", {"layers": [0]})
    observe(prepare_qat_(model, QuantizationSpec()))
    assert strip_quantizers_(model) is model
    assert torch.equal(model(**tiny.batch(model)).logits, expected)
    assert not quantized_modules(model)
    assert quantized_spec(model) is None
    assert not any("quantiz" in name for name, _ in model.named_modules())
    assert read_facts(model) == {"student": {"layers": [0]}}
    assert "quantization_spec" not in vars(model.classifier)


@pytest.mark.parametrize("estimator", QuantizationSpec.RANGE_ESTIMATORS)
def test_ranges_move_to_another_model(estimator):
    model = observe(prepare_qat_(tiny.bert(), QuantizationSpec(range_estimator=estimator)))
    ranges = activation_ranges(model)
    other = prepare_qat_(tiny.bert(), QuantizationSpec())
    set_activation_ranges_(other, ranges)
    assert activation_ranges(other) == ranges == read_facts(other)["quantization"]["ranges"]
    assert torch.equal(other(**tiny.batch(other)).logits, model(**tiny.batch(model)).logits)


def test_wrong_ranges_are_refused():
    model = prepare_qat_(tiny.bert(), QuantizationSpec())
    with pytest.raises(ValueError, match="no quantized input at head"):
        set_activation_ranges_(model, {"head": {"scale": 1.0, "zero_point": 0}})
    for entry in (
        {"scale": 0.0, "zero_point": 0},
        {"scale": float("nan"), "zero_point": 0},
        {"scale": 1, "zero_point": 300},
    ):
        with pytest.raises(ValueError, match="Not a range for classifier"):
            set_activation_ranges_(model, {"classifier": entry})
    assert activation_ranges(model) == {}


def test_activations_that_are_not_finite_are_named():
    model = prepare_qat_(tiny.bert(), QuantizationSpec())
    model.classifier.train()(torch.full((1, 32), float("nan")))
    with pytest.raises(RuntimeError, match="enter classifier were not finite"):
        activation_ranges(model)
