# SPDX-License-Identifier: Apache-2.0
import json

import pytest
from torch import nn
from transformers.pytorch_utils import Conv1D

from hfkdq.specs import PruningSpec, QuantizationScheme, QuantizationSpec, module_matches

pytestmark = pytest.mark.every_case

LINEAR, TABLE = nn.Linear(2, 2), nn.Embedding(2, 2)


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
        QuantizationSpec(
            weight_bits=4, group_size=64, symmetric=False, activation_bits=16, activation_symmetric=True, head_bits=6,
            embedding_bits=3, attention=True, storage_dtype="bfloat16", weight_estimator="mse", range_estimator="mse",
            overrides={"classifier": None, r".*\.0\..*": {"weight_bits": 2, "symmetric": True, "group_size": None}},
            target_modules=["query", "dense"],
        ),
        QuantizationScheme(weight_mapping="power_law", power=0.7, percentile=98, averaging_constant=0.1),
        PruningSpec(sparsity=0.5, structure="neuron", begin=0.1, end=0.9),
        PruningSpec(structure="n:m", pattern="1:4", criterion="taylor", exclude_modules=["query"]),
        PruningSpec(sparsity=0.5, structure="head", ranking="global", plain_checkpoint=False, rounds=3, cut="mean"),
    ],
)  # fmt: skip
def test_specs_survive_json(spec):
    again = type(spec).from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec
    assert again.to_dict() == spec.to_dict()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QuantizationSpec(weight_bits=5), r"weight_bits=5 does not exist.*16, 8, 6, 4, 3, 2, 1"),
        (lambda: QuantizationSpec(weight_bits=True), "weight_bits=True"),
        (lambda: QuantizationSpec(activation_bits=True), "activation_bits=True"),
        (lambda: QuantizationSpec(group_size=48), r"group_size=48.*32, 64, 128"),
        (lambda: QuantizationSpec(weight_mapping="cubic"), "weight_mapping='cubic'"),
        (lambda: QuantizationSpec(activation_mapping="kmeans"), r"activation_mapping='kmeans'.*linear, power_law"),
        (lambda: QuantizationSpec(weight_estimator="pact"), "weight_estimator='pact'"),
        (lambda: QuantizationSpec(storage_dtype="float8"), "storage_dtype='float8'"),
        (lambda: QuantizationSpec(head_bits=5), "head_bits=5"),
        (lambda: QuantizationSpec(embedding_bits=5), "embedding_bits=5"),
        (lambda: QuantizationSpec(power=0.0), r"power must be in \(0, 1\]"),
        (lambda: QuantizationSpec(power=1.5), "power"),
        (lambda: QuantizationSpec(percentile=50), r"percentile must be in \(50, 100\]"),
        (lambda: QuantizationSpec(percentile=101), "percentile"),
        (lambda: QuantizationSpec(averaging_constant=1.1), "averaging_constant"),
        (lambda: QuantizationSpec(averaging_constant=float("nan")), "averaging_constant"),
        (lambda: QuantizationSpec(group_size=32, per_channel=False), "group_size=32 divides channels"),
        (lambda: QuantizationSpec(weight_bits=16), "'float16' or 'bfloat16'"),
        (lambda: QuantizationSpec(head_bits=16), "head_bits=16.*'float16' or 'bfloat16'"),
        (lambda: QuantizationSpec(embedding_bits=16), "embedding_bits=16.*'float16' or 'bfloat16'"),
        (lambda: QuantizationSpec(weight_bits=1, symmetric=False), "symmetric=False"),
        (lambda: QuantizationSpec(weight_mapping="kmeans", symmetric=False), "symmetric=False"),
        (lambda: QuantizationSpec(weight_mapping="power_of_two", symmetric=False), "symmetric=False"),
        (lambda: QuantizationSpec(weight_estimator="mean_abs", symmetric=False), "'mean_abs'"),
        (lambda: QuantizationSpec(weight_bits=1, weight_mapping="power_law"), "weight_bits=1"),
        (
            lambda: QuantizationSpec(weight_bits=4, weight_mapping="kmeans", weight_estimator="mse"),
            "would have no effect",
        ),
        *(
            (lambda more=more: QuantizationSpec(weight_estimator="learned", **more), "'learned' trains one scale")
            for more in (
                {"symmetric": False},
                {"weight_mapping": "power_law"},
                {"group_size": 32},
                {"weight_bits": 1},
                {"weight_bits": 16, "storage_dtype": "float16"},
            )
        ),
        *(
            (
                lambda name=name: QuantizationSpec(range_estimator=name, activation_mapping="power_law"),
                "has gradients for",
            )
            for name in ("learned", "pact")
        ),
        (lambda: QuantizationSpec(attention=True, activation_bits=None), "attention=True"),
        (lambda: QuantizationSpec(overrides={"a": {"bits": 4}}), r"overrides\['a'\] has no field bits.*weight_bits"),
        (lambda: QuantizationSpec(overrides={"a": {"attention": True}}), r"overrides\['a'\] has no field attention"),
        (lambda: QuantizationSpec(overrides={"a": {"weight_bits": 7}}), r"overrides\['a'\]: weight_bits=7"),
        (lambda: QuantizationSpec(overrides={"(": {"weight_bits": 4}}).scheme("x", LINEAR), "neither a module's name"),
        (lambda: QuantizationSpec(activation_bits=5), "activation_bits=5"),
        (lambda: QuantizationSpec(range_estimator="magic"), "moving_average"),
        (lambda: QuantizationSpec(averaging_constant=0), "averaging_constant"),
        (lambda: QuantizationSpec(target_modules="("), "regular expression"),
        (lambda: QuantizationSpec.from_dict({"bits": 8}), "no field bits"),
        (lambda: PruningSpec(sparsity=1.0), "sparsity"),
        (lambda: PruningSpec(sparsity=0.5, structure="cube"), "structure='cube'"),
        (lambda: PruningSpec(sparsity=0.5, criterion="luck"), "criterion='luck'"),
        (lambda: PruningSpec(sparsity=0.5, begin=0.7, end=0.7), "begin"),
        (lambda: PruningSpec(sparsity=0.5, structure="layer", target_modules=["x"]), "goes through the whole model"),
        (lambda: PruningSpec(structure="neuron"), "needs a sparsity"),
        (
            lambda: PruningSpec(structure="neuron", sparsity=0.5, multiple_of=0),
            "multiple_of must be a whole number from 1 on, got 0",
        ),
        (
            lambda: PruningSpec(structure="head", sparsity=0.5, multiple_of=8),
            "not for structure='head' with ranking='local'",
        ),
        (
            lambda: PruningSpec(sparsity=0.5, structure="neuron", ranking="global", multiple_of=8),
            "with ranking='global'. Leave it out",
        ),
        (lambda: PruningSpec(sparsity=0.5, ranking="best"), "ranking='best'"),
        (lambda: PruningSpec(sparsity=0.5, cut="paste"), "cut='paste'"),
        (lambda: PruningSpec(sparsity=0.5, schedule="step"), "schedule='step'"),
        (lambda: PruningSpec(sparsity=0.5, rounds=0), "rounds"),
        (lambda: PruningSpec(sparsity=0.5, pattern="2:4"), "pattern is for"),
        (lambda: PruningSpec(structure="n:m", pattern="4:4"), "n < m"),
        (lambda: PruningSpec(structure="n:m", pattern="2x4"), "'2:4'"),
        (lambda: PruningSpec(structure="n:m", sparsity=0.7), "is a sparsity of 0.5"),
        (lambda: PruningSpec(structure="block", sparsity=0.7, pattern="0x4"), "rows x columns"),
        (lambda: PruningSpec(structure="layer", sparsity=0.5, cut="mask"), "cut='mask'"),
        (lambda: PruningSpec(structure="weight", sparsity=0.5, cut="mean"), "neurons and heads"),
        (lambda: PruningSpec(structure="hidden", sparsity=0.5, criterion="activation"), "no input of its own"),
        (lambda: PruningSpec(structure="n:m", ranking="global"), "one ranking"),
        (lambda: PruningSpec(structure="vocab", criterion="taylor"), "rarest tokens"),
    ],
)
def test_bad_specs_say_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("overrides", [{"a": 4}, {3: {"weight_bits": 4}}, {"a": ["weight_bits"]}])
def test_overrides_of_another_kind_are_refused(overrides):
    with pytest.raises(TypeError, match="overrides must be a dictionary"):
        QuantizationSpec(overrides=overrides)


def test_overrides_of_the_caller_are_copied():
    settings = {"a": {"weight_bits": 4}}
    spec = QuantizationSpec(overrides=settings)
    settings["a"]["weight_bits"] = 99
    assert spec.overrides == {"a": {"weight_bits": 4}}


def test_everything_that_can_be_quantized_is_by_default():
    kinds = [
        LINEAR, TABLE, Conv1D(2, 2), nn.Conv1d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.LSTM(2, 2), nn.GRU(2, 2),
    ]  # fmt: skip
    assert all(QuantizationSpec().selects("a", module) for module in kinds)
    assert not any(
        QuantizationSpec().selects("a", module) for module in (nn.LayerNorm(2), nn.Conv3d(2, 2, 1), nn.RNN(2, 2))
    )


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({}, 4),
        ({"query": {"weight_bits": 8}}, 8),
        ({"self.query": {"weight_bits": 8}}, 8),
        ({"model.0.self.query": {"weight_bits": 8}}, 8),
        ({"uery": {"weight_bits": 8}, "model": {"weight_bits": 8}}, 4),
        ({"Linear": {"weight_bits": 8}, "Embedding": {"weight_bits": 2}}, 8),
        ({r".*\.0\..*": {"weight_bits": 8}}, 8),
        ({r".*\.1\..*": {"weight_bits": 8}}, 4),
        ({r"\.0\.": {"weight_bits": 8}}, 4),  # for the whole name
        ({"Linear": {"weight_bits": 8}, "query": {"weight_bits": 3}}, 3),  # later ones win
        ({"query": {"weight_bits": 3}, "Linear": {"weight_bits": 8}}, 8),
        ({"query": {"weight_bits": 3}, "Linear": {"symmetric": False}}, 3),  # field by field
        ({"query": None}, None),
        ({"Linear": {"weight_bits": 8}, "query": None}, None),
        ({"Linear": None, "query": {"weight_bits": 8}}, 8),
    ],
)
def test_overrides_match_names_classes_and_expressions(overrides, expected):
    scheme = QuantizationSpec(weight_bits=4, overrides=overrides).scheme("model.0.self.query", LINEAR)
    assert type(scheme) in (QuantizationScheme, type(None))
    assert (scheme and scheme.weight_bits) == expected
    if "symmetric" in (overrides.get("Linear") or {}):
        assert not scheme.symmetric


SPECIAL = {"weight_bits": 4, "activation_bits": 4, "symmetric": False, "group_size": 32, "weight_estimator": "mse"}


@pytest.mark.parametrize(
    ("spec", "module", "is_head", "weight_bits", "activation_bits", "plain"),
    [
        (SPECIAL, LINEAR, False, 4, 4, False),
        (SPECIAL, LINEAR, True, 8, 8, True),
        (SPECIAL, TABLE, False, 8, 4, True),
        ({**SPECIAL, "head_bits": 4}, LINEAR, True, 4, 4, False),
        ({**SPECIAL, "head_bits": 6}, LINEAR, True, 6, 4, True),
        ({**SPECIAL, "embedding_bits": 4}, TABLE, False, 4, 4, False),
        ({**SPECIAL, "embedding_bits": 2}, TABLE, False, 2, 4, True),
        ({**SPECIAL, "weight_bits": 8, "activation_bits": 16}, LINEAR, True, 8, 16, False),
        ({**SPECIAL, "activation_bits": None}, LINEAR, True, 8, None, True),
        ({"weight_bits": 16, "storage_dtype": "float16"}, TABLE, False, 16, 8, True),
        ({"weight_bits": 16, "storage_dtype": "float16"}, LINEAR, True, 16, 8, True),
        ({**SPECIAL, "overrides": {"m": {"weight_bits": 2}}}, LINEAR, True, 2, 8, True),
        ({**SPECIAL, "overrides": {"m": {"group_size": 64}}}, LINEAR, False, 4, 4, False),
        (SPECIAL, nn.LSTM(2, 2), False, 4, None, None),
        (SPECIAL, nn.GRU(2, 2), False, 4, None, None),
    ],
)
def test_heads_tables_and_recurrent_layers_have_widths_of_their_own(
    spec, module, is_head, weight_bits, activation_bits, plain
):
    scheme = QuantizationSpec(**spec).scheme("m", module, is_head)
    assert (scheme.weight_bits, scheme.activation_bits) == (weight_bits, activation_bits)
    if plain is None:
        assert (scheme.group_size, scheme.symmetric) == (None, False)
    elif plain:
        assert (scheme.group_size, scheme.symmetric, scheme.weight_estimator) == (None, True, None)
    else:
        assert (scheme.group_size, scheme.symmetric, scheme.weight_estimator) != (None, True, None)
        assert scheme.group_size == spec.get("overrides", {"m": {"group_size": 32}})["m"]["group_size"]


@pytest.mark.parametrize(
    ("settings", "ranges", "anything"),
    [
        ({}, False, False),
        ({"range_estimator": "learned"}, True, True),
        ({"range_estimator": "pact"}, True, True),
        ({"range_estimator": "pact", "activation_bits": None}, False, False),
        ({"weight_estimator": "learned"}, False, True),
    ],
)
def test_a_scheme_says_what_it_trains(settings, ranges, anything):
    scheme = QuantizationScheme(**settings)
    assert (scheme.learns_ranges, scheme.learns) == (ranges, anything)


def test_default_targets_are_linears_and_embeddings():
    spec = QuantizationSpec(exclude_modules=["classifier"])
    assert spec.selects("encoder.dense", nn.Linear(2, 2))
    assert spec.selects("embeddings.word", nn.Embedding(2, 2))
    assert not spec.selects("classifier", nn.Linear(2, 2))
    assert not spec.selects("norm", nn.LayerNorm(2))
