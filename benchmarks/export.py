#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""How fast an exported file is: torch, ONNX float, Optimum's dynamic int8, and the int8 files of both lines.

    make bench-export

Each line writes its files of the same models, with random weights in the shapes of BERT-base, MiniLM, ViT-base and
Wav2Vec2-base; then all are timed in turn, each in a process of its own, at batches of 1 and 16 and up to three lengths.
Resumable: what is in the folder already is not written or timed again. Writes `results.json` and `latency.png`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf
from rich.console import Console
from rich.table import Table

from hfkdq import QuantizationSpec, export_onnx
from hfkdq.export.runtime import onnx_call
from hfkdq.measuring.latency import TimedEngine, time_engines
from hfkdq.measuring.torch_engine import torch_call

TORCH, FLOAT, DYNAMIC, OURS, OURS_V5 = (
    "torch float", "ONNX float", "Optimum dynamic int8", "hfkdq int8", "hfkdq int8, v5"
)  # fmt: skip
BATCHES = (1, 16)
# Of a batch's positions times its size; a call of more takes seconds, and says nothing new.
MOST_POSITIONS = {"BERT-base": 16 * 128, "Wav2Vec2-base": 16 * 32000}


def words(batch: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(1000, 30000, (batch, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def pictures(batch: int, size: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))}


def waves(batch: int, samples: int) -> dict[str, torch.Tensor]:
    return {"input_values": torch.randn(batch, samples, generator=torch.Generator().manual_seed(0))}


@dataclass(frozen=True)
class Shape:
    """A model to time, and what it is fed."""

    make: Callable[[], tf.PreTrainedModel]
    inputs: Callable[[int, int], dict[str, torch.Tensor]]
    lengths: tuple[int, ...]
    unit: str
    task: str


def bert(**sizes: int) -> tf.PreTrainedModel:
    return tf.BertForSequenceClassification(tf.BertConfig(**sizes))


SHAPES = {
    "MiniLM": Shape(
        partial(bert, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536),
        words, (32, 128, 256), "tokens", "text-classification",
    ),
    "BERT-base": Shape(bert, words, (32, 128, 256), "tokens", "text-classification"),
    "ViT-base": Shape(lambda: tf.ViTForImageClassification(tf.ViTConfig()), pictures, (224,), "pixels", "image-classification"),
    "Wav2Vec2-base": Shape(
        lambda: tf.Wav2Vec2ForCTC(tf.Wav2Vec2Config()), waves, (16000, 32000, 80000), "samples",
        "automatic-speech-recognition",
    ),
}  # fmt: skip


def write(options: argparse.Namespace) -> None:
    """Writes what the installed line can: all on the optimum line, our int8 file on the v5 line."""
    on_v5 = int(tf.__version__.split(".")[0]) >= 5
    for name in options.models:
        shape, folder = SHAPES[name], options.output_dir / name
        if not (folder / "torch").exists():
            tf.set_seed(0)
            shape.make().eval().save_pretrained(folder / "torch")
        model = None
        for kind in (OURS_V5,) if on_v5 else (FLOAT, DYNAMIC, OURS):
            if (folder / kind).exists():
                continue
            model = model or load(folder / "torch", shape)
            print(f"{name}: {kind}", flush=True)
            if kind == DYNAMIC:
                dynamic_as_documented(folder / "torch", folder / kind, shape.task)
                continue
            spec = None if kind == FLOAT else QuantizationSpec()
            calibration = [shape.inputs(4, shape.lengths[0]) for _ in range(2)]
            export_onnx(
                model, folder / kind, quantization=spec, calibration=calibration, latency_rounds=0, tolerance=1.0
            )


def load(folder: Path, shape: Shape) -> tf.PreTrainedModel:
    return getattr(tf, type(shape.make()).__name__).from_pretrained(folder).eval()


def dynamic_as_documented(checkpoint: Path, folder: Path, task: str) -> None:
    """What "Quantization" in the documentation of Optimum's ONNX Runtime does."""
    from optimum.exporters.onnx import main_export
    from optimum.onnxruntime import AutoQuantizationConfig, ORTQuantizer

    with tempfile.TemporaryDirectory() as traced:
        main_export(str(checkpoint), traced, task=task, do_validation=False)
        quantizer = ORTQuantizer.from_pretrained(traced)
        # Its dynamic quantizer stops at convolutions whose weight is computed, as Wav2Vec2's positional one is.
        only = ["MatMul", "Gather"] if task == "automatic-speech-recognition" else None
        config = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=False, operators_to_quantize=only)
        quantizer.quantize(save_dir=folder, quantization_config=config, file_suffix="")


def time_all(options: argparse.Namespace) -> None:
    """Times what there is, cell by cell."""
    path = options.output_dir / "results.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for name in options.models:
        shape, folder = SHAPES[name], options.output_dir / name
        for batch in BATCHES:
            for length in shape.lengths:
                key = f"{name} {batch} x {length}"
                if key in results or (batch > 1 and batch * length > MOST_POSITIONS.get(name, 10**9)):
                    continue
                inputs = {k: v.numpy() for k, v in shape.inputs(batch, length).items()}
                engines = [TimedEngine(TORCH, torch_call, folder / "torch", inputs)]
                for kind in (FLOAT, DYNAMIC, OURS, OURS_V5):
                    if (folder / kind).exists():
                        engines.append(TimedEngine(kind, onnx_call, folder / kind / "model.onnx", inputs))
                times = time_engines(engines, threads=options.threads, rounds=options.rounds)
                results[key] = {e.name: vars(t) for e, t in zip(engines, times, strict=True)}
                path.write_text(json.dumps(results, indent=2) + "\n")
                print(key, {e.name: round(t.median_ms, 2) for e, t in zip(engines, times, strict=True)}, flush=True)
    show(results, options)


def show(results: dict[str, Any], options: argparse.Namespace) -> None:
    """Prints the tables and draws the plot."""
    order = [
        f"{name} {batch} x {length}" for name, shape in SHAPES.items() for batch in BATCHES for length in shape.lengths
    ]
    results = {key: results[key] for key in order if key in results}
    console = Console(width=150)
    table = Table(title=f"Milliseconds: median (fastest), {options.threads} threads; ratio to Optimum's dynamic int8")
    for column in ("Model", "Batch x length", TORCH, FLOAT, DYNAMIC, OURS, "ratio", OURS_V5, "ratio"):
        table.add_column(column, justify="left" if column == "Model" else "right", no_wrap=True)
    for key, times in results.items():
        model, shape = key.split(" ", 1)
        cells = [model, shape]
        for kind in (TORCH, FLOAT, DYNAMIC, OURS, OURS_V5):
            cells.append(cell(times.get(kind)))
            if kind in (OURS, OURS_V5):
                cells.append(f"{ratio(times, kind):.2f}" if kind in times else "")
        table.add_row(*cells)
    console.print(table)
    sizes = Table(title="Megabytes of the files, and their share of ONNX float")
    for column in ("Model", FLOAT, DYNAMIC, OURS, OURS_V5):
        sizes.add_column(column, justify="left" if column == "Model" else "right")
    for name in options.models:
        size = {kind: weight(options.output_dir / name / kind) for kind in (FLOAT, DYNAMIC, OURS, OURS_V5)}
        sizes.add_row(name, *(f"{v / 1e6:.1f} ({v / size[FLOAT]:.3f})" if v else "" for v in size.values()))
    console.print(sizes)
    plot(results, options.output_dir / "latency.png")
    slow = [key for key, times in results.items() if OURS in times and ratio(times, OURS) < 1.15]
    for key in slow:
        model, shape = key.split(" ", 1)
        batch, length = map(int, shape.split(" x "))
        print(f"{key}: {ratio(results[key], OURS):.2f}, under the goal of 1.15. Where the time goes, in ms a call:")
        for kind in (DYNAMIC, OURS):
            file = options.output_dir / model / kind / "model.onnx"
            print(f"  {kind}: {profile(file, SHAPES[model].inputs(batch, length), options.threads)}")


def cell(latency: dict[str, Any] | None) -> str:
    return "" if latency is None else f"{latency['median_ms']:.2f} ({latency['min_ms']:.2f})"


def ratio(times: dict[str, Any], kind: str) -> float:
    return float(times[DYNAMIC]["median_ms"] / times[kind]["median_ms"])


def weight(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("model.onnx*"))


def profile(file: Path, inputs: dict[str, torch.Tensor], threads: int, calls: int = 10) -> str:
    """The operators that take most of a call."""
    import onnxruntime as ort

    with tempfile.TemporaryDirectory() as folder:
        settings = ort.SessionOptions()
        settings.log_severity_level, settings.intra_op_num_threads = 3, threads
        settings.enable_profiling, settings.profile_file_prefix = True, os.path.join(folder, "profile")
        session = ort.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"])
        arrays = {k: v.numpy() for k, v in inputs.items()}
        feed = {
            i.name: arrays[i.name] if i.name in arrays else np.zeros_like(arrays["input_ids"])
            for i in session.get_inputs()
        }
        for _ in range(calls):
            session.run(None, feed)
        spent: Counter[str] = Counter()
        for event in json.loads(Path(session.end_profiling()).read_text()):
            if event.get("cat") == "Node" and event["name"].endswith("kernel_time"):
                spent[event["args"]["op_name"]] += event["dur"]
    return ", ".join(f"{name} {us / calls / 1000:.2f}" for name, us in spent.most_common(8))


def plot(results: dict[str, Any], path: Path) -> None:
    """Speed against Optimum's dynamic int8, a bar for each file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(11, 5), layout="constrained")
    kinds = [kind for kind in (FLOAT, OURS, OURS_V5) if any(kind in times for times in results.values())]
    for number, kind in enumerate(kinds):
        places = [place + 0.27 * (number - (len(kinds) - 1) / 2) for place in range(len(results))]
        bars = axis.bar(places, [ratio(t, kind) if kind in t else 0 for t in results.values()], 0.26, label=kind)
        axis.bar_label(bars, fmt="%.2f", fontsize=6)
    axis.axhline(1.0, color="black", linewidth=1, label=DYNAMIC)
    axis.axhline(1.15, color="grey", linewidth=1, linestyle="--", label="goal: 1.15")
    axis.set_xticks(range(len(results)), list(results), rotation=45, ha="right", fontsize=8)
    axis.set_ylabel("times as fast as Optimum's dynamic int8")
    axis.legend(fontsize=8, ncols=5, loc="upper center", bbox_to_anchor=(0.5, 1.12), frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=["write", "time"], help="write the files of the installed line, or time all")
    parser.add_argument("--output_dir", type=Path, default=Path("out/export"))
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--rounds", type=int, default=3, help="turns of half a second, at least 10 calls, for each file"
    )
    parser.add_argument("--again", action="store_true", help="forget earlier results")
    options = parser.parse_args()
    if options.again:
        if options.step == "write":
            shutil.rmtree(options.output_dir, ignore_errors=True)
        (options.output_dir / "results.json").unlink(missing_ok=True)
    tf.logging.set_verbosity_error()
    write(options) if options.step == "write" else time_all(options)


if __name__ == "__main__":
    main()
