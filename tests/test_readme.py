# SPDX-License-Identifier: Apache-2.0
"""The program in the README runs as it stands, with a tiny teacher and data set in place of those of the Hub."""

import re
from pathlib import Path

import pytest
import transformers
from datasets import ClassLabel, Dataset, DatasetDict

from benchmarks.newcomer import of_readme, path

from . import tiny

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_program_is_short():
    assert len([line for line in PROGRAMS[0].splitlines() if line.strip()]) <= 15


def test_the_path_of_a_newcomer_is_made_of_its_commands():
    steps = path("hfkdq", Path("clone"))
    ours = [command for command in steps.values() if command.startswith(("pip", "make", "hfkdq"))]
    assert len(ours) == 6
    for command in ours:
        assert f"\n{' '.join(command.split()[:2])}" in README
        assert not {"model", "data", "checkpoint", "checkpoint-onnx", "teacher"} & set(command.split())
    with pytest.raises(ValueError, match="no command that starts with 'hfkdq dance'"):
        of_readme("hfkdq dance")


@pytest.mark.skipif(transformers.__version__.startswith("5"), reason="export needs the optimum line in this release")
def test_the_programs_run(tmp_path, monkeypatch):
    tokenizer, teacher = tiny.tokenizer(), tiny.bert(layers=4, labels=2)
    teacher.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    rows = [{"sentence": f"w{i} w{i + 1} w{2 * i}", "label": i % 2} for i in range(24)]
    split = Dataset.from_list(rows).cast_column("label", ClassLabel(names=["neg", "pos"]))
    DatasetDict(train=split, validation=split, test=split).save_to_disk(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    program = re.sub(r'name = ".*?"', f'name = "{tmp_path / "teacher"}"', PROGRAMS[0])
    program = program.replace('load_dataset("stanfordnlp/sst2")', f'load_from_disk("{tmp_path / "data"}")').replace(
        "import load_dataset", "import load_from_disk"
    )
    pushed = {}
    monkeypatch.setattr("hfkdq.hub.push_to_hub", lambda *args, **kwargs: pushed.update(kwargs, args=args))
    names = {}
    exec(program, names)
    assert (tmp_path / "out" / "onnx" / "model.onnx").is_file()
    exec(PROGRAMS[1], names)
    assert pushed["args"] == ("out/onnx", "me/tiny-int8")
    assert [engine.name for engine in pushed["report"].engines] == ["teacher", "student", "ONNX int8"]
