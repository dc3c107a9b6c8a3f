# SPDX-License-Identifier: Apache-2.0
"""Every example runs in its `--tiny` form."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

ROOT = Path(__file__).parents[1]
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


@pytest.mark.skipif(transformers.__version__.startswith("5"), reason="export needs the optimum line in this release")
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "examples").glob("*.py")))
def test_example_runs(script, processes, tmp_path):
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
