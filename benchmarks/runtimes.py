#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""How fast the same integers are in ONNX Runtime and in OpenVINO.

    make bench-openvino

A model in the shape of MiniLM with random weights is quantized to 8 bits once and exported with the targets "onnxruntime" and
"openvino"; `hfkdq bench` times both files in turn, each in a process of its own. What is in the folder already is not written again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import set_seed

from hfkdq import QuantizationSpec, export_onnx, quantize
from hfkdq.cli import main

from .export import SHAPES

TARGETS = {"ONNX Runtime": "onnxruntime", "OpenVINO": "openvino"}


def write(folder: Path) -> None:
    if all((folder / target).exists() for target in TARGETS.values()):
        return
    set_seed(0)
    shape, spec = SHAPES["MiniLM"], QuantizationSpec()
    batches = [shape.inputs(4, 32) for _ in range(2)]
    model = quantize(shape.make().eval(), spec, batches)
    for target in TARGETS.values():
        if not (folder / target).exists():
            export_onnx(
                model, folder / target, quantization=spec, calibration=batches, target=target, latency_rounds=0,
                tolerance=1.0,  # the logits of random weights are small
            )  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=Path("out/bench-openvino"))
    parser.add_argument("--threads", default="2")
    parser.add_argument("--rounds", default="12", help="turns of half a second of each")
    options = parser.parse_args()
    write(options.output_dir)
    files = [f"{name}={options.output_dir / target}" for name, target in TARGETS.items()]
    sizes = ["--batch-size", "1", "16", "--length", "32", "128"]
    raise SystemExit(main(["bench", *files, *sizes, "--threads", options.threads, "--rounds", options.rounds]))
