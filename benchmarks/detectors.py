#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Detectors of several families: mean average precision of the float file and of the int8 file by calibration alone.

    make bench-detectors DATA=path/to/data

DATA has a folder bccd. Each detector is small, starts from random weights and is trained by `hfkdq compress`; its int8 file is what
`hfkdq export --quantization int8 --calibration-data` writes, with nothing named that stays in floats. RF-DETR is of Transformers 5
alone, and left out by others. Every run keeps its folder, so that the command goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers as tf
from datasets import Dataset, load_dataset
from rich.console import Console
from rich.table import Table
from tasks import boxes, categories, compress, names_of, steps
from transformers import ResNetConfig, set_seed

from hfkdq import CompressionReport

HEIGHT, WIDTH = 128, 160
SIZE = {"height": HEIGHT, "width": WIDTH}
WIDTHS = [24, 48, 96, 192]
DETR = {
    "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "d_model": 64, "encoder_layers": 2, "decoder_layers": 3,
    "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_queries": 60,
}  # fmt: skip
RESNET: dict[str, Any] = {
    "embedding_size": 24, "hidden_sizes": WIDTHS, "depths": [1, 1, 1, 1], "layer_type": "basic", "out_features": ["stage4"],
}  # fmt: skip
HGNET = {
    "model_type": "hgnet_v2", "stem_channels": [3, 16, 24], "stage_in_channels": [24, 24, 48, 96], "stage_mid_channels": [16, 24, 32, 48],
    "stage_out_channels": WIDTHS, "stage_num_blocks": [1, 1, 1, 1], "stage_downsample": [False, True, True, True],
    "stage_light_block": [False, False, True, True], "stage_kernel_size": [3, 3, 3, 3], "stage_numb_of_layers": [1, 1, 1, 1],
    "embedding_size": 24, "hidden_sizes": WIDTHS, "depths": [1, 1, 1, 1], "out_features": ["stage2", "stage3", "stage4"],
}  # fmt: skip
RF = {
    "backbone_config": {
        "model_type": "rf_detr_dinov2", "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "mlp_ratio": 2,
        "image_size": 128, "patch_size": 8, "num_windows": 2, "out_features": ["stage2", "stage4"],
    },
    "d_model": 64, "decoder_ffn_dim": 128, "decoder_layers": 3, "decoder_self_attention_heads": 4, "decoder_cross_attention_heads": 4,
    "num_queries": 60, "group_detr": 3,
}  # fmt: skip


def _model(prefix: str, settings: Callable[[], dict[str, Any]], height: int = HEIGHT, width: int = WIDTH) -> Any:
    """Makes a detector and its processor from the classes of the rows."""

    def make(rows: Dataset) -> tuple[Any, Any]:
        config = getattr(tf, f"{prefix}Config")(**settings(), **names_of(categories(rows)))
        processor = tf.DetrImageProcessor if "Detr" in prefix else tf.YolosImageProcessor
        return getattr(tf, f"{prefix}ForObjectDetection")(config), processor(size={"height": height, "width": width})

    return make


def d_fine(rows: Dataset) -> tuple[Any, Any]:
    config = tf.DFineConfig(
        backbone_config=HGNET, encoder_in_channels=WIDTHS[1:], d_model=64, encoder_hidden_dim=64, encoder_ffn_dim=128,
        decoder_ffn_dim=128, decoder_in_channels=[64] * 3, encoder_attention_heads=4, decoder_attention_heads=4, decoder_layers=3,
        num_queries=60, num_denoising=20, anchor_image_size=None, freeze_backbone_batch_norms=False, **names_of(categories(rows)),
    )  # fmt: skip
    return tf.DFineForObjectDetection(config), tf.RTDetrImageProcessor(size=SIZE)


YOLOS = {
    "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256, "image_size": [HEIGHT, WIDTH],
    "patch_size": 16, "num_detection_tokens": 60,
}  # fmt: skip
DETECTORS: dict[str, Callable[[Dataset], tuple[Any, Any]]] = {
    "RT-DETR": boxes(WIDTHS, 64, 3),
    "D-FINE": d_fine,
    "RF-DETR": _model("RfDetr", lambda: RF, 128, 128),
    "YOLOS": _model("Yolos", lambda: YOLOS),
    "DETR": _model("Detr", lambda: {**DETR, "backbone_config": ResNetConfig(**RESNET)}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--output_dir", type=Path, default=Path("out/bench-detectors"))
    parser.add_argument("--detectors", nargs="+", choices=list(DETECTORS), default=list(DETECTORS))
    parser.add_argument("--steps", type=int, default=2400, help="steps of 8 images")
    options = parser.parse_args()
    data = options.data / "bccd"
    table = Table("", "mAP, float32 file", "mAP, int8 file", "bytes (times smaller)", "modules left in floats")
    for name in options.detectors:
        if name == "RF-DETR" and not hasattr(tf, "RfDetrConfig"):
            continue
        row = measure(DETECTORS[name], data, options.output_dir / name.lower().replace(" ", "-"), options.steps)
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
        subprocess.run([sys.executable, "-m", "hfkdq", *command, *rows], check=True)
    before = CompressionReport.load(folder / "trained" / "report.json").engines[-1]
    after = json.loads((folder / "int8" / "export_facts.json").read_text())
    precision = [100 * value for value in (before.metrics["map"], after["metrics"]["onnx"]["map"])]
    cells = [f"{value:.2f}" for value in precision]
    left = len(after.get("top_k", {}).get("left_in_float", ()))
    return *cells, f"{after['bytes']:,} ({before.size / after['bytes']:.2f})", str(left)


if __name__ == "__main__":
    main()
