# SPDX-License-Identifier: Apache-2.0
"""Recipes as they are read, changed and written: nothing is taken that nothing reads, and nothing is lost."""

import json

import pytest

from hfkdq.recipes import DataSection, Recipe, StudentSection, dump, load, override, read

pytestmark = pytest.mark.every_case
LEAST = {"model": "org/name", "data": {"train": "rows.csv"}}


def recipe(*changes, **sections):
    return read(override(json.loads(json.dumps({**LEAST, **sections})), changes), "r.yaml")


def written(tmp_path, text):
    path = tmp_path / "r.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_the_least_recipe_does_nothing_that_it_does_not_say():
    assert recipe() == Recipe(model="org/name", data=DataSection(train="rows.csv"))
    assert recipe("student.num_layers=2").student == StudentSection(num_layers=2)


def test_what_is_written_is_read_again(tmp_path):
    whole = recipe(
        "training={learning_rate: 1e-4, eval_strategy: no, run_name: 'on', logging_dir: '1e-4', seed: 7, lr_scheduler_kwargs: {a: '3'}}",
        "objectives=[TaskLoss, {LogitKD: {temperature: {Linear: {start: 4, end: 1}}}}, {HiddenStateKD: {layers: {1: 2}}}]",
        "export={}", "report.language=[en, no]", "push.repo_id=me/it", "data.text_columns=[a, 'b: c']",
    )  # fmt: skip
    assert load(written(tmp_path, dump(whole, "a\nb"))) == load(written(tmp_path, dump(whole)))
    assert read(load(tmp_path / "r.yaml")) == whole
    assert whole.training["eval_strategy"] == "no"
    assert whole.training["learning_rate"] == 1e-4


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("5E5", 5e5), ("-.5", -0.5), ("1.", 1.0), ("10", 10), ("010", 10), ("0x10", 16), ("1:30", "1:30"),
        ("no", "no"), ("On", "On"), ("true", True), ("null", None), ("", None), ("~", None), ("2024-01-01", "2024-01-01"),
        ("imdb:train", "imdb:train"), ("[a, 1]", ["a", 1]), ("{a: 1}", {"a": 1}), ("'1'", "1"), ("<<", "<<"), ("1_000", "1_000"),
    ],
)  # fmt: skip
def test_values_are_those_of_yaml_1_2(text, value):
    found = override({}, [f"a.b={text}"])["a"]["b"]
    assert found == value
    assert type(found) is type(value)


def test_changes_reach_into_lists_and_leave_sections_out():
    data = {**LEAST, "objectives": [{"LogitKD": {}}, "TaskLoss"], "pruning": {"sparsity": 0.5}}
    found = override(
        data, ["objectives.0.LogitKD.temperature=4", "objectives.1=RKD", "pruning=null", "pruning.sparsity=0.1"]
    )
    assert found["objectives"] == [{"LogitKD": {"temperature": 4}}, "RKD"]
    assert found["pruning"] == {"sparsity": 0.1}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("modl=x", "there is no 'modl'; did you mean model"),
        ("data.trian=x", "data has no 'trian'; did you mean train"),
        ("data.train=3", "data.train is 3, expected a text"),
        ("data.max_length=true", "data.max_length is True, expected an integer"),
        ("data.train_samples=0", "data.train_samples must be 1 or more, got 0"),
        ("data.text_columns=[a, b, c]", "data.text_columns has one name or two"),
        ("data=null", "data is null, expected an object"),
        ("student={}", "student says no layers"),
        ("student={num_layers: 2, layers: [1]}", "student has num_layers and layers"),
        ("student.num_layers=-1", "student.num_layers must be 1 or more"),
        ("export.quantization=int7", "export.quantization is 'int7'; it is one of"),
        ("export.tolerance=0", "export.tolerance must be larger than 0"),
        ("export.max_drop=-1", "export.max_drop must be 0 or more"),
        ("report.latency_rounds=-1", "report.latency_rounds must be 0 or more"),
        ("report.resamples=-1", "report.resamples must be 0 or more"),
        ("export.threads=0", "export.threads must be 1 or more"),
        ("export.threads=10000", "export.threads must be 1024 or less, got 10000"),
        ("export.allow_drop=true", "export.allow_drop needs export.max_drop"),
        ("report.threads=-1", "report.threads must be 1 or more"),
        ("report.threads=10000", "report.threads must be 1024 or less"),
        ("report.license=Apache 2", "report.license is 'Apache 2', expected an identifier"),
        ("push={repo_id: me/it, revision: a b}", "push.revision is 'a b', which is no name of a branch"),
        ("push={repo_id: me/it, commit_message: ' '}", "push.commit_message is empty"),
        ("report.nothing=1", "report has no 'nothing'"),
        ("report={}", "report measures the exported file, and there is no export"),
        ("push.private=true", "push lacks repo_id"),
        ("push.repo_id=me/it", "push sends the exported file, and there is no export"),
        ("objectives=[]", "objectives is an empty list"),
        ("objectives=LogitKD", "objectives is 'LogitKD', expected a list"),
        ("training=3", "training is 3, expected an object"),
        ("training={3: 1}", "the name 3 in training"),
        ("model='  '", "model is empty"),
        ("teacher=''", "teacher is empty"),
        ("data.train=''", "data.train is empty"),
        ("data.eval=' '", "data.eval is empty"),
        ("push.repo_id=a/b/c", "push.repo_id is 'a/b/c', expected user/name"),
        ("push.repo_id='me/a b'", "push.repo_id is 'me/a b', expected user/name"),
    ],
)
def test_what_is_wrong_is_told_in_one_line_with_its_place(change, words):
    with pytest.raises(ValueError, match=r"^r\.yaml: ") as caught:
        recipe(change)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: a\nmodel: b", "line 2, column 1: the key 'model' is there twice"),
        ("model: [", "line 1"),
        (
            "data:\n\ttrain: x",
            "line 2, column 1: found character '\\t' that cannot start any token. Indent with spaces.",
        ),
        ("a: &x 1\nb: *x", "line 2, column 4: aliases are not read"),
        ("a: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("model: a\n---\nmodel: b", "expected a single document in the stream, but found another document"),
        ("a: !!timestamp x", "could not determine a constructor"),
        ("a: !!binary aGk=", "could not determine a constructor"),
        ("a: !!set {b}", "could not determine a constructor"),
        ("a: !!omap [b: 1]", "could not determine a constructor"),
        ("a: !own b", "could not determine a constructor"),
        ("b: 1\na: !!bool maybe", "line 2, column 4: 'maybe' is no bool"),
        ("a: !!int one", "'one' is no int"),
        ("a: !!float one", "'one' is no float"),
        ("a: !!null one", "'one' is no null"),
        ("a: !!int [1]", "line 1, column 4: expected a scalar node"),
        ("? [a]\n: 1", "a key is no single value"),
        ("a: 1e999", "1e999 is not a finite number"),
        ("a: .nan", ".nan is not a finite number"),
        ("a: -.inf", "-.inf is not a finite number"),
        (b"\xff\xfe\x00", "no recipe"),
        ("a: \x07", "no recipe"),
        ("[" * 5000, "nested without end"),
        ("a: " + "9" * 5000, "no recipe"),
        ("- model", "it holds no keys with values"),
        ("", "it holds no keys with values"),
        ("x" * (2**20 + 1), "larger than 1,048,576 bytes"),
    ],
)
def test_files_that_are_no_recipes(tmp_path, text, words):
    with pytest.raises(ValueError, match=r"r\.yaml") as caught:
        load(written(tmp_path, text))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("model", "is no key=value"), ("a b=1", "is no key=value"), ("=1", "is no key=value"), ("a..b=1", "is no key=value"),
        ("model.x=1", "model is 'org/name', which has nothing called 'x'"), ("objectives.7=a", "objectives has the items 0 to 1"),
        ("objectives.x=a", "objectives has the items 0 to 1"), ("model=[", "line 1"), ("model=a\nb: c", "line"),
    ],
)  # fmt: skip
def test_changes_that_are_none(change, words):
    with pytest.raises(ValueError, match=r"\.$") as caught:
        override({**LEAST, "objectives": ["TaskLoss", "LogitKD"]}, [change])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
