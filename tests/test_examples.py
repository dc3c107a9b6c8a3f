# SPDX-License-Identifier: Apache-2.0
"""Every example runs in its `--tiny` form, and those for sound and images on real data as well."""

import importlib
import json
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from datasets import ClassLabel, Dataset
from datasets import Image as ImageFeature
from PIL import Image
from safetensors.torch import load_file

from hfkdq import load_pruned, load_quantized
from hfkdq.schedules import Linear
from tests import tiny
from tests.launch import accelerate_launch

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
OPTIONS = {
    "distill_text_classifier.py": [
        "--tiny",
        "--use_cpu",
        "--max_steps",
        "6",
        "--report_to",
        "none",
        "--neuron_sparsity",
        "0.5",
    ]
}


@pytest.mark.one_line
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("script", sorted(OPTIONS))
def test_example_runs(script, processes, tmp_path):
    if processes == 2 and transformers.__version__.startswith("5"):
        pytest.skip("tracing takes longer on this line, and one process exports there as well")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    launch += ["--multi_gpu" if processes > 1 else "--cpu"]
    arguments = [str(ROOT / "examples" / script), "--output_dir", str(tmp_path / "out"), *OPTIONS[script]]
    done = subprocess.run([*launch, *arguments], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "ONNX int8" in done.stdout
    for name in ("README.md", "report.json", "report.png", "model.safetensors", "onnx-int8/model.onnx"):
        assert (tmp_path / "out" / name).is_file(), name


# ------------------------------------------------------------------ one for each family of objectives and teachers

NO_TERMS = {"loss", "sparsity", "grad_norm", "learning_rate", "epoch", "step"}
FAMILIES = [
    ("several_teachers", "--kind ensemble", {"task_loss", "ensemble_kd"}),
    ("several_teachers", "--kind average", {"task_loss", "logit_kd"}),
    ("several_teachers", "--kind peer", {"task_loss", "logit_kd", "teacher_task_loss", "teacher_logit_kd"}),
    ("cached_teacher", "", {"task_loss", "logit_kd", "hidden_state_kd"}),
    ("progressive_quantization", "", {"task_loss", "logit_kd", "quantization_loss"}),
    ("mixed_precision", "", {"task_loss", "logit_kd"}),
    ("low_bits", "--weight_bits 2", {"task_loss", "logit_kd", "hidden_state_kd"}),
    ("prune_to_target", "--structure neuron", {"task_loss", "logit_kd", "hidden_state_kd"}),
    ("prune_in_rounds", "--keep 0", {"task_loss", "logit_kd"}),
    ("small_files", "", {"task_loss", "logit_kd"}),
    ("choose_a_file", "", {"task_loss", "logit_kd"}),
    ("language_model", "--objective logits", {"task_loss", "logit_kd"}),
    ("language_model", "--objective on_policy", {"task_loss", "on_policy_kd"}),
    ("language_model", "--objective other_vocabulary", {"task_loss", "uld"}),
    ("image_features", "--objective relations", {"task_loss", "relation_kd"}),
    ("image_features", "--objective samples", {"task_loss", "rkd", "similarity_preserving_kd"}),
    ("image_features", "--objective mutual_information", {"task_loss", "crd", "vid"}),
    ("image_features", "--objective feature_maps", {"task_loss", "feature_map_kd"}),
    ("image_features", "--objective noise", {"task_loss", "noisy_kd", "adversarial_kd"}),
    ("image_classification", "--mixing cutmix", {"task_loss", "logit_kd"}),
    ("audio_classification", "--learning_rate 5e-3", {"task_loss", "logit_kd"}),
    ("text_augmentation", "--learning_rate 5e-3", {"task_loss", "logit_kd"}),
    ("text_augmentation", "--how masked_lm --learning_rate 5e-3", {"task_loss", "logit_kd"}),
    ("text_pairs", "--learning_rate 5e-3", {"task_loss", "logit_kd"}),
    ("text_pairs", "--regression --learning_rate 5e-3", {"task_loss", "logit_kd"}),
    ("other_family", "--learning_rate 5e-3", {"task_loss", "logit_kd"}),
    (
        "masked_lm",
        "--learning_rate 3e-3 --num_student_layers 2 --per_device_train_batch_size 32",
        {"task_loss", "logit_kd"},
    ),
    ("sharded", "--learning_rate 5e-3", {"task_loss", "logit_kd"}),
    ("segmentation", "", {"task_loss", "logit_kd"}),
    ("speech_ctc", "", {"task_loss", "logit_kd"}),
    ("speech_ctc", "--gru_width 64 --learning_rate 5e-3", {"task_loss", "logit_kd"}),
    ("speech_whisper", "--max_drop 1", {"task_loss", "logit_kd"}),
    ("token_classification", "", {"task_loss", "logit_kd", "hidden_state_kd"}),
    ("question_answering", "--learning_rate 5e-3", {"task_loss", "logit_kd"}),
    ("translation", "", {"task_loss", "logit_kd"}),
    ("embeddings", "", {"hidden_state_kd", "similarity_preserving_kd"}),
    ("detector", "", {"task_loss", "logit_kd"}),
    ("object_detection", "--num_student_layers 2 --neuron_sparsity 0.25", {"task_loss", "logit_kd", "box_kd"}),
]


@pytest.fixture
def example():
    """Imports an example anew."""
    # Not by monkeypatch, which would take away what ONNX Runtime's tools add to the path for themselves.
    sys.path.insert(0, str(EXAMPLES))
    yield importlib.import_module
    sys.path.remove(str(EXAMPLES))
    for path in EXAMPLES.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.fixture
def run(capsys, example):
    """Runs an example in this process; returns the rows of its log with a loss, and what it printed last."""

    def main(script, out, *options):
        quiet = ["--use_cpu", "--disable_tqdm", "True", "--learning_rate", "1e-3"]
        example(script).main([*quiet, "--output_dir", str(out), *options])
        history = json.loads((out / "trainer_state.json").read_text())["log_history"]
        return [row for row in history if "loss" in row], capsys.readouterr().out.splitlines()

    return main


class Begun(Exception):
    """An example has read its arguments."""


@pytest.fixture
def read(monkeypatch, tmp_path, example):
    """What an example makes of its arguments: it is stopped where its work begins, at the seed."""
    found, parse = [], transformers.HfArgumentParser.parse_args_into_dataclasses

    def kept(self, argv):
        found[:] = parse(self, argv)
        return tuple(found)

    def begin(seed):
        raise Begun

    monkeypatch.setattr(transformers.HfArgumentParser, "parse_args_into_dataclasses", kept)
    monkeypatch.chdir(tmp_path)

    def main(script, *options):
        for module in (example(script), example("example_utils")):
            monkeypatch.setattr(module, "set_seed", begin, raising=False)
        with pytest.raises(Begun):
            example(script).main(["--use_cpu", *options])
        return {name: value for part in found for name, value in vars(part).items()}

    return main


SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem not in ("made_up", "example_utils"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_preset_of_an_example_fits_its_arguments(script, read, example, capsys):
    preset, plain = example(script).GPU, read(script, "--tiny")
    assert "not run" not in capsys.readouterr().out
    assert preset.keys() <= plain.keys()
    assert {"output_dir", "learning_rate", "num_train_epochs", "per_device_train_batch_size"} <= preset.keys()
    found = read(script, "--preset", "gpu")
    assert "The preset gpu was not run yet" in capsys.readouterr().out
    assert found["bf16"]
    assert {name: found[name] for name in preset} == preset
    mine = {"learning_rate": 0.125, "bf16": False, "output_dir": "out/mine"}
    typed = read(
        script, "--preset", "gpu", *(word for name, value in mine.items() for word in (f"--{name}", str(value)))
    )
    assert {name: typed[name] for name in {*preset, *mine}} == {**preset, **mine}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--preset", "gpu", "--tiny"), "Give one of the two"),
        (("--preset", "tpu"), "invalid choice: 'tpu'"),
        ((), "or --preset gpu"),
    ],
)
def test_a_preset_that_cannot_be_is_refused(options, said, example, capsys):
    with pytest.raises(SystemExit):
        example("detector").main(["--use_cpu", *options])
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_commands_of_an_example_are_understood(script, read, example):
    """Each command of its docstring names options that exist, and what must be named."""
    lines = [shlex.split(line) for line in example(script).__doc__.splitlines() if f"examples/{script}.py" in line]
    commands = [words[words.index(f"examples/{script}.py") + 1 :] for words in lines if words[0] in ("accelerate", "python")]  # fmt: skip
    assert ["--preset", "gpu"] in commands
    assert len(commands) > 1
    for options in commands:
        read(script, *options)


def test_splits_that_a_data_set_lacks_are_made(example, tmp_path):
    rows = Dataset.from_dict({"text": [str(i) for i in range(40)]})
    load_splits = example("example_utils").load_splits
    for folder, splits in {
        "one": ["train"],
        "two": ["train", "validation"],
        "all": ["train", "validation", "test"],
    }.items():
        (tmp_path / folder).mkdir()
        for number, split in enumerate(splits):
            rows.select(range(20 * number, 20 * number + 20) if number < 2 else range(3)).to_parquet(
                tmp_path / folder / f"{split}.parquet"
            )
    one, two, three = (load_splits(str(tmp_path / folder)) for folder in ("one", "two", "all"))
    assert (len(one["train"]), len(one["test"])) == (18, 2)
    assert sorted([*one["train"]["text"], *one["test"]["text"]]) == sorted(rows["text"][:20])
    assert two["test"]["text"] == two["validation"]["text"] == rows["text"][20:]
    assert three["test"]["text"] == rows["text"][:3]


@pytest.fixture
def made(monkeypatch, example):
    """The trainer that an example makes, which does not train."""

    def main(script, *options):
        trainers = []
        monkeypatch.setattr(example(script), "train_and_save", lambda trainer, **_: trainers.append(trainer))
        example(script).main(["--use_cpu", *options])
        return trainers[0]

    return main


@pytest.mark.one_line
def test_a_sound_has_the_class_that_its_teacher_has_for_the_name(made, example, tmp_path):
    raw, extractor, teacher = example("made_up").sounds()
    (tmp_path / "data").mkdir()
    order, number = ["unknown", "c", "a", "b"], teacher.config.label2id
    for (
        split,
        rows,
    ) in raw.items():  # as numbers of another order, with sounds of a class that the teacher does not have
        labels = [0 if i % 4 == 0 else order.index("abc"[label]) for i, label in enumerate(rows["label"])]
        renamed = (
            rows.remove_columns("label").add_column("label", labels).cast_column("label", ClassLabel(names=order))
        )
        renamed.to_parquet(tmp_path / "data" / f"{split}.parquet")
    for part in (extractor, teacher):
        part.save_pretrained(tmp_path / "teacher")
    options = ("--dataset", str(tmp_path / "data"), "--teacher_model_name_or_path", str(tmp_path / "teacher"))
    trainer = made("audio_classification", *options, "--output_dir", str(tmp_path / "out"))
    found = trainer.eval_dataset[:]["labels"].tolist()
    assert found == [number["abc"[n]] for i, n in enumerate(raw["test"]["label"]) if i % 4]
    assert trainer.model.config.label2id == number


@pytest.mark.one_line
def test_a_mask_of_colours_is_read_as_its_numbers(made, example, tmp_path):
    raw, processor, teacher = example("made_up").segmentation()
    classes = np.arange(32 * 32, dtype=np.uint8).reshape(32, 32) % 3
    mask = Image.fromarray(classes).convert("P")
    mask.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])
    mask.putdata(classes.flatten().tolist())
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        rows = Dataset.from_dict({"image": raw[split][:2]["image"], "mask": [mask] * 2})
        rows.cast_column("mask", ImageFeature()).to_parquet(tmp_path / "data" / f"{split}.parquet")
    for part in (processor, teacher):
        part.save_pretrained(tmp_path / "teacher")
    options = ("--dataset", str(tmp_path / "data"), "--teacher_model_name_or_path", str(tmp_path / "teacher"))
    trainer = made("segmentation", *options, "--output_dir", str(tmp_path / "out"))
    assert trainer.eval_dataset[:]["labels"][0].tolist() == classes.tolist()


def test_language_models_that_were_saved_with_half_of_the_bits_learn_in_all_of_them(made, example, tmp_path):
    made_up = example("made_up")
    tokenizer = made_up.text_tokenizer(["say", "plot"], template="$A")
    tokenizer.save_pretrained(tmp_path / "teacher")
    made_up._llama(tokenizer, width=32, layers=2).to(torch.bfloat16).save_pretrained(tmp_path / "teacher")
    (tmp_path / "data").mkdir()
    Dataset.from_dict({"text": ["say plot"] * 8}).to_parquet(tmp_path / "data" / "train.parquet")
    options = ("--dataset", str(tmp_path / "data"), "--teacher_model_name_or_path", str(tmp_path / "teacher"))
    trainer = made("language_model", *options, "--output_dir", str(tmp_path / "out"))
    assert {value.dtype for value in trainer.model.parameters()} == {torch.float32}


@pytest.mark.one_line
def test_the_notebook_runs_in_the_order_of_its_cells(tmp_path, monkeypatch, capsys):
    cells = json.loads((EXAMPLES / "compress_a_classifier.ipynb").read_text(encoding="utf-8"))["cells"]
    programs = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert all(cell.get("outputs", []) == [] for cell in cells)  # pictures of one machine do not belong here
    monkeypatch.chdir(tmp_path)
    names = {}
    for program in programs:
        exec(program.replace("DemoSize()", "DemoSize(1, 1, 2, 32, 200)"), names)
    assert "read [" in capsys.readouterr().out
    assert names["report"].engines[-1].size < names["report"].engines[0].size / 3
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"report.html", "report.json", "report.png", "onnx"}


def test_every_example_is_run_here():
    tried = {*OPTIONS, *(f"{script}.py" for script, _, _ in FAMILIES), "made_up.py", "example_utils.py"}
    assert {path.name for path in EXAMPLES.glob("*.py")} == tried


LONG = {"image_classification"}  # a student of fifty convolutions


@pytest.mark.one_line
@pytest.mark.parametrize(
    ("script", "options", "terms"),
    [pytest.param(*one, marks=[pytest.mark.slow] * (one[0] in LONG)) for one in FAMILIES],
    ids=[f"{s} {o}".strip() for s, o, _ in FAMILIES],
)
def test_what_an_example_is_about_is_learned_and_saved(run, script, options, terms, tmp_path):
    rows, printed = run(script, tmp_path, "--tiny", "--max_steps", "20", *options.split())
    assert len(rows) == 4
    assert all(row.keys() - NO_TERMS == terms for row in rows)
    assert all(math.isfinite(value) for row in rows for value in row.values())
    for name in {"loss", "task_loss"} & rows[0].keys():
        assert rows[-1][name] < 0.97 * rows[0][name], name
    assert "20 steps" in printed[-2] + printed[-1]
    assert str(tmp_path) in printed[-1]
    assert (tmp_path / "model.safetensors").is_file()


# accelerate shards on GPUs only, unless it takes the CPU for one; where no rank is set there is one process.
GATHERED = """
import os, sys
from accelerate.state import PartialState
from accelerate.utils import DistributedType
alone = PartialState._prepare_backend
PartialState._prepare_backend = lambda self, *given, **named: (
    ("gloo", DistributedType.MULTI_GPU) if "RANK" in os.environ else alone(self, *given, **named)
)
sys.path.insert(0, sys.argv.pop(1))
import sharded
sharded.main()
"""


@pytest.mark.one_line
def test_shards_of_a_pruned_student_are_trained_for_integers_and_exported(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(GATHERED)
    accelerate_launch(
        script, EXAMPLES, "--tiny", "--max_steps", "6", "--learning_rate", "5e-3", "--report_to", "none",
        "--output_dir", tmp_path / "out", device="cpu",
        options=("--config_file", str(EXAMPLES / "accelerate_configs" / "fsdp2.yaml")),
    )  # fmt: skip
    student = load_quantized(tmp_path / "out")
    assert student.config.intermediate_size == 32  # of 64
    assert student.config.hfkdq["quantization"]
    rows = {row["name"]: row for row in json.loads((tmp_path / "out" / "report.json").read_text())["engines"]}
    facts = json.loads((tmp_path / "out" / "onnx" / "export_facts.json").read_text())
    assert list(rows) == ["teacher", "student", "ONNX int8"]
    assert rows["ONNX int8"]["metrics"] == facts["metrics"]["onnx"]
    assert facts["quantized_linears"] > 0


@pytest.mark.parametrize("kind", ["average", "peer"])
def test_a_teacher_that_changed_is_saved_beside_the_student(run, kind, tmp_path):
    run("several_teachers", tmp_path, "--tiny", "--max_steps", "5", "--kind", kind)
    student, teacher = (load_file(folder / "model.safetensors") for folder in (tmp_path, tmp_path / kind))
    widths = {"average": (32, 32), "peer": (32, 48)}[kind]
    assert (student["classifier.weight"].shape[1], teacher["classifier.weight"].shape[1]) == widths
    assert kind == "peer" or not student["classifier.weight"].equal(teacher["classifier.weight"])


def test_a_second_run_reads_what_the_teacher_said_from_the_folder(run, tmp_path):
    def parts():
        files = (tmp_path / "teacher-outputs").rglob("*")
        return {path: path.stat().st_mtime_ns for path in files if path.is_file() and path.name != "cache.json"}

    options = ("--tiny", "--max_steps", "5")
    first, _ = run("cached_teacher", tmp_path, *options)
    written = parts()
    second, _ = run("cached_teacher", tmp_path, *options)
    assert written
    assert parts() == written
    assert first == second


def test_progressive_terms_are_weighted_as_their_table_says(run, tmp_path):
    options = ("--tiny", "--max_steps", "20", "--logging_steps", "1")
    rows, printed = run("progressive_quantization", tmp_path, *options)
    table = [
        line.split() for line in printed if line.split()[:1] in [[str(i)] for i in range(1, 21)] and " x " in line
    ]
    assert [float(line[3]) for line in table] == pytest.approx([1 - step / 20 for step in range(1, 21)], abs=0.006)
    assert [float(line[9]) for line in table] == pytest.approx(
        [max(0, step / 10 - 1) for step in range(1, 21)], abs=0.006
    )
    for before, row in enumerate(rows):  # the weights of a step are those before it
        weights = [Linear(1, 0), Linear(0, 1), Linear(0, 1, begin=0.5)]
        terms = [row[name] for name in ("task_loss", "logit_kd", "quantization_loss")]
        expected = sum(weight(before / 20) * term for weight, term in zip(weights, terms, strict=True))
        assert row["loss"] == pytest.approx(expected, rel=1e-3, abs=2e-4)
    assert rows[-1]["quantization_loss"] > 0
    assert load_quantized(tmp_path).config.hfkdq["quantization"]


def test_a_round_that_costs_too_much_is_undone_and_the_last(run, tmp_path):
    rows, printed = run("prune_in_rounds", tmp_path, "--tiny", "--max_steps", "10", "--rounds", "2", "--keep", "1.5")
    assert len(rows) == 1
    assert printed[-2].endswith("so undone")
    assert printed[-1].startswith("5 steps. 0.0% of the neurons are removed")
    assert json.loads((tmp_path / "config.json").read_text())["intermediate_size"] == 64


def test_a_model_pruned_to_a_target_has_no_more_parameters(run, tmp_path):
    options = ("--tiny", "--max_steps", "5", "--structure", "head", "--measure", "parameters", "--target", "0.8")
    _, printed = run("prune_to_target", tmp_path, *options)
    rows = {line.split()[0]: line.split()[1] for line in printed[-3:-1]}
    before, after = (int(rows[name].replace(",", "")) for name in ("teacher", "pruned"))
    assert 0.6 * before < after <= 0.8 * before
    assert sum(p.numel() for p in load_pruned(tmp_path).parameters()) == after


def test_small_files_hold_no_token_of_the_words_that_no_text_has(run, tmp_path):
    _, printed = run("small_files", tmp_path, "--tiny", "--max_steps", "5", "--clusters", "8")
    weights = load_file(tmp_path / "model.safetensors")
    assert weights["bert.embeddings.word_embeddings.weight"].shape[0] == 19
    layers = [value for name, value in weights.items() if name.endswith("dense.weight") and ".layer." in name]
    assert all(len(value.unique()) <= 8 and (value == 0).float().mean() >= 0.5 for value in layers)
    sizes = [int(line.split()[-3].replace(",", "")) for line in printed if line.endswith("after xz")]
    assert sizes[1] < 0.3 * sizes[0]


@pytest.mark.one_line
def test_speech_is_read_from_files(run, tmp_path, data_folder):
    made_up = importlib.import_module("made_up")
    _, processor, teacher = made_up.speech(tmp_path / "teacher")
    for part in (processor, teacher):
        part.save_pretrained(tmp_path / "teacher")
    rows, printed = run(
        "speech_ctc", tmp_path / "out", "--max_steps", "5", "--dataset", str(data_folder / "fsdd"),
        "--teacher_model_name_or_path", str(tmp_path / "teacher"), "--per_device_eval_batch_size", "64",
    )  # fmt: skip
    assert rows[0].keys() - NO_TERMS == {"task_loss", "logit_kd"}
    assert rows[0]["task_loss"] > 0
    assert "texts that are right 0." in printed[-2]


def test_boxes_are_read_from_files(run, tmp_path, data_folder):
    _, processor, _ = importlib.import_module("made_up").detection()
    for part in (processor, tiny.yolos(1, labels=3)):
        part.save_pretrained(tmp_path / "teacher")
    rows, printed = run(
        "detector", tmp_path / "out", "--max_steps", "5", "--dataset", str(data_folder / "bccd"), "--image_size", "32",
        "--num_student_layers", "1", "--teacher_model_name_or_path", str(tmp_path / "teacher"),
    )  # fmt: skip
    assert rows[0].keys() - NO_TERMS == {"task_loss", "logit_kd"}
    assert all(math.isfinite(value) for value in rows[0].values())
    assert str(tmp_path / "out") in printed[-1]


@pytest.mark.one_line
def test_the_precision_of_a_detector_is_that_of_its_file(run, tmp_path):
    _, printed = run("object_detection", tmp_path, "--tiny", "--max_steps", "40", "--max_drop", "0")
    rows = {row["name"]: row["metrics"] for row in json.loads((tmp_path / "report.json").read_text())["engines"]}
    facts = json.loads((tmp_path / "onnx" / "export_facts.json").read_text())
    assert list(rows) == ["teacher", "student", "ONNX int8"]
    assert rows["ONNX int8"] == facts["metrics"]["onnx"]
    assert rows["student"] == facts["metrics"]["torch"]
    assert {"map", "map_50", "map_75", "map_red", "map_blue"} <= rows["teacher"].keys()
    assert min(row["map"] for row in rows.values()) > 0
    assert facts["quantized_linears"] > 0
    assert "ONNX int8" in printed[-2]


def test_parts_that_integers_ruin_are_found_by_measuring(example):
    parts_left_in_float = example("object_detection").parts_left_in_float
    model, pixels = tiny.yolos(), torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(pixel_values=pixels).pred_boxes
        # One column of the boxes' head alone reads numbers that leave no room for the others.
        model.bbox_predictor.layers[1].weight[0] *= 3000

    def score(quantized):
        with torch.no_grad():
            return -float((quantized.eval()(pixel_values=pixels).pred_boxes - before).abs().mean())

    with torch.no_grad():
        before = model(pixel_values=pixels).pred_boxes
    assert not torch.equal(before, wanted)
    batches = [{"pixel_values": pixels}]
    assert parts_left_in_float(model, batches, score, max_drop=1.0) == []
    left = parts_left_in_float(model, batches, score, max_drop=0.02)
    assert left[0] == "bbox_predictor.layers"
