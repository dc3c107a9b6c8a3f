#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Where does a teacher pay? Students with and without one, with all labels and with a tenth of them, over seeds.

    make bench-teacher TEXT=path/to/banking77 IMAGES=path/to/fashion_mnist

Every arm of a setting has the same student, the same steps and as many rows in a step; the teacher's outputs are cached, so a
step costs the same in all. Learning rate and loss are chosen on rows held out of the training split, from as many tries for
every arm and with a seed of their own; then every arm is trained with each of the seeds and measured on the test split. A
teacher has seen the labels of all rows, which is what a model has that does the task already. Every run is kept in a file
of its own, so that the command goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Array3D, Dataset, Features, Value, load_dataset
from objectives import fine_tuned_teacher, student_of
from objectives import load as load_text
from quantization import extremes, residual_network, slug, spread
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from hfkdq import DistillationTrainer, HiddenStateKD, LogitKD, TaskLoss, cache_teacher_outputs
from hfkdq.metrics import classification_metrics
from hfkdq.schedules import Linear

ALONE, LABELLED = "labels alone", "with the teacher"
ALL_ROWS, BY_SHARE = "with the teacher, unlabelled rows too", "with the teacher, all rows, labels by their share"
TUNING_SEED = 100
# What an arm may try beside its learning rates: arguments of the training, or objectives. As many for one as for the other.
LABELS: dict[str, Any] = {"cross-entropy": {}, "label smoothing 0.1": {"label_smoothing_factor": 0.1}}
# The labels' loss is a mean over the rows with labels: times their share, no row counts more than another.
TAUGHT: dict[str, Any] = {
    "half, T=2": lambda share: [TaskLoss(weight=0.5 * share), LogitKD(temperature=2.0)],
    "fading, T=4": lambda share: [TaskLoss(weight=Linear(share, 0)), LogitKD(temperature=4.0)],
}
# Of many classes a softened distribution says less about the likeliest.
LABELS_OF_MANY = {**LABELS, "label smoothing 0.3": {"label_smoothing_factor": 0.3}}
TAUGHT_OF_MANY = {**TAUGHT, "half, T=1": lambda share: [TaskLoss(weight=0.5 * share), LogitKD(temperature=1.0)]}


@dataclass(frozen=True)
class Setting:
    """A student and its data, of which a share has labels; how long it is trained, and what is tried."""

    data: Callable[[argparse.Namespace], Data]
    student: Callable[[PreTrainedModel], PreTrainedModel]
    labelled: float
    steps: int
    rates: tuple[float, float]
    training: dict[str, Any]
    losses: tuple[dict[str, Any], dict[str, Any]]
    hidden: tuple[Any, ...] = ()

    @property
    def arms(self) -> list[str]:
        return [ALONE, LABELLED, *([ALL_ROWS, BY_SHARE] if self.labelled < 1 else [])]

    def tries(self, arm: str) -> list[tuple[float, str]]:
        """Both learning rates with the first loss, and the other losses with the first rate."""
        first, *others = self.losses[arm != ALONE]
        return [*((rate, first) for rate in self.rates), *((self.rates[0], other) for other in others)]


@dataclass(frozen=True)
class Data:
    """Rows with the teacher's outputs, rows held out of them, test rows, and the teacher."""

    train: Dataset
    held_out: Dataset
    test: Dataset
    teacher: PreTrainedModel
    processing_class: Any = None


def images(options: argparse.Namespace) -> Data:
    """Fashion-MNIST, every training image mirrored too; the teacher is a residual network of 1.2M parameters."""
    files = {split: str(options.images / f"{split}*.parquet") for split in ("train", "test")}
    raw = load_dataset("parquet", data_files=files)
    order = raw["train"].shuffle(seed=0)
    last = len(order) if options.max_rows is None else 5000 + options.max_rows
    held_out, rows = pixels(order.select(range(5000))), pixels(order.select(range(5000, last)))
    test, folder = pixels(raw["test"]), options.output_dir / "images" / "teacher"
    if not (folder / "model.safetensors").exists():
        set_seed(0)
        teacher = residual_network([42, 84, 168], depth=2)
        settings = arguments(folder.parent, 0, options.image_teacher_steps, 3e-3, per_device_train_batch_size=128)
        Trainer(teacher, settings, train_dataset=both_ways(rows)).train()
        teacher.save_pretrained(folder)
    teacher = ResNetForImageClassification.from_pretrained(folder)
    cached = cache_teacher_outputs(teacher, both_ways(rows), folder=folder.parent / "outputs", batch_size=128)
    return Data(cached, held_out, test, teacher)


def pixels(rows: Dataset) -> Dataset:
    """Rows with normalized pixels (channel, height, width)."""
    stacked = np.stack([np.asarray(image, np.float32) for image in rows["image"]])[:, None]
    return dataset_of((stacked / 255 - 0.286) / 0.353, np.asarray(rows["label"]))


def dataset_of(values: np.ndarray, labels: np.ndarray) -> Dataset:
    features = Features({"pixel_values": Array3D((1, 28, 28), "float32"), "labels": Value("int64")})
    return Dataset.from_dict({"pixel_values": values, "labels": labels}, features).with_format("torch")


def both_ways(rows: Dataset) -> Dataset:
    """The rows, each followed by its mirror image, so that both may be cached and the first rows are those of any share."""
    values, labels = rows.with_format("numpy")["pixel_values"][:], rows.with_format("numpy")["labels"][:]
    return dataset_of(np.stack([values, values[..., ::-1]], axis=1).reshape(-1, *values.shape[1:]), labels.repeat(2))


def text(options: argparse.Namespace) -> Data:
    """banking77; the teacher is all-MiniLM-L6-v2, fine-tuned."""
    settings = argparse.Namespace(
        data=options.text, output_dir=options.output_dir / "text", teacher_epochs=options.text_teacher_epochs, max_rows=options.max_rows
    )  # fmt: skip
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    tokenizer, data, labels = load_text(settings)
    teacher = fine_tuned_teacher(settings, tokenizer, data, labels)
    cached = cache_teacher_outputs(
        teacher, data["train"], processing_class=tokenizer, folder=settings.output_dir / "outputs", hidden_states=[6]
    )
    return Data(cached, data["held_out"], data["test"], teacher, tokenizer)


def small_network(teacher: PreTrainedModel) -> PreTrainedModel:
    """A residual network of 0.24M parameters."""
    return residual_network([28, 56, 112], depth=1)


class RecurrentConfig(PretrainedConfig):
    model_type = "recurrent_text_classifier"

    def __init__(self, vocab_size: int = 30522, width: int = 128, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.vocab_size, self.width = vocab_size, width


class RecurrentClassifier(PreTrainedModel):
    """A GRU that reads token ids (batch, tokens) both ways; the logits come from the mean of what it remembers."""

    config_class = RecurrentConfig
    main_input_name = "input_ids"

    def __init__(self, config: RecurrentConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.width)
        self.gru = nn.GRU(config.width, config.width, batch_first=True, bidirectional=True)
        self.classifier = nn.Linear(2 * config.width, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        pass  # PyTorch's own are meant for recurrent layers

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor | None = None
    ) -> SequenceClassifierOutput:
        mask = attention_mask.unsqueeze(-1).float()
        remembered = self.gru(self.embeddings(input_ids) * mask)[0] * mask
        logits = self.classifier(remembered.sum(1) / mask.sum(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def recurrent(teacher: PreTrainedModel) -> PreTrainedModel:
    """A small GRU from random weights, over the teacher's tokenizer."""
    names = {"id2label": teacher.config.id2label, "label2id": teacher.config.label2id}
    return RecurrentClassifier(RecurrentConfig(vocab_size=teacher.config.vocab_size, **names))


def copied_layers(teacher: PreTrainedModel) -> PreTrainedModel:
    """Two of the teacher's six layers, and its embeddings as they are."""
    return student_of(teacher, 2)


IMAGES = (images, small_network)
GRU = (text, recurrent)
COPIED = (text, copied_layers)
BY_64: dict[str, Any] = {"per_device_train_batch_size": 64}
BY_32: dict[str, Any] = {"per_device_train_batch_size": 32, "group_by_length": True}
FEW, MANY = (LABELS, TAUGHT), (LABELS_OF_MANY, TAUGHT_OF_MANY)
# For students with the teacher's layers, whose hidden states can be compared.
HIDDEN = (HiddenStateKD(layers={2: 6}),)
SETTINGS = {
    "images, a tenth of the labels": Setting(*IMAGES, 0.1, 800, (3e-3, 1e-3), BY_64, FEW),
    "images, all labels": Setting(*IMAGES, 1.0, 1200, (3e-3, 1e-3), BY_64, FEW),
    "text, a GRU, a tenth of the labels": Setting(*GRU, 0.1, 300, (5e-3, 2e-3), BY_64, MANY),
    "text, copied layers, a tenth of the labels": Setting(*COPIED, 0.1, 150, (5e-4, 2e-4), BY_32, MANY, HIDDEN),
    "text, a GRU, all labels": Setting(*GRU, 1.0, 300, (5e-3, 2e-3), BY_64, MANY),
    "text, copied layers, all labels": Setting(*COPIED, 1.0, 150, (5e-4, 2e-4), BY_32, MANY, HIDDEN),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, help="folder of banking77: train and test parquet files")
    parser.add_argument("--images", type=Path, help="folder of fashion_mnist: train and test parquet files")
    parser.add_argument("--output_dir", type=Path, default=Path("out/bench-teacher"))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, help="by default all that there are data for")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="of every student, in the place of those of its setting")
    parser.add_argument(
        "--longer", type=float, default=1.0, help="steps of the students that are measured, of those of the tries"
    )
    parser.add_argument("--max_rows", type=int, help="of the training split, for a quick look")
    parser.add_argument("--image_teacher_steps", type=int, default=1500, help="128 rows each")
    parser.add_argument("--text_teacher_epochs", type=float, default=3)
    options = parser.parse_args()
    given = {images: options.images, text: options.text}
    names = options.settings or [name for name, setting in SETTINGS.items() if given[setting.data]]
    if not names or not all(given[SETTINGS[name].data] for name in names):
        parser.error("Give --text and --images, or the one that the settings need.")
    loaded: dict[Any, Data] = {}
    for name in names:
        setting = SETTINGS[name]
        if options.steps is not None:
            setting = replace(setting, steps=options.steps)
        if setting.data not in loaded:
            loaded[setting.data] = setting.data(options)
        data = loaded[setting.data]
        folder = options.output_dir / slug(name)
        best = {}
        for arm in setting.arms:
            tuned = [run(setting, data, arm, *one, TUNING_SEED, "held_out", folder) for one in setting.tries(arm)]
            best[arm] = max(tuned, key=lambda found: found["accuracy"])
        setting = replace(setting, steps=round(setting.steps * options.longer))
        for seed in options.seeds:
            for arm, one in best.items():
                run(setting, data, arm, one["rate"], one["loss"], seed, "test", folder)
        show(name, setting, data, folder)


def arguments(folder: Path, seed: int, steps: int, rate: float, **settings: Any) -> TrainingArguments:
    return TrainingArguments(
        str(folder / "scratch"), seed=seed, max_steps=steps, learning_rate=rate, warmup_ratio=0.1, weight_decay=0.01,
        lr_scheduler_type="cosine", per_device_eval_batch_size=250, save_strategy="no", report_to=[],
        logging_steps=max(1, steps // 4), disable_tqdm=True, dataloader_pin_memory=False, **settings,
    )  # fmt: skip


def rows_of(train: Dataset, arm: str, share: float) -> Dataset:
    """The rows that an arm learns from: those with labels, or all, of which the others have lost theirs."""
    count = round(len(train) * share)
    if arm not in (ALL_ROWS, BY_SHARE):
        return train.select(range(count))
    labels = np.asarray(train.with_format("numpy")["labels"][:])
    labels[count:] = -100
    return train.remove_columns("labels").add_column("labels", labels)


def run(
    setting: Setting, data: Data, arm: str, rate: float, loss: str, seed: int, split: str, folder: Path
) -> dict[str, Any]:
    """Trains, measures and records one student, unless that was done before."""
    file = folder / f"{slug(arm)}-{slug(loss)}-{rate}-{setting.steps}-{seed}-{split}.json"
    if file.exists():
        return json.loads(file.read_text())
    set_seed(seed)
    chosen = setting.losses[arm != ALONE][loss]
    settings = arguments(folder, seed, setting.steps, rate, **setting.training, **(chosen if arm == ALONE else {}))
    share = setting.labelled if arm == BY_SHARE else 1.0
    taught = {} if arm == ALONE else {"objectives": [*chosen(share), *setting.hidden]}
    trainer = DistillationTrainer(
        setting.student(data.teacher), settings, train_dataset=rows_of(data.train, arm, setting.labelled),
        processing_class=data.processing_class, compute_metrics=classification_metrics,
        **taught,
    )  # fmt: skip
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    accuracy = 100 * trainer.evaluate(getattr(data, split))["eval_accuracy"]
    found = dict(arm=arm, loss=loss, rate=rate, seed=seed, steps=trainer.state.global_step, seconds=seconds)
    found |= dict(split=split, accuracy=accuracy)
    print(f"{folder.name}: {found}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=2) + "\n")
    return found


def show(name: str, setting: Setting, data: Data, folder: Path) -> None:
    """Accuracy of every arm on the test split, and the difference to the student of the same seed without a teacher."""
    found = [json.loads(file.read_text()) for file in sorted(folder.glob(f"*-{setting.steps}-*-test.json"))]
    accuracy = {arm: {r["seed"]: r["accuracy"] for r in found if r["arm"] == arm} for arm in setting.arms}
    table = Table("Student", title=f"{name}: accuracy (%) on {len(data.test)} test rows")
    for column in ("accuracy", "against labels alone", "errors less (%)", "chosen"):
        table.add_column(column, justify="right", no_wrap=column != "chosen")
    alone = accuracy[ALONE]
    for arm, runs in accuracy.items():
        gains = [value - alone[seed] for seed, value in runs.items() if seed in alone]
        fewer = 100 * sum(gains) / sum(100 - alone[seed] for seed in runs if seed in alone)
        chosen = {f"{r['loss']}, {r['rate']:g}" for r in found if r["arm"] == arm}
        compared = ["", ""] if arm == ALONE else [f"{spread(gains, '+')}{extremes(gains)}", f"{fewer:.0f}"]
        table.add_row(arm, spread(list(runs.values())), *compared, "; ".join(sorted(chosen)))
    console = Console(width=max(110, Console().width))
    console.print(table)
    trainer = Trainer(
        data.teacher, arguments(folder, 0, 1, 0.0), processing_class=data.processing_class, compute_metrics=classification_metrics
    )  # fmt: skip
    sizes = [
        sum(weight.numel() for weight in model.parameters()) for model in (data.teacher, setting.student(data.teacher))
    ]
    console.print(
        f"Teacher: {100 * trainer.evaluate(data.test)['eval_accuracy']:.2f} %, {sizes[0] / 1e6:.2f}M parameters; the student "
        f"has {sizes[1] / 1e6:.2f}M."
    )


if __name__ == "__main__":
    main()
