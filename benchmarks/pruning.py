#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""What does each way of pruning cost, and what does it bring? Structures and criteria, with a teacher and without, over seeds.

    make bench-pruning TEXT=path/to/rotten_tomatoes

Every pruned model of a task starts from the same one: for texts a distilled student of 3 layers, whose teacher of 6 goes on
teaching; for images the teacher itself (a ViT, and for channels a ConvNeXt). It is trained for the same number of steps while it is pruned: from the labels
alone, or from labels and teacher. "dense" is trained in the same way and not pruned. Embeddings of texts stay as they are.
Every run is kept in a file of its own, so that the command goes on where it was. Sizes and latency are those of the
float ONNX file, timed in turn, each in a process of its own. It ends with a table and a plot of each task.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets, load_dataset
from matplotlib.figure import Figure
from objectives import by_length
from rich.console import Console
from rich.table import Table
from text_classification import fine_tuned_teacher, pretrained
from transformers import (
    AutoTokenizer,
    ConvNextConfig,
    ConvNextForImageClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    ViTForImageClassification,
    ViTImageProcessor,
    set_seed,
)

from hfkdq import (
    DistillationTrainer,
    FeatureMapKD,
    HiddenStateKD,
    LogitKD,
    PruningCallback,
    PruningSpec,
    TaskLoss,
    export_onnx,
    make_student,
    prune,
)
from hfkdq.demo import SIZE, DemoSize, load_digits, train_teacher
from hfkdq.export.runtime import onnx_call
from hfkdq.measuring.latency import TimedEngine, time_engines
from hfkdq.metrics import classification_metrics
from hfkdq.pruning import compressed_size


@dataclass(frozen=True)
class Arm:
    """A spec, how many times the steps of the others it is trained for, and the one task that it is for.

    `base` is the arm of the same model that is not pruned.
    """

    spec: PruningSpec | None = None
    steps: float = 1.0
    task: str | None = None
    base: str = "dense"


def structure(name: str, sparsity: float | None = 0.5, criterion: str = "taylor", **fields: Any) -> PruningSpec:
    return PruningSpec(structure=name, sparsity=sparsity, criterion=criterion, end=0.5, **fields)


CONVOLUTIONS = "dense, ConvNeXt"
ARMS = {
    "dense": Arm(),
    "weight 50 %": Arm(structure("weight")),
    "n:m 2:4": Arm(structure("n:m", None)),
    "block 4x4 50 %": Arm(structure("block")),
    "head 50 %": Arm(structure("head", plain_checkpoint=False)),
    "layer 33 %": Arm(structure("layer", 0.34), task="text"),
    "layer 50 %": Arm(structure("layer"), task="images"),
    "hidden 25 %": Arm(structure("hidden", 0.25, plain_checkpoint=False)),
    "vocab, unused": Arm(PruningSpec(structure="vocab"), task="text"),
    **{
        f"neuron 50 %, {criterion}": Arm(structure("neuron", criterion=criterion))
        for criterion in ("random", "magnitude", "activation", "taylor", "fisher", "movement", "teacher")
    },
    "neuron 50 %, taylor, 4 x steps": Arm(structure("neuron"), steps=4.0),
    CONVOLUTIONS: Arm(task="images", base=CONVOLUTIONS),
    "channel 50 %, ConvNeXt": Arm(structure("channel", plain_checkpoint=False), task="images", base=CONVOLUTIONS),
}


@dataclass(frozen=True)
class Task:
    """Data and the model to prune, by the tokenizer that reads its texts; what one call of a timed file looks like."""

    name: str
    rows: Callable[[Any], dict[str, Dataset]]
    models: dict[str, tuple[PreTrainedModel, PreTrainedModel]]  # by name of the dense arm: the teacher, and the start
    processing_class: Any
    corpus: Any
    steps: int
    settings: dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--text", type=Path, help="folder of rotten_tomatoes: train, validation and test parquet files"
    )
    parser.add_argument("--images", action="store_true", help="scikit-learn's digits, which come with it")
    parser.add_argument("--output_dir", type=Path, default=Path("out/bench-pruning"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--text_steps", type=int, default=60, help="steps of 16 texts")
    parser.add_argument("--image_steps", type=int, default=100, help="steps of 32 images")
    parser.add_argument(
        "--rounds", type=int, default=7, help="turns of every file when they are timed; 0 leaves it out"
    )
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if options.text is None and not options.images:
        parser.error("Give --text, --images or both.")
    tasks = [text_task(options)] if options.text else []
    tasks += [image_task(options)] if options.images else []
    for task in tasks:
        folder = options.output_dir / task.name
        for seed in options.seeds:
            for arm in options.arms:
                for distilled in (False, True):
                    if ARMS[arm].task in (None, task.name):
                        run(task, arm, distilled, seed, folder)
        if options.rounds:
            time_files(task, folder, options)
        show(task, folder)


def text_task(options: argparse.Namespace) -> Task:
    """Rotten Tomatoes, validation and test rows together; all-MiniLM-L6-v2, fine-tuned."""
    files = {split: str(options.text / f"{split}.parquet") for split in ("train", "validation", "test")}
    raw = load_dataset("parquet", data_files=files).rename_column("label", "labels")

    def rows(tokenizer: Any) -> dict[str, Dataset]:
        def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
            return tokenizer(batch["text"], truncation=True, max_length=64)

        data = raw.map(encode, batched=True, remove_columns=["text"])
        test = concatenate_datasets([data["validation"], data["test"]])
        return {"train": data["train"], "test": by_length(test)}

    tokenizer = AutoTokenizer.from_pretrained(pretrained())
    first = argparse.Namespace(output_dir=options.output_dir / "text", teacher_epochs=2)
    first.output_dir.mkdir(parents=True, exist_ok=True)
    teacher = fine_tuned_teacher(first, tokenizer, rows(tokenizer))
    settings = dict(learning_rate=1e-4, per_device_train_batch_size=16, weight_decay=0.01, group_by_length=True)
    start = options.output_dir / "text" / "start"
    if not (start / "model.safetensors").exists():
        set_seed(0)
        student = make_student(teacher, num_layers=3)
        student.get_input_embeddings().requires_grad_(False)
        longer = {**settings, "learning_rate": 1e-4, "per_device_train_batch_size": 32}
        DistillationTrainer(
            student, arguments(start, 0, 240, longer), train_dataset=rows(tokenizer)["train"], processing_class=tokenizer,
            teacher_model=teacher, objectives=[TaskLoss(weight=0.5), LogitKD(), HiddenStateKD()],
        ).train()  # fmt: skip
        student.save_pretrained(start)
    student = type(teacher).from_pretrained(start)
    models = {"dense": (teacher, student)}
    return Task("text", rows, models, tokenizer, raw["train"]["text"], options.text_steps, settings)


def image_task(options: argparse.Namespace) -> Task:
    """Handwritten digits; a ViT from scratch, the data and the recipe of the demo, and a ConvNeXt for its channels."""
    processor = ViTImageProcessor(size={"height": SIZE, "width": SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    train, test = load_digits(processor)
    folder = options.output_dir / "images" / "teacher"
    if not (folder / "model.safetensors").exists():
        set_seed(0)
        size = DemoSize()
        train_teacher(train, test, size, str(folder.parent / "scratch")).save_pretrained(folder)
    convolutions = options.output_dir / "images" / "convolutions"
    if not (convolutions / "model.safetensors").exists():
        set_seed(0)
        config = ConvNextConfig(
            image_size=SIZE, patch_size=2, num_channels=3, num_stages=2, hidden_sizes=[64, 128], depths=[2, 2],
            layer_scale_init_value=0.1, num_labels=10,
        )  # fmt: skip
        model = ConvNextForImageClassification(config)
        settings = dict(learning_rate=1e-3, per_device_train_batch_size=32, weight_decay=0.05)
        Trainer(model, arguments(convolutions, 0, 600, settings), train_dataset=train).train()
        model.save_pretrained(convolutions)
    teacher = ViTForImageClassification.from_pretrained(folder)
    network = ConvNextForImageClassification.from_pretrained(convolutions)
    models = {"dense": (teacher, teacher), CONVOLUTIONS: (network, network)}
    settings = dict(learning_rate=5e-4, per_device_train_batch_size=32, weight_decay=0.01)
    rows = {"train": train, "test": test}
    return Task("images", lambda _: rows, models, processor, None, options.image_steps, settings)


def arguments(folder: Path, seed: int, steps: int, settings: dict[str, Any]) -> TrainingArguments:
    return TrainingArguments(
        str(folder / "scratch"), seed=seed, max_steps=steps, warmup_ratio=0.05, save_strategy="no", report_to=[],
        per_device_eval_batch_size=128, logging_steps=1000, disable_tqdm=True, dataloader_pin_memory=False, **settings,
    )  # fmt: skip


def run(task: Task, name: str, distilled: bool, seed: int, folder: Path) -> None:
    """Makes, measures and records one model, unless that was done before."""
    how = "distilled" if distilled else "labels"
    file = folder / f"{slug(name)}-{how}-{seed}.json"
    if file.exists():
        return
    arm = ARMS[name]
    processing_class, (teacher, start) = task.processing_class, task.models[arm.base]
    model = copy.deepcopy(start).requires_grad_(True)
    set_seed(seed)
    before = sum(parameter.numel() for parameter in model.parameters())
    callbacks = []
    if name.startswith("vocab"):
        processing_class = copy.deepcopy(processing_class)
        prune(model, arm.spec, task.corpus, processing_class=processing_class)
        teacher = copy.deepcopy(teacher)  # reads the same texts by the same new ids
        prune(teacher, arm.spec, task.corpus, processing_class=copy.deepcopy(task.processing_class))
    rows = task.rows(processing_class)
    if task.corpus is not None:
        model.get_input_embeddings().requires_grad_(False)
    if arm.spec is not None and not name.startswith("vocab"):
        guided = dict(
            calibration=rows["train"].select(range(64)), teacher_model=teacher, processing_class=processing_class
        )
        callbacks = [PruningCallback(arm.spec, **(guided if arm.spec.criterion == "teacher" else {}))]
    inner = [HiddenStateKD()] if arm.base == "dense" else [FeatureMapKD()]
    taught = dict(teacher_model=teacher, objectives=[TaskLoss(weight=0.5), LogitKD(temperature=2.0), *inner])
    trainer = DistillationTrainer(
        model, arguments(folder, seed, round(task.steps * arm.steps), task.settings), train_dataset=rows["train"], processing_class=processing_class, callbacks=callbacks,
        compute_metrics=classification_metrics, **(taught if distilled else {}),
    )  # fmt: skip
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    accuracy = 100 * trainer.evaluate(rows["test"])["eval_accuracy"]
    kept = list(model.parameters())
    found = dict(
        arm=name, distilled=distilled, seed=seed, accuracy=accuracy, steps=trainer.state.global_step, seconds=seconds,
        before=before, parameters=sum(p.numel() for p in kept), nonzero=sum(int(p.count_nonzero()) for p in kept),
    )  # fmt: skip
    if seed == 0 and distilled:
        exported = folder / f"{slug(name)}-onnx"
        shutil.rmtree(exported, ignore_errors=True)
        texts = rows["test"].remove_columns("labels").select(range(64))
        export_onnx(model, exported, processing_class=processing_class, calibration=texts)
        found["bytes"] = (exported / "model.onnx").stat().st_size
        found["compressed"] = compressed_size(exported / "model.onnx", "gzip").bytes
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=2) + "\n")
    print(f"{task.name}, {name}, {how}, seed {seed}: {accuracy:.2f} %, {seconds:.0f} s", flush=True)


def time_files(task: Task, folder: Path, options: argparse.Namespace) -> None:
    """Times the files in turn: one of each structure, since criteria do not change shapes."""
    names = [name for name in ARMS if (folder / f"{slug(name)}-onnx").exists() and not is_repeated(name)]
    batch = timed_batch(task)
    engines = [TimedEngine(name, onnx_call, folder / f"{slug(name)}-onnx" / "model.onnx", batch) for name in names]
    found = time_engines(engines, threads=options.threads, rounds=options.rounds)
    result = {name: {"median": one.median_ms, "min": one.min_ms} for name, one in zip(names, found, strict=True)}
    (folder / "latency.json").write_text(json.dumps(result, indent=2) + "\n")


def is_repeated(name: str) -> bool:
    """Whether another arm has the same shapes."""
    return name.startswith("neuron") and name != "neuron 50 %, taylor"


def timed_batch(task: Task) -> dict[str, Any]:
    """One image, or a text of 64 tokens."""
    import numpy as np

    if task.corpus is None:
        return {"pixel_values": np.asarray(task.rows(None)["test"][:1]["pixel_values"], dtype=np.float32)}
    ids = np.full((1, 64), 100, dtype=np.int64)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def slug(name: str) -> str:
    return "_".join("".join(letter if letter.isalnum() else " " for letter in name).split())


def show(task: Task, folder: Path) -> None:
    """A row for every arm: accuracy with a teacher and without, difference to the dense one of the seed, size and time."""
    found = [json.loads(file.read_text()) for file in sorted(folder.glob("*-[0-9].json"))]
    latency = json.loads(file.read_text()) if (file := folder / "latency.json").exists() else {}
    accuracy = {(r["arm"], r["distilled"], r["seed"]): r["accuracy"] for r in found}
    sizes = {r["arm"]: r for r in found if "bytes" in r}
    table = Table(
        "Pruned", title=f"{task.name}: accuracy (%) on {len(task.rows(task.processing_class)['test'])} test rows"
    )
    for how in ("labels alone", "distilled"):
        table.add_column(how, justify="right", no_wrap=True)
        table.add_column("against dense", justify="right", no_wrap=True)
    for title in ("parameters (M)", "not zero", "ONNX (MB)", "gzip (MB)", "ms", "faster"):
        table.add_column(title, justify="right")
    for arm in ARMS:
        runs = {d: {s: a for (n, how, s), a in accuracy.items() if (n, how) == (arm, d)} for d in (False, True)}
        if not runs[True] and not runs[False]:
            continue
        cells = []
        for distilled, values in runs.items():
            base = [a - dense for s, a in values.items() if (dense := accuracy.get((ARMS[arm].base, distilled, s)))]
            cells += [spread(list(values.values())), "" if arm == ARMS[arm].base else spread(base, "+")]
        size = sizes.get(arm)
        cells += (
            [f"{size['parameters'] / 1e6:.2f}", f"{size['nonzero'] / 1e6:.2f}", f"{size['bytes'] / 1e6:.2f}", f"{size['compressed'] / 1e6:.2f}"]
            if size
            else [""] * 4
        )  # fmt: skip
        time_of = latency.get(arm)
        cells += (
            [f"{time_of['median']:.2f}", f"{latency[ARMS[arm].base]['median'] / time_of['median']:.2f}"]
            if time_of
            else ["", ""]
        )
        table.add_row(arm, *cells)
    console = Console(width=max(150, Console().width))
    console.print(table)
    plot(task, accuracy, sizes, latency, folder.parent / f"{task.name}.png")


def spread(values: list[float], sign: str = "") -> str:
    """Mean and standard deviation."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.2f}{deviation}" if values else "-"


def plot(task: Task, accuracy: dict[Any, float], sizes: dict[str, Any], latency: dict[str, Any], file: Path) -> None:
    """Accuracy of structures against parameters and time, and of criteria for neurons; a point is a mean over seeds."""
    figure = Figure(figsize=(13, 4.5), layout="constrained")
    left, middle, right = figure.subplots(1, 3, sharey=True)
    colors = {False: "tab:gray", True: "tab:blue"}

    def mean(arm: str, distilled: bool) -> list[float]:
        return [a for (name, how, _), a in accuracy.items() if (name, how) == (arm, distilled)]

    structures = [arm for arm in ARMS if arm in sizes and not is_repeated(arm) and ARMS[arm].base == "dense"]
    for axes, label, places in (
        (left, "parameters that are not zero (million)", {arm: sizes[arm]["nonzero"] / 1e6 for arm in structures}),
        (middle, "ONNX Runtime, median (ms)", {arm: latency[arm]["median"] for arm in structures if arm in latency}),
    ):
        for distilled, color in colors.items():
            arms = [arm for arm in places if mean(arm, distilled)]
            values = [statistics.mean(mean(arm, distilled)) for arm in arms]
            axes.plot([places[arm] for arm in arms], values, "o", color=color)
            for arm, value in zip(arms, values, strict=True):
                if distilled:
                    axes.annotate(
                        arm.replace(", taylor", ""),
                        (places[arm], value),
                        fontsize=7,
                        xytext=(4, 3),
                        textcoords="offset points",
                    )
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    left.set_ylabel("accuracy (%)")
    criteria = [arm for arm in ARMS if arm.startswith("neuron") and (mean(arm, True) or mean(arm, False))]
    for shift, (distilled, color) in zip((-0.12, 0.12), colors.items(), strict=True):
        for place, arm in enumerate(criteria):
            values = mean(arm, distilled)
            right.plot([place + shift] * len(values), values, "o", markersize=3, color=color)
            if values:
                right.plot([place + shift], [statistics.mean(values)], "_", markersize=14, color=color)
    names = [arm.removeprefix("neuron 50 %, ").replace(", ", ",\n") for arm in criteria]
    right.set_xticks(range(len(criteria)), names, rotation=45, ha="right")
    right.set_title("half of the neurons, by criterion", fontsize=9)
    right.grid(axis="y", alpha=0.3)
    for distilled, label in ((False, "labels alone"), (True, "distilled")):
        left.plot([], [], "o", color=colors[distilled], label=label)
    left.legend(fontsize=8)
    figure.suptitle(task.name)
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    main()
