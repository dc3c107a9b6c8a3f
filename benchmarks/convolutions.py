#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""How fast convolutions run: ONNX float, our int8 file, the same with integer convolutions, and ONNX Runtime's own QDQ file.

    make bench-convolutions

The models have random weights in the shapes of MobileNetV2 and ResNet-18. All files of a model are timed in turn, each in a
process of its own; every round gives a ratio to the float file, of which the quartiles are told.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from hfkdq import QuantizationSpec, export_onnx, quantize
from hfkdq.export.runtime import onnx_call
from hfkdq.measuring.latency import TimedEngine, time_engines

FLOAT, OURS, INTEGER, THEIRS = "float32", "hfkdq int8", "hfkdq int8, integer convolutions", "quantize_static QDQ"
SIZE = 224


def models() -> dict[str, tf.PreTrainedModel]:
    """Both models with running statistics that fit their weights, in eval mode."""
    torch.manual_seed(0)
    resnet = tf.ResNetConfig(
        layer_type="basic", hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], num_labels=1000
    )
    found: dict[str, tf.PreTrainedModel] = {
        "ResNet-18": tf.ResNetForImageClassification(resnet),
        "MobileNetV2": tf.MobileNetV2ForImageClassification(tf.MobileNetV2Config(num_labels=1000)),
    }
    for model in found.values():
        with torch.no_grad():
            for _ in range(5):
                model.train()(torch.randn(4, 3, 96, 96))
        model.eval()
    return found


@dataclass
class Batches(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
    """The same pictures for ONNX Runtime's calibration."""

    batches: list[dict[str, torch.Tensor]]

    def get_next(self) -> dict[str, Any] | None:
        """The next batch as arrays; `None` at the end."""
        return {name: value.numpy() for name, value in self.batches.pop(0).items()} if self.batches else None


def files(model: tf.PreTrainedModel, folder: Path) -> dict[str, Path]:
    """The files to time, by name."""
    batches = [{"pixel_values": torch.randn(size, 3, SIZE, SIZE)} for size in (2, 1)]
    arguments: dict[str, Any] = {"calibration": batches, "latency_rounds": 0, "tolerance": 1.0}
    quantized = quantize(model, QuantizationSpec(), batches).eval()
    found = {
        FLOAT: export_onnx(model, folder / "float", quantization="float32", calibration=batches, latency_rounds=0),
        OURS: export_onnx(quantized, folder / "ours", **arguments),
        INTEGER: export_onnx(quantized, folder / "integer", **arguments, integer_convolutions=True),
    }
    paths = {name: path / "model.onnx" for name, path in found.items()}
    before = Path.cwd()
    os.chdir(folder)  # where ONNX Runtime leaves files of its own
    try:
        quant_pre_process(paths[FLOAT], folder / "prepared.onnx")
        quantize_static(
            folder / "prepared.onnx", folder / "theirs.onnx", Batches(batches), quant_format=QuantFormat.QDQ,
            per_channel=True, weight_type=QuantType.QInt8, activation_type=QuantType.QUInt8,
        )  # fmt: skip
    finally:
        os.chdir(before)
    return {**paths, THEIRS: folder / "theirs.onnx"}


def measure(paths: dict[str, Path], rounds: int, threads: int) -> dict[str, Any]:
    """Milliseconds of every round, and the quartiles of its ratios to the float file."""
    picture = {"pixel_values": np.random.default_rng(0).standard_normal((1, 3, SIZE, SIZE)).astype(np.float32)}
    engines = [TimedEngine(name, onnx_call, path, picture) for name, path in paths.items()]
    times: dict[str, list[float]] = {name: [] for name in paths}
    for _ in range(rounds):
        for name, latency in zip(paths, time_engines(engines, threads=threads, rounds=1), strict=True):
            times[name].append(latency.median_ms)
    quartiles = {
        name: np.percentile(np.divide(found, times[FLOAT]), (25, 50, 75)).round(3).tolist()
        for name, found in times.items()
    }
    return {"milliseconds": times, "ratio_quartiles": quartiles}


def main() -> None:
    """Writes the results as JSON, and prints their table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("out/convolutions.json"))
    arguments = parser.parse_args()
    results = {}
    for name, model in models().items():
        with tempfile.TemporaryDirectory() as folder:
            paths = files(model, Path(folder))
            results[name] = measure(paths, arguments.rounds, arguments.threads)
            results[name]["bytes"] = {kind: path.stat().st_size for kind, path in paths.items()}
        print(f"| {name} | median ms | of float32: quartiles | MB |\n|---|---|---|---|")
        for kind, found in results[name]["ratio_quartiles"].items():
            low, middle, high = found
            median, size = np.median(results[name]["milliseconds"][kind]), results[name]["bytes"][kind] / 1e6
            print(f"| {kind} | {median:.1f} | {low:.2f}, {middle:.2f}, {high:.2f} | {size:.1f} |")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
