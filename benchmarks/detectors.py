#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Detectors that select their queries: mean average precision of the float file and of the int8 file by calibration alone.

    make bench-detectors DATA=path/to/data

DATA has a folder bccd. Each detector is small, starts from random weights and is trained by `hfkdq compress`; its int8 file is what
`hfkdq export --quantization int8 --calibration-data` writes, with nothing named that stays in floats. Every run keeps its folder, so that the
command goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from rich.console import Console
from rich.table import Table
from tasks import boxes, categories, compress, hfkdq, names_of, steps
from transformers import DFineConfig, DFineForObjectDetection, RTDetrImageProcessor, set_seed

from hfkdq import CompressionReport

WIDTHS = [24, 48, 96, 192]
HGNET = {
    "model_type": "hgnet_v2", "stem_channels": [3, 16, 24], "stage_in_channels": [24, 24, 48, 96], "stage_mid_channels": [16, 24, 32, 48],
    "stage_out_channels": WIDTHS, "stage_num_blocks": [1, 1, 1, 1], "stage_downsample": [False, True, True, True],
    "stage_light_block": [False, False, True, True], "stage_kernel_size": [3, 3, 3, 3], "stage_numb_of_layers": [1, 1, 1, 1],
    "embedding_size": 24, "hidden_sizes": WIDTHS, "depths": [1, 1, 1, 1], "out_features": ["stage2", "stage3", "stage4"],
}  # fmt: skip


def d_fine(rows: Dataset) -> tuple[Any, Any]:
    config = DFineConfig(
        backbone_config=HGNET, encoder_in_channels=WIDTHS[1:], d_model=64, encoder_hidden_dim=64, encoder_ffn_dim=128,
        decoder_ffn_dim=128, decoder_in_channels=[64] * 3, encoder_attention_heads=4, decoder_attention_heads=4, decoder_layers=3,
        num_queries=60, num_denoising=20, anchor_image_size=None, freeze_backbone_batch_norms=False, **names_of(categories(rows)),
    )  # fmt: skip
    return DFineForObjectDetection(config), RTDetrImageProcessor(size={"height": 128, "width": 160})


DETECTORS: dict[str, tuple[Callable[[Dataset], tuple[Any, Any]], int]] = {
    "RT-DETR": (boxes(WIDTHS, 64, 3), 2400), "D-FINE": (d_fine, 900),
}  # fmt: skip
"""What makes each, and the steps of 8 images that it is trained for."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--output_dir", type=Path, default=Path("out/bench-detectors"))
    parser.add_argument("--detectors", nargs="+", choices=list(DETECTORS), default=list(DETECTORS))
    parser.add_argument("--steps", type=int, help="steps of every training, for a quick look")
    options = parser.parse_args()
    data = options.data / "bccd"
    table = Table("", "mAP, float32 file", "mAP, int8 file", "bytes (times smaller)", "modules left in floats")
    for name in options.detectors:
        make, count = DETECTORS[name]
        row = measure(make, data, options.output_dir / name.lower(), options.steps or count)
        table.add_row(name, *row)
    Console(width=140).print(table)


def measure(make: Callable[[Dataset], tuple[Any, Any]], data: Path, folder: Path, count: int) -> tuple[str, ...]:
    """Trains a detector, writes both files, and what they are worth."""
    if not (folder / "base").exists():
        set_seed(0)
        for part in make(load_dataset(str(data), split="train")):
            part.save_pretrained(folder / "base")
    recipe = {
        "model": str(folder / "base"), "data": {"train": f"{data}:train", "eval": f"{data}:test"}, "export": {},
        "training": {**steps(count, 1e-3, 8), "seed": 0}, "report": {"latency_rounds": 0, "resamples": 0},
    }  # fmt: skip
    compress(recipe, folder / "trained")
    if not (folder / "int8").exists():
        command = ["export", str(folder / "trained" / "student"), str(folder / "int8"), "--quantization", "int8"]
        rows = ["--calibration-data", f"{data}:train", "--eval-data", f"{data}:test", "--latency-rounds", "0"]
        hfkdq(*command, *rows)
    before = CompressionReport.load(folder / "trained" / "report.json").engines[-1]
    after = json.loads((folder / "int8" / "export_facts.json").read_text())
    precision = [100 * value for value in (before.metrics["map"], after["metrics"]["onnx"]["map"])]
    cells = [f"{value:.2f}" for value in precision]
    left = len(after.get("top_k", {}).get("left_in_float", ()))
    return *cells, f"{after['bytes']:,} ({before.size / after['bytes']:.2f})", str(left)


if __name__ == "__main__":
    main()
