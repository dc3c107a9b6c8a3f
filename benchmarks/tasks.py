#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Every task from a teacher to a measured file, on real data, with the command line alone: the table of docs/results/tasks.md.

    make bench-tasks DATA=path/to/data

DATA has a folder for each data set: banking77, wnut17, squad, fashion_mnist, fsdd, bccd. A task is a base model, whose training makes the
teacher, and one recipe for each arm: the student with the labels alone, with the teacher, pruned besides (half of the neurons, of texts
the tokens that do not occur too, or some of the channels), and trained for 8-bit integers, or calibrated for them after the training. All
students of a task start alike and take the same steps. Every run keeps its folder, so that the command goes on where it was.
`--tasks text --seeds 0` runs less.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, DatasetDict, load_dataset
from quantization import residual_network, spread
from rich.console import Console
from rich.table import Table
from text_classification import pretrained
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTForAudioClassification,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrImageProcessor,
    RTDetrResNetConfig,
    SeamlessM4TFeatureExtractor,
    ViTImageProcessor,
    Wav2Vec2BertConfig,
    Wav2Vec2BertForCTC,
    Wav2Vec2BertProcessor,
    Wav2Vec2CTCTokenizer,
    set_seed,
)

from hfkdq import CompressionReport
from hfkdq.report.data import Engine

ALONE, TAUGHT, PRUNED, INT8 = "labels alone", "with the teacher", "pruned", "8-bit integers"
LOGITS = [{"TaskLoss": {"weight": 0.5}}, {"LogitKD": {"temperature": 2.0}}]
CHANNELS: dict[str, Any] = {"structure": "channel", "multiple_of": 8, "plain_checkpoint": False}
TEACHER = "teacher"
Made = tuple[PreTrainedModel, Any]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is trained on what.

    `base` makes the teacher before its training and its processor; `small` the student, which otherwise keeps as many layers of the
    teacher as `student` says. `teaching` and `training` are training arguments of both. Where it is `calibrated`, the 8-bit file is that
    of the student with the teacher, by calibration instead of a training of its own. `read` is how rows are read; with `rows` the data
    are what it makes of the first `sizes` rows at random, and as they are without.
    """

    data: str
    base: Callable[[Dataset], Made]
    teaching: dict[str, Any]
    training: dict[str, Any]
    student: dict[str, int] | None = None
    small: Callable[[Dataset], Made] | None = None
    objectives: list[Any] = field(default_factory=lambda: LOGITS)
    pruning: Any = field(default_factory=lambda: {"structure": "neuron", "sparsity": 0.5})
    export: dict[str, Any] = field(default_factory=dict)
    calibrated: bool = False
    arms: tuple[str, ...] = (ALONE, TAUGHT, PRUNED, INT8)
    read: dict[str, Any] = field(default_factory=dict)
    rows: Callable[[Any], Any] | None = None
    sizes: tuple[int, int] = (0, 0)


def names_of(feature: Any) -> dict[str, Any]:
    names = getattr(feature, "feature", feature).names
    return {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}


def texts(rows: Dataset) -> Made:
    model = AutoModelForSequenceClassification.from_pretrained(pretrained(), **names_of(rows.features["label"]))
    return model, AutoTokenizer.from_pretrained(pretrained())


def words(rows: Dataset) -> Made:
    model = AutoModelForTokenClassification.from_pretrained(pretrained(), **names_of(rows.features["ner_tags"]))
    return model, AutoTokenizer.from_pretrained(pretrained())


def answers(rows: Dataset) -> Made:
    return AutoModelForQuestionAnswering.from_pretrained(pretrained()), AutoTokenizer.from_pretrained(pretrained())


def images(widths: list[int], depth: int) -> Callable[[Dataset], Made]:
    def make(rows: Dataset) -> Made:
        model = residual_network(widths, depth)
        model.config.update(names_of(rows.features["label"]))
        size = {"height": 28, "width": 28}
        return model, ViTImageProcessor(size=size, do_resize=False, image_mean=[0.286], image_std=[0.353])

    return make


def sounds(rows: Dataset) -> Made:
    extractor = ASTFeatureExtractor(sampling_rate=8000, num_mel_bins=64, max_length=64, mean=-6.0, std=4.0)
    config = ASTConfig(
        hidden_size=128, num_hidden_layers=6, num_attention_heads=4, intermediate_size=512, patch_size=16, frequency_stride=16,
        time_stride=8, max_length=64, num_mel_bins=64, hidden_dropout_prob=0.1, **names_of(rows.features["label"]),
    )  # fmt: skip
    return ASTForAudioClassification(config), extractor


def letters(rows: Dataset) -> Made:
    """A frame every 20 ms."""
    symbols = ["<pad>", "<unk>", "|", *sorted(set("".join(rows["text"])))]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Wav2Vec2CTCTokenizer(vocabulary_file(folder, symbols), pad_token="<pad>", unk_token="<unk>")
    extractor = SeamlessM4TFeatureExtractor(feature_size=40, num_mel_bins=40)
    config = Wav2Vec2BertConfig(
        vocab_size=len(symbols), hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512,
        feature_projection_input_dim=80, conv_depthwise_kernel_size=7, pad_token_id=0, ctc_loss_reduction="mean",
        ctc_zero_infinity=True, apply_spec_augment=False, layerdrop=0.0, position_embeddings_type="relative_key",
        left_max_position_embeddings=16, right_max_position_embeddings=8,
    )  # fmt: skip
    return Wav2Vec2BertForCTC(config), Wav2Vec2BertProcessor(extractor, tokenizer)


def vocabulary_file(folder: str, symbols: list[str]) -> str:
    """A file with the numbers of the symbols."""
    file = Path(folder, "vocab.json")
    file.write_text(json.dumps({symbol: i for i, symbol in enumerate(symbols)}))
    return str(file)


def boxes(widths: list[int], hidden: int, layers: int) -> Callable[[Dataset], Made]:
    """An RT-DETR with some layers in its decoder, for images of 128 x 160 pixels."""

    def make(rows: Dataset) -> Made:
        backbone = RTDetrResNetConfig(
            embedding_size=widths[0], hidden_sizes=widths, depths=[1, 1, 1, 1], layer_type="basic",
            out_features=["stage2", "stage3", "stage4"],
        )  # fmt: skip
        config = RTDetrConfig(
            backbone_config=backbone, encoder_in_channels=widths[1:], d_model=hidden, encoder_hidden_dim=hidden,
            encoder_ffn_dim=2 * hidden, decoder_ffn_dim=2 * hidden, decoder_in_channels=[hidden] * 3, encoder_attention_heads=4,
            decoder_attention_heads=4, decoder_layers=layers, num_queries=60, num_denoising=20, freeze_backbone_batch_norms=False,
            anchor_image_size=None, **names_of(categories(rows)),
        )  # fmt: skip
        return RTDetrForObjectDetection(config), RTDetrImageProcessor(size={"height": 128, "width": 160})

    return make


def categories(rows: Dataset) -> Any:
    feature = rows.features["objects"]
    return getattr(feature, "feature", feature)["category"]


def short(rows: Dataset) -> Dataset:
    """Questions with contexts of 400 letters at most."""
    return rows.filter(lambda context: len(context) <= 400, input_columns="context")


def prepare(source: Path, folder: Path, make: Callable[[Any], Any], sizes: tuple[int, int]) -> DatasetDict:
    """What `make` makes of the first rows at random, as parquet: so many to train on, and so many to measure."""
    if not folder.exists():
        folder.mkdir(parents=True)
        raw = load_dataset(str(source))
        test = "test" if "test" in raw else "validation"
        for split, own, count in zip(("train", "test"), ("train", test), sizes, strict=True):
            rows = raw[own].shuffle(seed=0)
            made = make(rows.select(range(min(10 * count, len(rows)))))
            made.select(range(min(count, len(made)))).to_parquet(folder / f"{split}.parquet")
    return load_dataset(str(folder))


def steps(count: int, rate: float, batch: int = 32) -> dict[str, Any]:
    return {
        "max_steps": count, "learning_rate": rate, "per_device_train_batch_size": batch, "per_device_eval_batch_size": 128,
        "warmup_steps": count // 10, "weight_decay": 0.01, "eval_strategy": "no", "save_strategy": "no",
        "logging_steps": max(1, count // 10),
    }  # fmt: skip


TASKS: dict[str, Task] = {
    "text": Task(
        data="banking77", base=texts, teaching=steps(1000, 3e-4), training=steps(500, 5e-4), student={"num_layers": 2},
        read={"max_length": 32}, pruning=[{"structure": "neuron", "sparsity": 0.5}, {"structure": "vocab"}],
    ),
    "words": Task(
        data="wnut17", base=words, teaching=steps(400, 2e-4), training=steps(400, 3e-4), student={"num_layers": 3}, read={"max_length": 64},
    ),
    "answers": Task(
        data="squad", base=answers, teaching=steps(1000, 2e-4, 16), training=steps(500, 3e-4, 16), student={"num_layers": 4},
        read={"max_length": 128}, rows=short, sizes=(16000, 1000), calibrated=True,
    ),
    "images": Task(
        data="fashion_mnist", base=images([42, 84, 168], 2), small=images([24, 48, 96], 1), teaching=steps(1200, 3e-3, 64),
        training=steps(800, 3e-3, 64), pruning={**CHANNELS, "sparsity": 0.3}, export={"integer_convolutions": True},
    ),
    "small images": Task(
        data="fashion_mnist", base=images([42, 84, 168], 2), small=images([28, 56, 112], 1), teaching=steps(3000, 3e-3, 64),
        training=steps(3000, 3e-3, 64), arms=(ALONE, TAUGHT),
    ),
    "sounds": Task(data="fsdd", base=sounds, teaching=steps(1000, 5e-4), training=steps(600, 5e-4), student={"num_layers": 2}),
    "letters": Task(data="fsdd", base=letters, teaching=steps(800, 1e-3, 16), training=steps(400, 1e-3, 16), student={"num_layers": 2}),
    "boxes": Task(
        data="bccd", base=boxes([24, 48, 96, 192], 64, 3), small=boxes([16, 32, 48, 96], 32, 1), teaching=steps(2400, 1e-3, 8),
        training=steps(2400, 1e-3, 8),
        objectives=["TaskLoss", {"LogitKD": {"temperature": 1.0}}, "BoxKD"],
        pruning={**CHANNELS, "sparsity": 0.4}, calibrated=True,
    ),
}  # fmt: skip


def recipes(task: Task, data: Path, folder: Path, seed: int) -> dict[str, dict[str, Any]]:
    """The recipe of the teacher, or of each arm with a seed."""
    teacher, small = folder / TEACHER / "student", folder / "small"
    common = {
        "data": {"train": f"{data}:train", "eval": f"{data}:test", **task.read},
        "report": {"latency_rounds": 0, "resamples": 0},
    }
    if seed < 0:
        return {
            TEACHER: {**common, "model": str(folder / "base"), "training": {**task.teaching, "seed": 0}, "export": {}}
        }
    training = {"training": {**task.training, "seed": seed}}
    start: dict[str, Any] = {"model": str(teacher), "student": task.student}
    if task.small is not None:
        start = {"model": str(small)}
    # Where the student is a model of its own, the model that the recipe names is no teacher.
    taught = {**common, **start, **training, "objectives": task.objectives, "export": {}}
    if task.small is not None:
        taught["teacher"] = str(teacher)
    integers = {"quantization": {"weight_bits": 8, "activation_bits": 8}, "export": task.export}
    found = {
        ALONE: {**common, **start, **training, "export": {}},
        TAUGHT: taught,
        PRUNED: {**taught, "pruning": task.pruning},
    }
    if not task.calibrated:
        found[INT8] = {**taught, **integers}
    return {arm: found[arm] for arm in task.arms if arm in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--output_dir", type=Path, default=Path("out/bench-tasks"))
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--latency_rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, help="steps of every training, for a quick look")
    options = parser.parse_args()
    for name in options.tasks:
        task, folder = TASKS[name], options.output_dir / name
        data = data_of(task, options.data, folder)
        bases(task, data, folder)
        for seed in (-1, *options.seeds):
            for arm, recipe in recipes(task, data, folder, seed).items():
                if options.steps is not None:
                    recipe["training"]["max_steps"] = options.steps
                compress(recipe, place(folder, arm, seed))
            if task.calibrated and seed >= 0:
                calibrate(task, data, folder, seed)
        compare(task, options, folder)
        show(name, task, options, folder)


def place(folder: Path, arm: str, seed: int) -> Path:
    """Where the run of an arm is kept."""
    return folder / (arm if arm == TEACHER else f"{arm.replace(' ', '-')}-{seed}")


def data_of(task: Task, data: Path, folder: Path) -> Path:
    """The folder of the rows."""
    if task.rows is None:
        return data / task.data
    prepare(data / task.data, folder / "data", task.rows, task.sizes)
    return folder / "data"


def bases(task: Task, data: Path, folder: Path) -> None:
    """Saves the models that training starts from."""
    for name, make in (("base", task.base), ("small", task.small)):
        if make is not None and not (folder / name).exists():
            set_seed(0)
            for part in make(load_dataset(str(data), split="train")):
                part.save_pretrained(folder / name)


def compress(recipe: dict[str, Any], folder: Path) -> None:
    """`hfkdq compress`, unless it was done before."""
    if (folder / "report.json").exists():
        return
    file = folder.with_suffix(".yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    hfkdq("compress", str(file), "--output-dir", str(folder))


def calibrate(task: Task, data: Path, folder: Path, seed: int) -> None:
    """The 8-bit file of the student with the teacher, and its report."""
    student, target = place(folder, TAUGHT, seed) / "student", place(folder, INT8, seed)
    if (target / "report.json").exists():
        return
    shutil.rmtree(target, ignore_errors=True)
    calibration = ["--quantization", "int8", "--calibration-data", f"{data}:train", "--latency-rounds", "0"]
    hfkdq("export", str(student), str(target / "onnx"), *calibration, *_read(task))
    report([str(target / "onnx")], task, data, target / "report", 0)
    (target / "report" / "report.json").rename(target / "report.json")


def compare(task: Task, options: argparse.Namespace, folder: Path) -> None:
    """Times the files of the first seed in turn, one call of one row on one thread."""
    target = folder / "report"
    if (target / "report.json").exists():
        return
    shutil.rmtree(target, ignore_errors=True)
    seed = options.seeds[0]
    files = [f"{arm}={place(folder, arm, seed)}/onnx" for arm in (TEACHER, *task.arms[1:])]
    report(files, task, data_of(task, options.data, folder), target, options.latency_rounds)


def report(files: list[str], task: Task, data: Path, target: Path, rounds: int) -> None:
    """`hfkdq report` of files on the test split."""
    rest = ["--latency-rounds", str(rounds), "--threads", "1", "--resamples", "0", "--examples", "0"]
    hfkdq("report", *files, "--eval-data", f"{data}:test", "--output-dir", str(target), *_read(task), *rest)


def _read(task: Task) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in task.read.items()]


def hfkdq(*command: str) -> None:
    subprocess.run([sys.executable, "-m", "hfkdq", *command], check=True)


def show(name: str, task: Task, options: argparse.Namespace, folder: Path) -> None:
    """The row of the table: mean and standard deviation over the seeds, bytes and latency against the teacher's file."""
    sizes = {row.name: row for row in CompressionReport.load(folder / "report" / "report.json").engines}
    first = sizes[TEACHER]
    metric = next(iter(first.metrics))
    table = Table(
        "", metric, "against labels alone", "bytes (times smaller)", "ms (times faster)", title=f"{name}: {task.data}"
    )
    found: dict[str, list[float]] = {}
    for arm in task.arms:
        reports = [CompressionReport.load(place(folder, arm, seed) / "report.json") for seed in options.seeds]
        found[arm] = [100 * report.engines[-1].metrics[metric] for report in reports]
    table.add_row(TEACHER, f"{100 * first.metrics[metric]:.2f}", "", *_costs(first, first))
    for arm, values in found.items():
        gains = [value - alone for value, alone in zip(values, found[ALONE], strict=True)]
        costs = _costs(sizes[arm], first) if arm in sizes else ()
        table.add_row(arm, spread(values), "" if arm == ALONE else spread(gains, "+"), *costs)
    Console(width=140).print(table)


def _costs(row: Engine, first: Engine) -> tuple[str, ...]:
    times = (
        ""
        if row.latency is None
        else f"{row.latency.median_ms:.2f} ({first.latency.median_ms / row.latency.median_ms:.2f})"
    )
    return f"{row.size:,} ({first.size / row.size:.2f})", times


if __name__ == "__main__":
    main()
