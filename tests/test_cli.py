# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys

import pytest
import transformers

from hfkdq import __version__
from hfkdq.cli import main

on_optimum = pytest.mark.skipif(
    transformers.__version__.startswith("5"), reason="export_onnx needs the optimum line in this release"
)


def test_help_names_every_command():
    done = subprocess.run([sys.executable, "-m", "hfkdq", "--help"], capture_output=True, text=True, check=True)
    assert all(command in done.stdout for command in ("demo", "export", "card"))
    version = subprocess.run([sys.executable, "-m", "hfkdq", "--version"], capture_output=True, text=True, check=True)
    assert version.stdout.split() == ["hfkdq", __version__]


def test_errors_are_one_line_and_a_status(capsys, tmp_path):
    assert main(["card", str(tmp_path / "nothing.json")]) == 1
    assert "hfkdq card:" in capsys.readouterr().err


@on_optimum
def test_export_writes_a_trained_checkpoint(tmp_path, capsys):
    from hfkdq import QuantizationSpec, quantize

    from . import tiny

    model = quantize(tiny.bert(), QuantizationSpec(), [tiny.batch(tiny.bert())])
    model.save_pretrained(tmp_path / "checkpoint")
    tiny.tokenizer().save_pretrained(tmp_path / "checkpoint")
    for kind in ("none", "dynamic", "trained"):
        assert main(["export", str(tmp_path / "checkpoint"), str(tmp_path / kind), "--quantization", kind]) == 0
        assert (tmp_path / kind / "model.onnx").is_file()
        assert (tmp_path / kind / "tokenizer.json").is_file()
    assert main(["export", str(tmp_path / "checkpoint"), str(tmp_path / "none")]) == 1
    assert "exists" in capsys.readouterr().err
