# SPDX-License-Identifier: Apache-2.0
"""`hfkdq compress` end to end: what it writes, goes on with, repeats bit for bit, prints and refuses."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import optuna
import pytest
import torch
import transformers
import yaml
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hfkdq import CompressionReport
from hfkdq.cli import compress, main
from hfkdq.cli.compress_run import _begun, _digest, _text, send
from hfkdq.cli.compress_search import (
    Halving,
    Watch,
    _check_same,
    _choose,
    _runtimes,
    _structures,
    are_enough,
    outcome_of,
    outcomes_of,
)
from hfkdq.cli.compress_setup import Setup, check_means, set_up
from hfkdq.cli.data import load_split
from hfkdq.cli.interruption import Interruption
from hfkdq.cli.messages import as_keys
from hfkdq.files import sha256_of
from hfkdq.measuring.latency import Latency
from hfkdq.recipes import load, override, read
from hfkdq.recipes.defaults import default_sections, layer_counts
from hfkdq.recipes.goals import Goals
from hfkdq.recipes.parts import parts_of, training_arguments
from hfkdq.recipes.trying import try_training

from . import tiny
from .conftest import THREADS
from .families import FAMILIES
from .launch import accelerate_launch

SHORT = (
    "--max_steps",
    "4",
    "--save_steps",
    "2",
    "--save_strategy",
    "steps",
    "--eval_strategy=no",
    "--use_cpu",
    "--logging_steps",
    "1",
)
UNTIMED = "report.latency_rounds=0"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A classifier of texts with its tokenizer, and a table of texts and labels."""
    folder = tmp_path_factory.mktemp("given")
    names = ["red", "green", "blue"]
    tiny.bert(layers=4, id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)}).save_pretrained(folder / "model")  # fmt: skip
    tiny.tokenizer().save_pretrained(folder / "model")
    random = np.random.default_rng(0)
    texts = [" ".join(f"w{i}" for i in random.integers(90, size=8)) for _ in range(60)]
    Dataset.from_dict({"text": texts, "label": [names[i % 3] for i in range(60)]}).to_csv(folder / "rows.csv")
    return folder


def run(given, folder, *more):
    return main(["compress", str(given / "model"), "--data", str(given / "rows.csv"), "--output-dir", str(folder), *SHORT, UNTIMED, *more])  # fmt: skip


@pytest.fixture(scope="module")
def done(given, tmp_path_factory):
    folder = tmp_path_factory.mktemp("done") / "out"
    torch.set_num_threads(THREADS)  # other tests do
    assert run(given, folder) == 0
    return folder


def hashes(folder):
    return {name: sha256_of(folder / name) for name in ("student/model.safetensors", "onnx/model.onnx")}


def test_a_model_and_data_become_a_smaller_model_its_file_and_its_report(given, done):
    assert sorted(path.name for path in done.iterdir()) == [
        ".hfkdq-compress.json", "README.md", "checkpoints", "onnx", "recipe.yaml", "report.html", "report.json", "report.png",
        "student",
    ]  # fmt: skip
    recipe = yaml.safe_load((done / "recipe.yaml").read_text())
    assert recipe["student"] == {"num_layers": 2}
    assert recipe["objectives"] == [{"TaskLoss": {"weight": 0.5}}, {"LogitKD": {"temperature": 2.0}}, "HiddenStateKD"]
    assert recipe["training"]["max_steps"] == 4
    assert (done / "student" / "recipe.yaml").read_text() == (done / "recipe.yaml").read_text()
    assert AutoModelForSequenceClassification.from_pretrained(done / "student").config.num_hidden_layers == 2
    report = CompressionReport.load(done / "report.json")
    assert [engine.name for engine in report.engines] == ["teacher", "student", "ONNX int8"]
    assert report.engines[1].metrics == report.engines[2].metrics
    assert report.samples == 6  # a tenth of 60 rows, kept back
    assert report.engines[2].size < 0.5 * report.engines[0].size
    card = (done / "README.md").read_text()
    assert "HiddenStateKD" in card
    assert str(given) not in card
    assert "(report.png)" in card
    assert '.from_pretrained("onnx")  # beside this file' in card
    assert report.curves["logit_kd"][-1][0] == 4
    page = (done / "report.html").read_text()
    assert all(words in page for words in ("logit_kd", "2 of the teacher", "HiddenStateKD"))


def test_the_saved_recipe_does_the_same_again_bit_for_bit(done, tmp_path):
    assert main(["compress", str(done / "recipe.yaml"), "--output-dir", str(tmp_path / "again")]) == 0
    assert hashes(tmp_path / "again") == hashes(done)
    assert load(tmp_path / "again" / "recipe.yaml") == load(done / "recipe.yaml")


@pytest.mark.parametrize("options", [(), ("--save_strategy", "no")], ids=["", "no checkpoints"])
def test_what_failed_after_the_training_is_done_again_without_it(given, done, tmp_path, monkeypatch, capsys, options):
    def fails(*args, **kwargs):
        raise RuntimeError("no space\nleft")

    folder = tmp_path / "out"
    with monkeypatch.context() as changed:
        changed.setattr("hfkdq.cli.compress_run.export_onnx", fails)
        assert run(given, folder, *options) == 1
    assert capsys.readouterr().err.strip().splitlines()[-1] == "hfkdq compress: no space left"
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "recipe.yaml"]
    steps = []
    monkeypatch.setattr("hfkdq.cli.interruption.Interruption.on_step_end", lambda *args, **kwargs: steps.append(1))
    assert run(given, folder, *options) == 0
    assert not steps
    assert hashes(folder) == hashes(done)
    assert any((folder / "checkpoints").iterdir()) == (not options)


@pytest.fixture(autouse=True)
def _heeds_ctrl_c():
    """A shell has what it starts in the background ignore Ctrl-C, and so may whatever runs these tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_keeps_a_checkpoint_and_goes_on(given, done, tmp_path, monkeypatch, capsys, number):
    class Asks(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            assert state.global_step == state.max_steps

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                os.kill(os.getpid(), number)

    trainer = Setup.trainer
    monkeypatch.setattr(Setup, "trainer", lambda self, *args, **more: trainer(self, *args, Asks(), **more))
    folder = tmp_path / "out"
    if number == signal.SIGINT:
        assert run(given, folder, "--eval_strategy", "epoch") == 130
    else:
        with pytest.raises(SystemExit, match="143"):
            run(given, folder, "--eval_strategy", "epoch")
    assert "the same command goes on" in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "recipe.yaml"]
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["checkpoint-3"]
    assert run(given, folder, "--learning_rate", "1e-3") == 1
    assert f"{folder} holds a run with other settings in training" in capsys.readouterr().err
    monkeypatch.setattr(Setup, "trainer", trainer)
    assert run(given, folder, "--eval_strategy", "epoch") == 0
    assert hashes(folder) == hashes(done)


def test_a_finished_run_and_files_of_others_are_left_alone(given, done, tmp_path, capsys):
    before = hashes(done)
    assert run(given, done) == 1
    assert "holds the result of a finished run" in capsys.readouterr().err
    assert hashes(done) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    assert run(given, tmp_path / "mine") == 1
    assert "holds files and no recipe.yaml" in capsys.readouterr().err
    assert run(given, tmp_path / "mine" / "notes.txt") == 1
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_a_dry_run_prints_the_plan_and_writes_nothing(given, tmp_path, capsys):
    assert run(given, tmp_path / "out", "--dry-run", "pruning={structure: neuron, sparsity: 0.5, rounds: 3}") == 0
    told = capsys.readouterr().out
    plan, _, recipe = told.partition("\n\n")
    assert "BertForSequenceClassification, 2 layers" in plan
    assert "54 rows" in plan
    assert "6 rows" in plan
    assert "4 steps of 16 rows" in " ".join(plan.split())
    assert "of training" in plan
    assert "before anything is pruned" in " ".join(plan.split())
    (tmp_path / "r.yaml").write_text(recipe)
    assert read(load(tmp_path / "r.yaml")).pruning["rounds"] == 3
    assert not (tmp_path / "out").exists()


def test_sections_are_left_out_and_values_come_from_options_too(given, tmp_path, monkeypatch):
    (tmp_path / "r.yaml").write_text(
        f"model: {given / 'model'}\ndata: {{train: {given / 'rows.csv'}}}\npruning: {{structure: neuron, sparsity: 0.5}}\n"
        "training: {max_steps: 2, save_strategy: no, use_cpu: true}\n"
    )
    out = tmp_path / "out"
    assert main(["compress", str(tmp_path / "r.yaml"), "--output_dir", str(out), "--learning_rate", "1e-3"]) == 0
    assert load(out / "recipe.yaml")["training"]["learning_rate"] == 1e-3
    assert sorted(path.name for path in out.iterdir()) == [
        ".hfkdq-compress.json",
        "checkpoints",
        "recipe.yaml",
        "student",
    ]
    assert main(["compress", str(tmp_path / "r.yaml"), "--output_dir", str(out), "--learning_rate", "1e-3"]) == 1
    model = AutoModelForSequenceClassification.from_pretrained(out / "student")
    assert (model.config.num_hidden_layers, model.config.intermediate_size) == (4, 32)
    pushed = []
    monkeypatch.setattr("hfkdq.cli.compress_run.push_to_hub", lambda *args, **kwargs: pushed.append((args, kwargs)))
    monkeypatch.setattr("hfkdq.cli.compress_setup.check_login", lambda: None)
    more = ["export.quantization=float32", "push={repo_id: me/it, private: true}", "pruning=null"]
    assert main(["compress", str(tmp_path / "r.yaml"), "--output_dir", str(tmp_path / "pushed"), *more]) == 0
    ((folder, repo_id), settings) = pushed[0][0], pushed[0][1]
    assert (folder, repo_id) == (tmp_path / "pushed" / "onnx", "me/it")
    assert settings["private"] is True
    assert (folder / "model.onnx").is_file()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "Name a recipe"),
        (("nothing.yaml",), "There is no recipe nothing.yaml"),
        (("org/name",), "For a default recipe name its data too"),
        (("./nothing", "--data", "{rows}"), "There is no file or folder ./nothing"),
        (("{model}", "--data", "nothing.csv"), "There is no file or folder nothing.csv"),
        (("{rows}", "--data", "{rows}"), "is a recipe"),
        (("{model}", "--data", "{rows}", "stduent=null"), "there is no 'stduent'; did you mean student"),
        (("{model}", "--data", "{rows}", "student.num_layers=x"), "student.num_layers is 'x', expected an integer"),
        (("{model}", "--data", "{rows}", "quantization.weight_bits=7"), "weight_bits=7 does not exist"),
        (("{model}", "--data", "{rows}", "training.lr_scheduler_type=no_such"), "no_such"),
        (("{model}", "--data", "{rows}", "data.text_columns=[label, nothing]", "--max_steps", "1"), "data.text_columns nothing"),
        (("{model}", "--data", "{rows}", "objectives.7=TaskLoss"), "objectives has the items 0 to 2" ),
        (("{model}", "--data", "{rows}", "teacher={model}", "objectives=[TaskLoss]"), "nothing is learned from teacher"),
        (("{model}", "--data", "{rows}", "export.metric=nothing"), "export.metric is 'nothing', and what is measured are accuracy, f1"),
        (("{model}", "--data", "{rows}", "training.metric_for_best_model=eval_wer"), "training.metric_for_best_model is 'wer'"),
        (("{model}", "--data", "{rows}", "--output_dir", "{rows}"), "is a file"),
        (("{model}", "--data", ""), "data.train is empty"),
        (("{model}", "--data", "{rows}", "--trials", "3"), "Name a goal too"),
        (("{model}", "--data", "{rows}", "data.max_length=65"), "max_length=65 is more than the 64 positions that BertForSequenceClassification has. Leave it out, or name 64 at most"),
        (("{model}", "--data", "{rows}", "--trials", "0", "--keep", "0.9"), "--trials must be 1 or more, got 0"),
        (("{model}", "--data", "{rows}", "--unlabelled", "nothing.csv"), "There is no file or folder nothing.csv"),
        (("{model}", "--data", "{rows}", "--unlabelled", "{rows}", "objectives=[TaskLoss]"), "data.unlabelled needs a teacher"),
        (("{model}", "--unlabelled", "{rows}"), "--unlabelled goes with a model and --data"),
        (("./a b",), "hfkdq compress './a b' --data DATA"),
        (("a b.yaml", "--data", "{rows} x"), "Write 'data.train={rows} x' instead"),
        (("{model}", "--data", "{rows}", "--keep", "0.9", "--storage", "nothing://here"), "cannot be kept in nothing://here"),
        (("{model}", "--data", "{rows}", "--dry-run", "pruning={structure: channel, sparsity: 0.5}"), "channel"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_in_one_line(given, tmp_path, monkeypatch, capsys, words, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a b").mkdir()
    *words, told = (
        word if "{m" not in word and "{r" not in word else word.format(model=given / "model", rows=given / "rows.csv")
        for word in (*words, told)
    )
    assert main(["compress", *words]) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert told in error[-1]
    assert error[-1].startswith("hfkdq compress: ")
    assert not list(tmp_path.glob("*-compressed"))


@pytest.mark.every_case
@pytest.mark.parametrize(
    ("training", "told"),
    [
        ("{lr_scheduler_kwargs: {nothing: 1}}", "training.lr_scheduler_type linear takes none, and lr_scheduler_kwargs is {'nothing': 1}"),
        ("{lr_scheduler_type: constant, lr_scheduler_kwargs: {power: 2}}", "constant takes none, and lr_scheduler_kwargs is"),
        ("{lr_scheduler_type: cosine_with_min_lr}", "takes num_cycles, min_lr, min_lr_rate, and lr_scheduler_kwargs is {}: One of min_lr"),
        ("{lr_scheduler_type: cosine, lr_scheduler_kwargs: {num_cycles: x}}", "cosine takes num_cycles, and lr_scheduler_kwargs is"),
        ("{lr_scheduler_type: reduce_lr_on_plateau, eval_strategy: epoch, lr_scheduler_kwargs: {factor: 2}}", "Factor should be < 1.0"),
        ("{optim: adamw_torch, optim_args: beta}", "training.optim adamw_torch with optim_args 'beta' (which are name=value,name=value)"),
        ("{optim: adafactor, optim_args: beta3=0.9}", "adafactor with optim_args 'beta3=0.9' (which are name=value,name=value): this optimizer takes no beta3"),
        ("{optim: rmsprop_bnb, optim_args: alhpa=0.9}", "training.optim rmsprop_bnb with optim_args"),
        ("{neftune_noise_alpha: -1}", "training.neftune_noise_alpha must be 0 or more, got -1"),
        ("{report_to: no_such}", "training: no_such is not supported"),
    ],
)  # fmt: skip
def test_arguments_of_the_training_are_tried_before_a_model_is_loaded(
    given, tmp_path, monkeypatch, capsys, training, told
):
    monkeypatch.chdir(tmp_path)
    words = ["compress", "org/name", "--data", str(given / "rows.csv"), f"training={training}"]
    assert main([*words, "--output-dir", "out"]) == 1
    assert told in capsys.readouterr().err.strip().splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "training",
    [
        "{lr_scheduler_type: cosine_with_min_lr, lr_scheduler_kwargs: {min_lr: 1e-6}, warmup_steps: 5}",
        "{lr_scheduler_type: reduce_lr_on_plateau, eval_strategy: epoch, lr_scheduler_kwargs: {factor: 0.5}}",
        "{lr_scheduler_type: warmup_stable_decay, lr_scheduler_kwargs: {num_decay_steps: 2000}}",
        "{optim: adafactor, neftune_noise_alpha: 5, gradient_checkpointing: true, dataloader_num_workers: 2}",
        "{save_strategy: epoch, eval_strategy: epoch, load_best_model_at_end: true, metric_for_best_model: f1}",
    ],
)
def test_what_a_training_can_be_told_passes_the_trial(tmp_path, training):
    recipe = read(override({"model": "org/name", "data": {"train": "rows.csv"}}, [f"training={training}"]))
    try_training(training_arguments(parts_of(recipe), str(tmp_path), generates=True, use_cpu=True))


@pytest.mark.every_case
@pytest.mark.parametrize("options", [(), ("--dry-run",)])
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (("export.task=nothing",), "export.task: "),
        (("export.task=feature-extraction",), "export.task"),
        (("export.quantization=int4_weights",), "export.quantization is 'int4_weights', and quantization trains other integers"),
        (("export.integer_convolutions=true", "quantization=null"), "export.integer_convolutions needs 8-bit inputs"),
        (("data.calibration={numbers}",), "data.calibration: BertForSequenceClassification reads one or two columns"),
        (("push.repo_id=me/it",), "HF_HUB_OFFLINE=1 forbids it"),
        (("training.load_best_model_at_end=true", "training.eval_strategy=epoch"), "training: --load_best_model_at_end requires"),
        (("export.target=openvino", "export.weight_type=uint8"), 'weight_type="uint8" is for products of ONNX Runtime'),
    ],
)  # fmt: skip
def test_what_would_fail_after_the_training_is_told_before(
    given, tmp_path, monkeypatch, capsys, changes, told, options
):
    (tmp_path / "numbers.csv").write_text("number\n1\n2\n")
    monkeypatch.setattr(Setup, "trainer", lambda *args, **more: pytest.fail("it was trained"))
    changes = [change.format(numbers=tmp_path / "numbers.csv") for change in changes]
    assert run(given, tmp_path / "out", *changes, *options) == 1
    assert told in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(find_spec("openvino") is None, reason="needs openvino")
def test_openvino_for_a_model_that_generates_is_refused_before_the_training(tmp_path):
    tiny.t5().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    Dataset.from_dict({"source": WORDS, "target": WORDS}).to_parquet(tmp_path / "rows.parquet")
    recipe = {"model": str(tmp_path / "model"), "data": {"train": str(tmp_path / "rows.parquet")}}
    with pytest.raises(ValueError, match=r"T5ForConditionalGeneration generates .*target=\"onnxruntime\""):
        set_up(read({**recipe, "export": {"target": "openvino"}}), None, "r")


def test_what_the_end_of_a_run_would_lack_is_told_before(monkeypatch):
    recipe = read({"model": "org/name", "data": {"train": "rows.csv"}, "export": {}, "report": {}})
    check_means(recipe)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"need matplotlib: pip install"):
        check_means(recipe)
    is_5 = transformers.__version__.startswith("5")
    monkeypatch.delattr("hfkdq.export.exporters_backend" if is_5 else "hfkdq.export.optimum_backend", raising=False)
    monkeypatch.setitem(sys.modules, f"hfkdq.export.{'exporters' if is_5 else 'optimum'}_backend", None)
    with pytest.raises(RuntimeError, match="which failed to import"):
        check_means(recipe)


@pytest.mark.parametrize(
    "change",
    [
        "objectives=[{HiddenStateKD: {layers: {9: 1}}}]",
        "training={gradient_checkpointing: true, gradient_checkpointing_kwargs: {nothing: 1}}",
        "training.lr_scheduler_kwargs={nothing: 1}",
    ],
)
def test_a_run_that_fails_before_its_first_checkpoint_leaves_nothing_in_the_way(given, tmp_path, capsys, change):
    folder = tmp_path / "out"
    assert run(given, folder, change) == 1
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("hfkdq compress: ")
    assert not folder.exists()


def test_a_run_goes_on_with_the_rows_that_it_began_with_alone(tmp_path):
    rows = [Dataset.from_dict({"text": ["a", "b"], "label": [0, label]}) for label in (0, 1)]
    assert _digest(rows[0]) == _digest(Dataset.from_list(rows[0].to_list()).with_transform(dict))
    assert len({_digest(rows[0]), _digest(rows[1]), _digest(rows[0].select([1, 0])), _digest(*rows)}) == 4
    recipe = read({"model": "org/name", "data": {"train": "rows.csv"}})
    begun = [_text(recipe, _digest(table)) for table in rows]
    folder = tmp_path / "a run"

    def begin(recipe, text):
        with _begun(recipe, text, folder):
            (folder / "checkpoints" / "checkpoint-1").mkdir(parents=True, exist_ok=True)
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            begin(recipe, begun[0])
    with pytest.raises(FileExistsError, match="have changed since"):
        begin(recipe, begun[1])
    other = read({"model": "org/name", "data": {"train": "other.csv"}})
    with pytest.raises(FileExistsError, match=r"settings in data\..* --output-dir '.*a run'$"):
        begin(other, begun[0])


def test_a_search_that_no_trial_could_do_is_refused_before_there_is_a_study(given, tmp_path, capsys):
    assert run(given, tmp_path / "out", "--keep", "0.5", "data.text_columns=[nothing]") == 1
    assert "data.text_columns nothing: no column of strings" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("event", ["on_step_end", "on_evaluate"])
def test_a_signal_in_the_last_step_or_evaluation_ends_the_run_with_its_checkpoint(tmp_path, event):
    interruption, control = Interruption(), TrainerControl()
    state, args = TrainerState(global_step=4, max_steps=4), TrainingArguments(tmp_path, use_cpu=True, report_to="none")
    with interruption.watching():
        getattr(interruption, event)(args, state, control)
        assert not control.should_save
        interruption.raise_if_over()
        os.kill(os.getpid(), signal.SIGINT)
        getattr(interruption, event)(args, state, control)
    assert control.should_save
    with pytest.raises(KeyboardInterrupt):
        interruption.raise_if_over()


def test_a_signal_after_the_last_checkpoint_is_not_lost_and_one_that_is_ignored_stays_so():
    interruption = Interruption()
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup has it
    try:
        with interruption.watching():
            os.kill(os.getpid(), signal.SIGHUP)
            interruption.raise_if_over()
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGHUP, before)
    with pytest.raises(SystemExit, match="143"):
        interruption.raise_if_over()


def test_a_push_that_fails_says_how_to_send_without_another_run(tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("the Hub is away.")

    monkeypatch.setattr("hfkdq.cli.compress_run.push_to_hub", fails)
    sections = {"model": "org/name", "data": {"train": "rows.csv"}, "export": {}}
    send(read(sections), tmp_path, None)
    with pytest.raises(
        RuntimeError, match=r"the Hub is away\. The run is finished; to send its file: hfkdq push"
    ) as caught:
        send(read({**sections, "push": {"repo_id": "me/it"}}), tmp_path / "a run", None)
    command = shlex.split(str(caught.value).rpartition("hfkdq ")[2])
    assert command == ["push", str(tmp_path / "a run" / "onnx"), "me/it"]


@pytest.mark.parametrize(("layers", "found"), [(1, {}), (3, {"num_layers": 3})])
def test_all_layers_may_stay_and_a_single_one_does(layers, found):
    model = tiny.bert(layers=layers)
    assert layer_counts(model) == found
    assert default_sections(model).get("student") == ({"num_layers": 1} if found else None)


@pytest.mark.parametrize(("family", "is_convolutional"), [("resnet", True), ("vit", False), ("wav2vec2", False)])
def test_networks_of_convolutions_compute_with_bytes(family, is_convolutional):
    expected = {"integer_convolutions": True} if is_convolutional else {}
    assert default_sections(FAMILIES[family].make())["export"] == expected


def test_a_study_goes_on_with_what_it_was_begun_for_alone():
    study, of = optuna.create_study(), {"model": "org/name", "--max-latency": False}
    _check_same(study, of, None)
    _check_same(study, of, None)
    with pytest.raises(ValueError, match=r"another --max-latency\. Name another folder with --output-dir"):
        _check_same(study, {**of, "--max-latency": True}, None)
    with pytest.raises(ValueError, match=r"another model\. Name another --storage"):
        _check_same(study, {**of, "model": "org/other"}, "sqlite:///shared.db")


def test_a_search_leaves_the_recipes_of_others_alone(given, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("mine")
    assert run(given, tmp_path, "--keep", "0.5") == 1
    assert "holds files and no search of an earlier run" in capsys.readouterr().err
    assert (tmp_path / "recipe.yaml").read_text() == "mine"
    assert not (tmp_path / "search").exists()


@pytest.mark.parametrize(
    ("before", "kept", "share"), [(0.5, 0.25, 0.5), (0.0, 0.1, 1.0), (-0.2, -0.4, 0.0), (-0.2, 0.1, 1.0)]
)
def test_a_model_without_merit_is_kept_by_what_is_no_worse(before, kept, share):
    rows = [SimpleNamespace(metrics={"spearman": value}, size=1, latency=None) for value in (before, kept)]
    assert outcome_of(SimpleNamespace(engines=rows), "spearman").kept == share


def test_layers_that_are_named_take_the_place_of_their_number(given):
    recipe = read(override({}, [f"model={given / 'model'}", f"data.train={given / 'rows.csv'}"]))
    setup = set_up(recipe, ["student.layers=[1, 4]", "training.use_cpu=true"], "r")
    assert (setup.recipe.student.layers, setup.recipe.student.num_layers) == ([1, 4], None)
    assert setup.student.config.num_hidden_layers == 2


def test_advice_of_the_readers_of_data_can_be_typed():
    told = as_keys("Name the two with --text-columns SOURCE,TARGET.")
    assert told == "Name the two with data.text_columns=[SOURCE,TARGET]."
    change = re.search(r"data\.\S+\]", told)[0]
    assert compress.parse(["r.yaml", change]).changes == [change]
    assert override({}, [change]) == {"data": {"text_columns": ["SOURCE", "TARGET"]}}


def test_options_of_training_arguments_follow_the_parser_of_transformers(capsys):
    options = compress.parse(["r.yaml", "--bf16", "a=1", "--learning_rate=1e-4", "b.c=[1, 2]", "--report_to", "none"])
    assert options.source == "r.yaml"
    assert options.changes == ["a=1", "b.c=[1, 2]"]
    assert options.training == {"bf16": True, "learning_rate": 1e-4, "report_to": "none"}
    assert compress.parse(["r.yaml"]).training == {}
    with pytest.raises(SystemExit):
        compress.parse(["r.yaml", "--learning_rat", "1"])
    assert "--learning_rat" in capsys.readouterr().err


def test_help_and_schema_are_printed():
    done = subprocess.run(
        [sys.executable, "-m", "hfkdq", "compress", "--schema"], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["properties"]["model"]["type"] == "string"
    shown = subprocess.run(
        [sys.executable, "-m", "hfkdq", "compress", "--help"], capture_output=True, text=True, check=True
    )
    assert "--dry-run" in shown.stdout
    assert "TrainingArguments" in shown.stdout


def test_rows_are_kept_back_where_there_is_one_split_alone(tmp_path):
    Dataset.from_dict({"n": list(range(40))}).to_parquet(tmp_path / "one.parquet")
    (train, said), (kept, _) = load_split(str(tmp_path / "one.parquet"), None, None)
    assert sorted([*train["n"], *kept["n"]]) == list(range(40))
    assert len(kept) == 4
    assert "36 rows" in said
    again = load_split(str(tmp_path / "one.parquet"), 5, 2)
    assert (len(again[0][0]), len(again[1][0])) == (5, 2)
    assert set(again[1][0]["n"]) <= set(kept["n"])
    for name in ("train", "validation"):
        (tmp_path / "both").mkdir(exist_ok=True)
        Dataset.from_dict({"n": [len(name)] * 3}).to_parquet(tmp_path / "both" / f"{name}.parquet")
    (train, _), (other, _) = load_split(str(tmp_path / "both"), None, None)
    assert set(train["n"]) == {5}
    assert set(other["n"]) == {10}


def test_rows_without_labels_are_learned_from_the_teacher_alone(given, tmp_path):
    more = {
        "n": list(range(40)),
        "text": [f"w{i} w{i + 1}" for i in range(40)],
        "label": ["nothing that is known"] * 40,
    }
    Dataset.from_dict(more).to_parquet(tmp_path / "more.parquet")
    data = [
        f"model={given / 'model'}",
        f"data.train={given / 'rows.csv'}",
        f"data.unlabelled={tmp_path / 'more.parquet'}",
    ]
    training = "training={num_train_epochs: 1, per_device_train_batch_size: 1, logging_steps: 1, use_cpu: true, save_strategy: no}"
    setup = set_up(read(override({}, data)), [training], "r")
    alone = set_up(read(override({}, data[:2])), [training], "r")
    assert len(alone.train) == 54
    assert setup.train[:]["labels"] == [*alone.train[:]["labels"], *[-100] * 40]
    assert setup.train[:54]["input_ids"] == alone.train[:]["input_ids"]
    assert setup.train[54]["input_ids"] == setup.processor("w0 w1")["input_ids"]
    assert setup.evaluation[:]["labels"] == alone.evaluation[:]["labels"]
    assert setup.recipe.objectives == [{"TaskLoss": {"weight": 0.29}}, *alone.recipe.objectives[1:]]  # 54 of 94 rows
    trainer = setup.trainer(tmp_path / "out")
    trainer.train()
    steps = [step for step in trainer.state.log_history if "logit_kd" in step]
    assert sum(step["task_loss"] == 0 for step in steps) == 40  # a step is one row
    assert all(step["logit_kd"] > 0 for step in steps)


@pytest.mark.parametrize(
    ("make", "rows", "more", "told"),
    [
        (lambda: tiny.bert(labels=1), {"text": ["w1"] * 20, "label": [0.5] * 20}, {"text": ["w2"]}, "is for models that choose one class"),
        (tiny.bert_tokens, {"tokens": [["w1"]] * 20, "ner_tags": [[0]] * 20}, {"tokens": [["w2"]]}, "is for models that choose one class"),
        (tiny.bert, {"text": ["w1"] * 20, "label": [0] * 20}, {"said": ["w2"]}, "would read said of 1 rows"),
    ],
)  # fmt: skip
def test_rows_without_labels_are_refused_where_no_class_is_chosen_or_columns_differ(tmp_path, make, rows, more, told):
    make().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    for name, columns in (("rows", rows), ("more", more)):
        Dataset.from_dict(columns).to_parquet(tmp_path / f"{name}.parquet")
    data = {"train": f"{tmp_path / 'rows.parquet'}", "unlabelled": f"{tmp_path / 'more.parquet'}"}
    with pytest.raises(ValueError, match=told):
        set_up(read({"model": str(tmp_path / "model"), "data": data}), [], "r")


WORDS = [" ".join(f"w{i + j}" for j in range(12)) for i in range(20)]
TASKS = {
    "tokens": (tiny.bert_tokens, {"tokens": [text.split() for text in WORDS], "ner_tags": [[0, 1, 2] * 4] * 20}),
    "masked": (tiny.bert_mlm, {"text": WORDS}),
    "next": (lambda: tiny.llama(layers=4), {"text": WORDS}),
    "translation": (tiny.t5, {"source": WORDS, "target": WORDS[::-1]}),
    "regression": (lambda: tiny.bert(labels=1), {"text": WORDS, "label": [i / 20 for i in range(20)]}),
}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_a_recipe_that_trains(tmp_path, task):
    make, rows = TASKS[task]
    make().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    Dataset.from_dict(rows).to_parquet(tmp_path / "rows.parquet")
    recipe = read(override({}, [f"model={tmp_path / 'model'}", f"data.train={tmp_path / 'rows.parquet'}"]))
    setup = set_up(recipe, ["training={max_steps: 1, use_cpu: true, save_strategy: no}"], "r")
    named = [name for entry in setup.recipe.objectives for name in ([entry] if isinstance(entry, str) else entry)]
    assert named[:2] == ["TaskLoss", "LogitKD"]
    assert ({"divergence": "mse"} in setup.recipe.objectives[1].values()) == (task == "regression")
    assert setup.recipe.student.num_layers == setup.original.config.num_hidden_layers // 2
    trainer = setup.trainer(tmp_path / "out")
    trainer.train()
    assert getattr(trainer.args, "generation_max_length", 129) == 129
    assert all(np.isfinite(value) for value in trainer.evaluate().values())


def searching(given, out, *options):
    """The command that searches for goals."""
    return ["compress", str(given / "model"), "--data", str(given / "rows.csv"), "--output-dir", str(out), *options]


@pytest.mark.one_line
def test_goals_are_searched_until_the_best_that_meets_them_is_found(given, tmp_path, capsys, monkeypatch):
    pushed = []
    monkeypatch.setattr(
        "hfkdq.cli.compress_run.push_to_hub", lambda folder, repo_id, **_: pushed.append((folder, repo_id))
    )
    monkeypatch.setattr("hfkdq.cli.compress_setup.check_login", lambda: None)
    out, settings = tmp_path / "out", (*SHORT[:2], "--use_cpu", "--trials", "3", "--keep", "0.1", "--max-size", "1MB")
    command = searching(given, out, *settings)
    assert main([*command, "push.repo_id=me/it"]) == 0
    assert pushed == [(out / "onnx", "me/it")]  # of all trials the best alone
    told = capsys.readouterr().out
    assert "3 trials, the best of them" in told
    study = optuna.load_study(study_name="hfkdq compress", storage=f"sqlite:///{out / 'search' / 'study.db'}")
    found = outcomes_of(study)
    best = Goals(keep=0.1, max_size=1e6).best(found)
    assert found[best].kept == max(outcome.kept for outcome in found.values())
    assert sha256_of(out / "onnx" / "model.onnx") == sha256_of(
        out / "search" / f"trial-{best}" / "onnx" / "model.onnx"
    )
    assert load(out / "recipe.yaml")["student"]["num_layers"] == study.trials[best].params["num_layers"]
    assert outcome_of(CompressionReport.load(out / "report.json"), "accuracy") == found[best]
    assert not list(out.glob("search/*/checkpoints"))
    shared = ["push.repo_id=me/it", "--storage", f"sqlite:///{out / 'search' / 'study.db'}"]
    assert main([*searching(given, tmp_path / "other", *settings), *shared]) == 0
    assert hashes(tmp_path / "other") == hashes(out)
    shutil.move(out / "search" / f"trial-{best}", tmp_path / "away")
    assert main([*searching(given, tmp_path / "third", *settings), *shared]) == 1
    assert f"is not in {out / 'search' / f'trial-{best}'} on this machine" in capsys.readouterr().err


def test_a_search_tries_vocabularies_and_runtimes_where_there_are_some(given, monkeypatch):
    recipe = read({"model": str(given / "model"), "data": {"train": str(given / "rows.csv")}, "export": {}})
    setup = set_up(recipe, ["training.use_cpu=true"], "r")
    monkeypatch.setattr("hfkdq.cli.compress_search.prune", lambda *_: None)  # any width can go
    widths = ["neuron", "head", "hidden"]
    assert _structures(setup) == [*widths, "vocab"]
    assert _structures(replace(setup, processor=None)) == widths
    assert (
        _structures(replace(setup, original=tiny.llama(layers=1))) == widths
    )  # of fewer tokens the right one is likelier
    monkeypatch.setattr("hfkdq.cli.compress_search.find_spec", lambda name: object())
    assert _runtimes(setup, ["training.use_cpu=true"]) == ["onnxruntime", "openvino"]
    assert _runtimes(setup, ["export.target=standard"]) == []
    assert _runtimes(replace(setup, student=tiny.llama(layers=1)), []) == []  # which has a cache
    monkeypatch.setattr("hfkdq.cli.compress_search.find_spec", lambda name: None)
    assert _runtimes(setup, []) == []
    trial = optuna.trial.FixedTrial({"num_layers": 2, "pruning": "vocab", "bits": "8 bits", "runtime": "openvino"})
    chosen = _choose(trial, {"num_layers": 3}, ["vocab"], ["onnxruntime", "openvino"])
    assert chosen[1:] == [
        "pruning={structure: vocab}", "quantization={weight_bits: 8, activation_bits: 8}", "export.target=openvino",
    ]  # fmt: skip
    assert len(_choose(trial, {"num_layers": 3}, ["vocab"], [])) == 3
    trial = optuna.trial.FixedTrial({"bits": "4-bit weights"})
    (floats,) = _choose(trial, {}, [], [])
    assert read(override({}, [f"model={given}", "data.train=rows.csv", floats])).quantization == {
        "weight_bits": 4, "activation_bits": None,
    }  # fmt: skip
    trial = optuna.trial.FixedTrial({"pruning": "head and vocab", "sparsity": 0.25})
    assert _choose(trial, {}, ["head", "vocab"], [], []) == [
        "pruning=[{structure: head, sparsity: 0.25}, {structure: vocab}]"
    ]


@pytest.mark.one_line
def test_a_student_loses_the_tokens_that_its_training_does_not_use(given, tmp_path):
    """In the end, with a tokenizer and rows of its own; the teacher keeps its own."""
    texts = [" ".join(f"w{(i * j) % 30}" for j in range(1, 9)) for i in range(40)]
    rows = Dataset.from_dict({"text": texts, "label": [i % 3 for i in range(40)]})
    rows.to_parquet(tmp_path / "rows.parquet")
    command = ["compress", str(given / "model"), "--data", str(tmp_path / "rows.parquet"), *SHORT, UNTIMED]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main([*command, "--output-dir", str(whole)]) == 0
    assert main([*command, "--output-dir", str(out), "pruning={structure: vocab}"]) == 0
    for place in ("student", "onnx"):
        tokenizer = AutoTokenizer.from_pretrained(out / place)
        assert {f"w{i}" for i in range(30)} <= tokenizer.get_vocab().keys()
        assert len(tokenizer) == 35  # of 95
        config = json.loads((out / place / "config.json").read_text())
        assert (config["vocab_size"], config["hfkdq"]["vocabulary"]["tokens_after"]) == (35, 35)
    before, after = (CompressionReport.load(folder / "report.json") for folder in (whole, out))
    assert [engine.name for engine in after.engines] == ["teacher", "student", "ONNX int8"]
    # Every text is cut as before, so that nothing else changes.
    assert [engine.metrics for engine in after.engines] == [engine.metrics for engine in before.engines]
    assert after.engines[0].size == before.engines[0].size
    assert after.engines[1].parameters == before.engines[1].parameters - 60 * 32
    assert after.engines[2].size < before.engines[2].size
    assert (after.training, after.curves) == (before.training, before.curves)
    assert "of the vocabulary" in (out / "README.md").read_text()


@pytest.mark.one_line
def test_a_vocabulary_goes_beside_what_else_is_pruned(given, tmp_path):
    texts = [" ".join(f"w{(i * j) % 30}" for j in range(1, 9)) for i in range(40)]
    Dataset.from_dict({"text": texts, "label": [i % 3 for i in range(40)]}).to_parquet(tmp_path / "rows.parquet")
    command = ["compress", str(given / "model"), "--data", str(tmp_path / "rows.parquet"), *SHORT, UNTIMED]
    others = "{structure: neuron, sparsity: 0.5}, {structure: weight, sparsity: 0.25}"
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main([*command, "--output-dir", str(whole), f"pruning=[{others}]"]) == 0
    assert main([*command, "--output-dir", str(out), f"pruning=[{others}, {{structure: vocab}}]"]) == 0
    config = json.loads((out / "student" / "config.json").read_text())
    assert (config["vocab_size"], config["intermediate_size"]) == (35, 32)
    pruning = config["hfkdq"]["pruning"]
    assert [fact["spec"]["structure"] for fact in (*pruning["earlier"], pruning)] == ["neuron", "weight", "vocab"]
    before, after = (CompressionReport.load(folder / "report.json") for folder in (whole, out))
    assert [engine.metrics for engine in after.engines] == [engine.metrics for engine in before.engines]
    assert after.engines[1].metrics == after.engines[2].metrics
    assert after.engines[1].parameters == before.engines[1].parameters - 60 * 32
    card = (out / "README.md").read_text()
    assert all(
        words in card for words in ("feed-forward neurons", "of the weights", "of the vocabulary", "zeroed weights")
    )


@pytest.mark.one_line
def test_what_is_said_of_a_recipe_holds_in_every_trial(given, tmp_path, monkeypatch, capsys):
    tried = []

    def carry_out(setup, *_):
        tried.append(setup.recipe)
        raise ValueError("that was it")

    monkeypatch.setattr("hfkdq.cli.compress_search.carry_out", carry_out)
    monkeypatch.setattr("hfkdq.cli.compress_search._structures", lambda setup: ["neuron", "vocab"])
    said = ["student.layers=[1, 4]", "pruning={structure: neuron, sparsity: 0.1}", "quantization.weight_bits=2"]
    goals = ("--use_cpu", "--trials", "6", "--keep", "0.5")
    assert main([*searching(given, tmp_path / "all", *goals, *said)]) == 1
    assert [(r.student.layers, r.pruning["sparsity"], r.quantization["weight_bits"]) for r in tried] == [([1, 4], 0.1, 2)] * 6  # fmt: skip
    tried.clear()
    assert (
        main([*searching(given, tmp_path / "none", *goals, "student=null", "quantization.exclude_modules=classifier")])
        == 1
    )
    assert [(r.student, r.quantization["exclude_modules"]) for r in tried] == [(None, "classifier")] * 6
    assert len({json.dumps([r.pruning, r.quantization]) for r in tried}) > 1
    assert "6 failed, the last with: that was it" in capsys.readouterr().err


@pytest.mark.skipif(find_spec("openvino") is None, reason="needs openvino")
@pytest.mark.one_line
def test_the_runtime_that_meets_a_time_is_chosen(given, tmp_path, monkeypatch):
    """The times are made up: which of two runtimes is faster depends on the machine."""

    def time_engines(engines, **_):
        return [
            Latency(median_ms=1.0 if "openvino" in engine.path.name else 9.0, min_ms=0.9, calls=10)
            for engine in engines
        ]

    monkeypatch.setattr("hfkdq.report.measure.time_engines", time_engines)
    said = ("--max_steps", "1", "--use_cpu", "student.num_layers=1", "pruning=null", "quantization.weight_bits=8")
    out = tmp_path / "out"
    assert main([*searching(given, out, "--trials", "4", "--max-latency", "2ms", *said)]) == 0
    study = optuna.load_study(study_name="hfkdq compress", storage=f"sqlite:///{out / 'search' / 'study.db'}")
    assert {trial.params["runtime"] for trial in study.trials} == {"onnxruntime", "openvino"}
    assert load(out / "recipe.yaml")["export"]["target"] == "openvino"
    assert (out / "onnx" / "openvino_model.xml").is_file()
    assert CompressionReport.load(out / "report.json").engines[-1].latency.median_ms == 1.0


@pytest.mark.parametrize(
    ("metric", "values"), [("accuracy", (0.9, 0.5, 0.95)), ("wer", (0.1, 0.5, 0.05)), ("f1", None)]
)
def test_a_training_that_is_behind_the_others_is_ended(metric, values):
    study = optuna.create_study(direction="maximize", pruner=Halving())
    ended = []
    for value in values or (0.1, 0.5, 0.05):  # without the metric the loss counts
        watch = Watch(study.ask(), metric, optuna.TrialPruned)
        try:
            watch.on_evaluate(None, None, None, metrics={f"eval_{metric}": value} if values else {"eval_loss": value})
            ended.append(False)
        except optuna.TrialPruned:
            ended.append(True)
    assert ended == [False, True, False]


def test_a_small_model_is_held_against_others_that_are_no_larger():
    study = optuna.create_study(direction="maximize", pruner=Halving())
    ended = []
    for size, value in ((9, 0.9), (3, 0.5), (9, 0.6), (3, 0.4), (3, 0.55), (9, float("nan"))):
        trial = study.ask()
        trial.set_user_attr("parameters that are left", size)
        trial.report(value, 1)
        ended.append(trial.should_prune())
    # The third is behind 0.7, the median of 0.9 and 0.5; the fourth behind 0.5, and the fifth before that of 0.5 and 0.4.
    assert ended == [False, False, True, True, False, True]


@pytest.mark.parametrize(
    ("told", "value", "counts"),
    [
        ({}, None, 0),
        ({"error": "e"}, None, 10),
        ({"outcome": {}}, None, 10),
        ({"too large to be trained": True}, 0.5, 1),
        ({}, 0.5, 10),
    ],
)
def test_what_counts_as_one_of_the_trials(told, value, counts):
    """A trial that failed without a word was interrupted; one whose metric is no number failed too, and would come for ever."""
    study = optuna.create_study(direction="maximize")
    for _ in range(10):
        trial = study.ask()
        for name, said in told.items():
            trial.set_user_attr(name, said)
        study.tell(trial, value, state=None if value is not None else optuna.trial.TrialState.FAIL)
    assert are_enough(study, counts)
    assert not are_enough(study, counts + 1)


@pytest.mark.one_line
def test_trials_that_are_too_large_are_none_of_those_that_were_asked_for(given, tmp_path, monkeypatch, capsys):
    tried = []

    def carry_out(setup, *_):
        tried.append(setup.recipe.student.num_layers)
        raise ValueError("that was it")

    monkeypatch.setattr("hfkdq.cli.compress_search.carry_out", carry_out)
    monkeypatch.setattr("hfkdq.cli.compress_search._structures", lambda setup: [])
    monkeypatch.setattr("hfkdq.cli.compress_search.layer_counts", lambda model: {"num_layers": 4})
    goals = ("--use_cpu", "--keep", "0.5", "quantization={weight_bits: 8, activation_bits: 8}")
    number = [sum(p.numel() for p in tiny.bert(layers=n).parameters()) for n in (2, 3)]
    for folder, bound in (("some", sum(number) / 2), ("none", 1)):
        assert main([*searching(given, tmp_path / folder, *goals, "--trials", "2", "--max-size", f"{bound}B")]) == 1
    assert len(tried) == 2
    assert set(tried) <= {1, 2}
    assert "2 failed, the last with" in (told := capsys.readouterr().err)
    assert "No trial came to its end" in told.splitlines()[-1]
    assert "the weights alone of the smallest model of this search are 0.0" in told.splitlines()[-1]
    assert not (tmp_path / "none").exists()


@pytest.mark.one_line
def test_a_search_goes_on_with_the_trial_that_was_interrupted(given, tmp_path, monkeypatch, capsys):
    tried = []

    def carry_out(*_):
        tried.append(1)
        if len(tried) == 2:
            raise KeyboardInterrupt
        raise ValueError("that was it")

    monkeypatch.setattr("hfkdq.cli.compress_search.carry_out", carry_out)
    monkeypatch.setattr("hfkdq.cli.compress_search._structures", lambda setup: [])
    command = searching(given, tmp_path / "out", "--use_cpu", "--keep", "0.5", "--trials", "3")
    assert main(command) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert main(command) == 1
    assert len(tried) == 4
    assert "3 failed, the last with: that was it" in capsys.readouterr().err


@pytest.mark.one_line
def test_a_bound_that_cannot_be_met_is_told_with_what_is_missing(given, tmp_path, capsys):
    out, settings = tmp_path / "out", (*SHORT[:2], "--use_cpu", "--trials", "1", "--max-latency", "1us")
    command = searching(given, out, *settings)
    assert main(command) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "--max-latency 0.001 ms is missed by all: the best has" in error
    assert not (out / "onnx").exists()
    assert main([*command[:6], *settings[:3], "--trials", "1", "--keep", "0.5", "student=null"]) == 1
    assert "The study that is there has another changes" in capsys.readouterr().err


@pytest.mark.one_line
def test_in_several_processes_the_first_one_writes(given, tmp_path):
    script = tmp_path / "run.py"
    script.write_text("import sys\nfrom hfkdq.cli import main\nassert main(sys.argv[1:]) == 0\n")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model: {given / 'model'}\ndata: {{train: {given / 'rows.csv'}}}\nstudent: {{num_layers: 2}}\nobjectives: [TaskLoss, LogitKD]\n"
        "quantization: {}\nexport: {}\nreport: {latency_rounds: 0}\ntraining: {max_steps: 2, save_steps: 1, save_strategy: steps}\n"
    )
    out = tmp_path / "out"
    told = accelerate_launch(script, "compress", recipe, "--output-dir", out)
    assert told.count("ONNX int8") == told.count(f"\n{out}\n") == 1
    assert {path.name for path in out.iterdir()} >= {"onnx", "student", "report.json", "recipe.yaml", "checkpoints"}
    assert (Path(out) / "checkpoints" / "checkpoint-2" / "rng_state_1.pth").is_file()
