# SPDX-License-Identifier: Apache-2.0
"""Messages of the library with the options of the command line in place of its arguments."""

from __future__ import annotations

import re

# Arguments of export_onnx that are called otherwise here, and those that are called the same.
_RENAMED = {"calibration": "calibration-data", "eval_dataset": "eval-data", "compute_metrics": "metric"}
_NAMES = "|".join((
    *_RENAMED, "quantization", "tolerance", "target", "weight_type", "task", "metric", "max_drop", "allow_drop",
    "latency_rounds", "threads",
))  # fmt: skip


_KEYS = {"eval-data": "data.eval", "calibration-data": "data.calibration", "text-columns": "data.text_columns"}


def as_keys(message: str) -> str:
    """An error of the readers of data with the keys of a recipe: `--text-columns` becomes `data.text_columns`, with names
    after it `data.text_columns=[A,B]`; one line."""
    message = re.sub(r"--text-columns ([A-Z]+(?:,[A-Z]+)*)\b", r"--text-columns=[\1]", message)
    text = re.sub(rf"--({'|'.join(_KEYS)})\b", lambda found: _KEYS[found[1]], message)
    return " ".join(text.split())


def as_options(message: str) -> str:
    """An error of `export_onnx` with the options of the command: `max_drop=` becomes `--max-drop`."""

    def option(found: re.Match[str]) -> str:
        name = f"--{_RENAMED.get(found[1], found[1]).replace('_', '-')}"
        return name if found[2] in (None, "True") else f"{name} {found[2]}"

    return re.sub(rf'\b({_NAMES})=(?:["\']?(\w+)["\']?)?', option, message)
