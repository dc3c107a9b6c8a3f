# SPDX-License-Identifier: Apache-2.0
"""Messages of the library in the words of the command line."""

from __future__ import annotations

import re

# How export_onnx names what are options here.
_NAMES = {
    "calibration": "--calibration-data", "eval_dataset": "--eval-data", "compute_metrics": "--metric",
    "quantization": "--quantization", "tolerance": "--tolerance", "target": "--target", "weight_type": "--weight-type", "task": "--task",
    "metric": "--metric", "max_drop": "--max-drop", "allow_drop": "--allow-drop",
    "latency_rounds": "--latency-rounds", "threads": "--threads",
}  # fmt: skip


def as_options(message: str) -> str:
    """An error of `export_onnx` in the words of this command: `max_drop=` becomes `--max-drop`."""
    names = "|".join(_NAMES)
    message = re.sub(rf"\b({names})=\"?(\w+)\"?", lambda found: f"{_NAMES[found[1]]} {found[2]}", message)
    message = message.replace("--allow-drop True", "--allow-drop")
    return re.sub(rf"\b({names})=", lambda found: _NAMES[found[1]], message)
