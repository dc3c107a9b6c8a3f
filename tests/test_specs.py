# SPDX-License-Identifier: Apache-2.0
import pytest
from torch import nn

from hfkdq.specs import PruningSpec, QuantizationSpec, module_matches


@pytest.mark.parametrize(
    ("patterns", "matches"),
    [
        (None, False),
        (["query"], True),
        (["uery"], False),
        (r".*\.query", True),
        ("query", False),
        (["a.b.query"], True),
    ],
)
def test_module_patterns_follow_peft(patterns, matches):
    assert module_matches("a.b.query", patterns) is matches


@pytest.mark.parametrize(
    "spec",
    [
        QuantizationSpec(activation_bits=None, exclude_modules=["classifier"]),
        QuantizationSpec(range_estimator="learned", target_modules=r".*dense"),
        PruningSpec(sparsity=0.5, structure="neuron", begin=0.1, end=0.9),
    ],
)
def test_specs_survive_their_dictionaries(spec):
    assert type(spec).from_dict(spec.to_dict()) == spec


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QuantizationSpec(weight_bits=5), "weight_bits=5"),
        (lambda: QuantizationSpec(activation_bits=5), "activation_bits=5"),
        (lambda: QuantizationSpec(range_estimator="magic"), "moving_average"),
        (lambda: QuantizationSpec(averaging_constant=0), "averaging_constant"),
        (lambda: QuantizationSpec(target_modules="("), "regular expression"),
        (lambda: QuantizationSpec.from_dict({"bits": 8}), "no field bits"),
        (lambda: PruningSpec(sparsity=1.0), "sparsity"),
        (lambda: PruningSpec(sparsity=0.5, structure="cube"), "structure='cube'"),
        (lambda: PruningSpec(sparsity=0.5, criterion="luck"), "criterion='luck'"),
        (lambda: PruningSpec(sparsity=0.5, begin=0.7, end=0.7), "begin"),
        (lambda: PruningSpec(sparsity=0.5, structure="neuron", target_modules=["x"]), "structure='weight'"),
    ],
)
def test_bad_specs_say_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_default_targets_are_linears_and_embeddings():
    spec = QuantizationSpec(exclude_modules=["classifier"])
    assert spec.selects("encoder.dense", nn.Linear(2, 2))
    assert spec.selects("embeddings.word", nn.Embedding(2, 2))
    assert not spec.selects("classifier", nn.Linear(2, 2))
    assert not spec.selects("norm", nn.LayerNorm(2))
