# SPDX-License-Identifier: Apache-2.0
"""What the sections of a recipe are in Python, and the schema for editors that says the same."""

import inspect
import json
import re
import shlex
from pathlib import Path

import jsonschema
import pytest
import yaml
from transformers import Seq2SeqTrainingArguments, TrainingArguments

import hfkdq
from hfkdq import RKD, HiddenStateKD, LogitKD, NoisyKD, PruningSpec, QuantizationSpec, TaskLoss
from hfkdq.cli import compress
from hfkdq.losses import JSD
from hfkdq.objectives import ByAgreement, Objective
from hfkdq.recipes import override, read
from hfkdq.recipes.editors import json_schema
from hfkdq.recipes.parts import OBJECTIVES, OWNED, parts_of, training_arguments, training_fields
from hfkdq.schedules import BottomUp, Linear, Piecewise

pytestmark = pytest.mark.every_case
SCHEMA = json_schema()
LEAST = {"model": "org/name", "data": {"train": "rows.csv"}}


def data(*changes):
    return override(json.loads(json.dumps(LEAST)), changes)


def parts(*changes):
    return parts_of(read(data(*changes)), "r.yaml")


WRITTEN = [
    ("TaskLoss", TaskLoss()),
    ("{LogitKD: null}", LogitKD()),
    ("{LogitKD: {divergence: reverse_kl, temperature: 4, top_k: 5}}", LogitKD(divergence="reverse_kl", temperature=4, top_k=5)),
    ("{LogitKD: {divergence: {JSD: {beta: 0.1}}}}", LogitKD(divergence=JSD(beta=0.1))),
    ("{LogitKD: {temperature: {Linear: {start: 4, end: 1}}}}", LogitKD(temperature=Linear(4, 1))),
    ("{LogitKD: {weight: {Piecewise: {points: [[0, 1], [1, 0.5]]}}}}", LogitKD(weight=Piecewise([[0, 1], [1, 0.5]]))),
    ("{LogitKD: {weight: {ByAgreement: {low: 0.1}}}}", LogitKD(weight=ByAgreement(low=0.1))),
    ("{HiddenStateKD: {layers: {1: 2, 2: 4}, active: BottomUp}}", HiddenStateKD(layers={1: 2, 2: 4}, active=BottomUp())),
    ("{HiddenStateKD: {layers: uniform}}", HiddenStateKD(layers="uniform")),
    ("{HiddenStateKD: {layers: {3: 6}}}", HiddenStateKD(layers={3: 6})),
    ("{NoisyKD: {objective: {LogitKD: {temperature: 3}}, std: 0.2}}", NoisyKD(objective=LogitKD(temperature=3), std=0.2)),
    ("{NoisyKD: {objective: RKD}}", NoisyKD(objective=RKD())),
]  # fmt: skip


@pytest.mark.parametrize(("text", "objective"), WRITTEN)
def test_objectives_are_the_objects_that_a_program_would_make(text, objective):
    assert parts(f"objectives=[{text}]").objectives == [objective]
    jsonschema.validate(json.loads(json.dumps(data(f"objectives=[{text}]"))), SCHEMA)


def test_every_public_objective_can_be_written():
    public = {
        name for name in hfkdq.__all__ if inspect.isclass(cls := getattr(hfkdq, name)) and issubclass(cls, Objective)
    }
    assert set(OBJECTIVES) == public


def test_specs_and_callbacks_share_a_section():
    found = parts("pruning={sparsity: 0.5, structure: neuron, rounds: 3, at_least: 0.9, metric: accuracy}", "quantization={weight_bits: 4, begin: 0.2, lower_bits: {0.0: 8, 0.5: 4}, overrides: {classifier: null}}")  # fmt: skip
    pruning = (PruningSpec(sparsity=0.5, structure="neuron", rounds=3), {"at_least": 0.9, "metric": "accuracy"})
    assert found.pruning == [pruning]
    spec = QuantizationSpec(weight_bits=4, overrides={"classifier": None})
    assert found.quantization == (spec, {"begin": 0.2, "lower_bits": {0.0: 8, 0.5: 4}})
    assert parts("quantization={}").quantization == (QuantizationSpec(), {})
    several = (
        "pruning=[{structure: vocab}, {sparsity: 0.5, structure: neuron, rounds: 3, at_least: 0.9, metric: accuracy}]"
    )
    assert parts(several).pruning == [(PruningSpec(structure="vocab"), {}), pruning]
    jsonschema.validate(data(several), SCHEMA)
    assert parts(several, "pruning.1.sparsity=0.25").pruning[1][0].sparsity == 0.25


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("objectives=[LogitKd]", "objectives[0] has no 'LogitKd'; did you mean LogitKD"),
        ("objectives=[TaskLoss, {LogitKD: {temprature: 2}}]", "objectives[1].LogitKD has no 'temprature'; did you mean temperature"),
        ("objectives=[{LogitKD: {temperature: 0}}]", "temperature must be larger than 0"),
        ("objectives=[{LogitKD: {temperature: 'no'}}]", "objectives[0].LogitKD.temperature is 'no', expected a number"),
        ("objectives=[{LogitKD: {temperature: {Liner: {start: 1}}}}]", "temperature has no 'Liner'; did you mean Linear"),
        ("objectives=[{LogitKD: {temperature: {Linear: {start: 1}}}}]", "temperature.Linear: "),
        ("objectives=[{LogitKD: {temperature: {BottomUp: {}}}}]", "temperature has no 'BottomUp'"),
        ("objectives=[{LogitKD: {temperature: {Linear: {}, Step: {}}}}]", "has 2 keys, expected one"),
        ("objectives=[{LogitKD: [1]}]", "objectives[0].LogitKD is [1], expected its arguments"),
        ("objectives=[{LogitKD: {}, TaskLoss: {}}]", "expected the name of a class"),
        ("objectives=[3]", "objectives[0] is 3, expected the name of a class"),
        ("objectives=[{LogitKD: {divergence: kl}}]", "divergence='kl' is none of"),
        ("objectives=[{NoisyKD: {objective: 3}}]", "objective is 3, expected the name of a class"),
        ("objectives=[{TaskLoss: {weight: -1}}]", "weight must not be negative"),
        ("pruning={sparsity: 2}", "pruning: sparsity must be in [0, 1)"),
        ("pruning={sparcity: 0.5}", "pruning has no 'sparcity'; did you mean sparsity"),
        ("pruning=[{sparsity: 0.5}, {sparcity: 0.5}]", "pruning[1] has no 'sparcity'; did you mean sparsity"),
        ("pruning=[{sparsity: 0.5}, {sparsity: 0.5}]", "pruning is a list that is empty or says the same twice"),
        ("pruning=[{structure: vocab}, {structure: vocab, sparsity: 0.5}]", "says the same twice"),
        ("pruning=[]", "pruning is a list that is empty"),
        ("pruning={structure: 3}", "pruning.structure is 3, expected a text"),
        ("quantization={weight_bits: 7}", "weight_bits=7 does not exist"),
        ("quantization={strict_resume: false}", "quantization has no 'strict_resume'"),
        ("quantization={begin: 3}", "quantization: "),
        ("training.learning_rat=1", "training has no 'learning_rat'; did you mean learning_rate"),
        ("training.learning_rate=fast", "training.learning_rate is 'fast', expected a number"),
        ("training.bf16=1", "training.bf16 is 1, expected true or false"),
        ("training.seed=-1", "training.seed must be in [0, 4294967295], got -1"),
        ("training.data_seed=4294967296", "training.data_seed must be in [0, 4294967295]"),
        ("training.learning_rate=-1", "training.learning_rate must be 0 or more, got -1"),
        ("training.gradient_accumulation_steps=0", "training.gradient_accumulation_steps must be 1 or more, got 0"),
        ("training.per_device_train_batch_size=-4", "training.per_device_train_batch_size must be 1 or more, got -4"),
        ("training.adam_beta1=5", "training.adam_beta1 must be in [0, 1], got 5"),
        ("training.num_train_epochs=-1", "training.num_train_epochs must be larger than 0, got -1"),
        ("training.log_level=loud", "training.log_level is 'loud', expected one of"),
        ("training.lr_scheduler_type=3", "training.lr_scheduler_type is 3, expected linear or"),
        ("training.output_dir=x", "training.output_dir is not for a recipe; use --output-dir instead"),
        ("training.hub_token=hf_x", "training.hub_token is not for a recipe; use `hf auth login` instead"),
    ],
)  # fmt: skip
def test_what_a_class_refuses_is_told_with_its_place(change, words):
    with pytest.raises(ValueError, match=r"^r\.yaml: ") as caught:
        parts(change)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_training_arguments_are_those_of_the_section(tmp_path):
    args = training_arguments(
        parts("training={learning_rate: 1e-4, lr_scheduler_type: cosine, use_cpu: true}"), str(tmp_path)
    )
    assert type(args) is TrainingArguments
    assert (args.learning_rate, args.lr_scheduler_type, args.report_to) == (1e-4, "cosine", [])
    assert isinstance(
        training_arguments(parts("training.use_cpu=true"), str(tmp_path), True), Seq2SeqTrainingArguments
    )
    answers = parts("training={generation_max_length: 9, use_cpu: true}")
    assert training_arguments(answers, str(tmp_path), True).generation_max_length == 9
    with pytest.raises(ValueError, match=r"training.generation_max_length is for models that write their answers"):
        training_arguments(answers, str(tmp_path))
    with pytest.raises(ValueError, match=r"^training: .*no_such") as caught:
        training_arguments(parts("training={lr_scheduler_type: no_such}"), str(tmp_path))
    assert "\n" not in str(caught.value)
    assert "output_dir" not in training_fields()
    assert {"output_dir", "hub_token", "push_to_hub"} <= set(OWNED)


def test_the_schema_takes_what_is_read_and_refuses_what_is_not():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    fine = data("student.num_layers=2", "pruning={sparsity: 0.5}", "quantization={}", "export={}", "training={seed: 1, bf16: true}", "report=null")  # fmt: skip
    parts_of(read(fine))
    jsonschema.validate(fine, SCHEMA)
    for wrong in ("modl=x", "data.trian=x", "objectives=[LogitKd]", "training.learning_rat=1", "pruning.sparcity=1", "quantization.weight_bits=x", "objectives=[{LogitKD: {temprature: 1}}]", "training.hub_token=x", "student.num_layers=x"):  # fmt: skip
        with pytest.raises(ValueError, match=r"\w"):
            parts(wrong)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(data(wrong), SCHEMA)


def test_the_schema_says_what_the_documentation_says():
    definitions = SCHEMA["$defs"]["LogitKD"]["properties"]
    assert "temperature" in definitions
    assert "larger than 0" in definitions["temperature"]["description"]
    assert definitions["temperature"]["default"] == 2.0
    assert "layers the student gets" in str(SCHEMA["properties"]["student"])


def test_the_guide_shows_recipes_and_commands_that_are_taken():
    page = (Path(__file__).parents[2] / "docs" / "compress.md").read_text(encoding="utf-8")
    recipes = re.findall(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    for text in recipes:
        shown = yaml.safe_load(text.replace("5e-5", "0.00005"))
        assert len(parts_of(read(shown)).objectives) == 3
        jsonschema.validate(shown, SCHEMA)
    commands = re.findall(r"^(?:accelerate launch -m )?hfkdq compress (.*?)(?: +[#>].*)?$", page, re.MULTILINE)
    assert len(commands) >= 6
    for command in commands:
        assert compress.parse(shlex.split(command)).source in ("org/name", "recipe.yaml", None)
