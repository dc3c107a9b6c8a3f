# SPDX-License-Identifier: Apache-2.0
import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import transformers
from PIL import Image

from hfkdq.cli import main

from .hub_server import loopback_hub  # noqa: F401

through_optimum = pytest.mark.skipif(
    transformers.__version__.startswith("5"), reason="Optimum's pipelines need the optimum line"
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    from hfkdq.demo import TINY, run_demo

    folder = tmp_path_factory.mktemp("demo") / "out"
    return folder, run_demo(folder, size=TINY)


def test_it_writes_what_it_names(demo):
    folder, report = demo
    assert [engine.name for engine in report.engines] == ["teacher", "student", "ONNX float", "ONNX int8"]
    for name in (
        "README.md",
        "report.json",
        "report.html",
        "report.png",
        "onnx-int8/model.onnx",
        "onnx-float/model.onnx",
        "teacher/model.safetensors",
        "teacher/preprocessor_config.json",  # so that `hfkdq compress` takes it
    ):
        assert (folder / name).exists(), name
    config = json.loads((folder / "onnx-int8" / "config.json").read_text())
    assert set(config["hfkdq"]) == {"student", "distillation", "pruning", "quantization"}
    assert config["intermediate_size"] == 64  # half of the teacher's 128
    assert config["num_hidden_layers"] == 1
    assert report.training["rows in a step"] == 64


@through_optimum
def test_the_card_shows_what_its_program_prints_of_the_first_image(demo):
    from optimum.onnxruntime import ORTModelForImageClassification
    from sklearn.datasets import load_digits
    from transformers import ViTImageProcessor, pipeline

    folder, report = demo
    digits = load_digits()
    first = np.random.default_rng(0).permutation(200)[0]  # as the demo draws its test images
    image = Image.fromarray((digits.images[first] * 255 / 16).astype(np.uint8)).convert("RGB")
    processor = ViTImageProcessor.from_pretrained(folder / "onnx-int8")
    model = ORTModelForImageClassification.from_pretrained(folder / "onnx-int8")
    answers = pipeline("image-classification", model=model, image_processor=processor)(image)
    assert report.sample.printed == str(answers)
    assert f"of the first image of the data:\n\n```text\n{answers}\n```" in (folder / "README.md").read_text()


@through_optimum
def test_the_result_classifies_images_in_a_pipeline(demo):
    from optimum.onnxruntime import ORTModelForImageClassification
    from transformers import AutoModelForImageClassification, ViTImageProcessor, pipeline

    folder = demo[0] / "onnx-int8"
    processor = ViTImageProcessor.from_pretrained(folder)
    classify = pipeline(
        "image-classification", model=ORTModelForImageClassification.from_pretrained(folder), image_processor=processor
    )
    answers = classify(Image.new("RGB", (8, 8)))
    assert {answer["label"] for answer in answers} <= {str(digit) for digit in range(10)}
    assert AutoModelForImageClassification.from_pretrained(folder).config.intermediate_size == 64


LOAD = """
import sys
from importlib.util import find_spec
from PIL import Image
from huggingface_hub import hf_hub_download

card = open(hf_hub_download(sys.argv[1], "README.md"), encoding="utf-8").read()
Image.new("RGB", (8, 8), "red").save("image.png")
for program in card.split("```python\\n")[1:]:
    if find_spec("optimum") or "from optimum" not in program:
        exec(program.partition("```")[0])
"""


def test_what_the_demo_made_is_pushed_and_its_card_loads_it_from_the_hub(
    demo, hub_server, tmp_path, monkeypatch, capsys
):
    folder, _ = demo
    assert main(["card", str(folder), "--repo_id", "me/digits"]) == 0
    assert '.from_pretrained("me/digits")' in capsys.readouterr().out
    assert main(["card", str(folder)]) == 0
    assert '.from_pretrained("onnx-int8")  # beside this file' in capsys.readouterr().out
    assert '.from_pretrained("onnx-int8")' in (folder / "README.md").read_text()
    assert main(["push", str(folder / "onnx-int8"), "me/digits", "--report", str(folder / "report.json")]) == 0
    assert capsys.readouterr().out.startswith(f"{hub_server.url}/me/digits")
    (tmp_path / "elsewhere").mkdir()
    loaded = subprocess.run(
        [sys.executable, "-c", LOAD, "me/digits"], cwd=tmp_path / "elsewhere", capture_output=True, text=True,
        env={**hub_server.environment(tmp_path / "home"), "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    assert loaded.returncode == 0, loaded.stderr
    if transformers.__version__.startswith("5"):  # whose program makes no call of an image
        assert "ExportedModel.from_pretrained" in (folder / "README.md").read_text()
        return
    assert {answer["label"] for answer in ast.literal_eval(loaded.stdout)} <= {str(digit) for digit in range(10)}


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_an_earlier_result_is_replaced_on_request_and_nothing_else(demo, tmp_path):
    from hfkdq.demo import DEMO

    folder = tmp_path / "out"
    shutil.copytree(demo[0], folder)
    with pytest.raises(FileExistsError, match="--overwrite"):
        DEMO.check(folder, overwrite=False)
    DEMO.check(folder, overwrite=True)
    (folder / "mine.txt").write_text("keep")
    (folder / "teacher" / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match=r"teacher/config\.json was not written by a demo, or was changed since"):
        DEMO.check(folder, overwrite=True)
    shutil.copy(demo[0] / "teacher" / "config.json", folder / "teacher")
    new, old = tmp_path / "new", tmp_path / "old"
    new.mkdir()
    (new / "README.md").write_text("new")
    DEMO.swap_in(new, folder, old)
    assert names(folder) == ["README.md", "mine.txt"]
    assert (folder / "README.md").read_text() == "new"
    assert set(names(old)) | {"mine.txt"} >= set(names(demo[0]))


def test_a_swap_that_fails_changes_nothing(demo, tmp_path, monkeypatch):
    from hfkdq.demo import DEMO

    folder, new = tmp_path / "out", tmp_path / "new"
    shutil.copytree(demo[0], folder)
    shutil.copytree(demo[0], new)
    before, rename, calls = names(folder), Path.rename, []

    def fails_in_the_middle(self, target):
        calls.append(self)
        if len(calls) == 6:
            raise OSError("no space")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_in_the_middle)
    with pytest.raises(OSError, match="no space"):
        DEMO.swap_in(new, folder, tmp_path / "old")
    assert names(folder) == before == names(new)


FOREIGN = {
    "a file": lambda folder: (folder / "README.md").write_text("mine"),
    "a file in a folder": lambda folder: [(folder / "teacher").mkdir(), (folder / "teacher" / "a").write_text("mine")],
    "an empty folder": lambda folder: (folder / "onnx-int8").mkdir(),
    "a link": lambda folder: (folder / "teacher").symlink_to(folder.parent),
    "a link to nothing": lambda folder: (folder / "report.json").symlink_to("nowhere"),
    "a damaged mark": lambda folder: [(folder / "README.md").write_text("mine"), (folder / ".hfkdq-demo.json").write_text("[")],
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_what_no_demo_wrote_stays_and_is_told_before_anything_is_imported(name, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    FOREIGN[name](folder)
    before = names(tmp_path)
    code = (
        "import sys; from hfkdq.cli import main; code = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules; sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "demo", "--output_dir", str(folder), "--overwrite", "--tiny"]
    told = subprocess.run(command, capture_output=True, text=True)
    assert told.returncode == 1
    assert "was not written by a demo" in told.stderr
    assert told.stderr.count("\n") == 1
    assert names(tmp_path) == before
