# SPDX-License-Identifier: Apache-2.0
"""The whole chain on real images, without a download: scikit-learn's handwritten digits, in a few minutes on a CPU.

Uses the same public calls as any other program; what it needs beyond them is data and sizes.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, ViTImageProcessor, set_seed

from .export import export_onnx
from .files import DEMO, workspace
from .metrics import classification_metrics
from .objectives import AttentionKD, HiddenStateKD, LogitKD, TaskLoss
from .pruning import PruningCallback
from .quantization import QATCallback
from .report import CompressionReport, DatasetInfo
from .report.plots import check_plots
from .specs import PruningSpec, QuantizationSpec
from .students import make_student
from .trainer import DistillationTrainer
from .version import __version__

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

SIZE = 8


@dataclass(frozen=True)
class DemoSize:
    """The size of the demo: epochs of teacher and student, layers and width of the teacher, rows of data."""

    teacher_epochs: int = 4
    student_epochs: int = 4
    layers: int = 6
    width: int = 192
    rows: int | None = None


TINY = DemoSize(teacher_epochs=1, student_epochs=1, layers=2, width=32, rows=200)


def run_demo(output_dir: str | Path, size: DemoSize | None = None, overwrite: bool = False) -> CompressionReport:
    """Trains a teacher on handwritten digits, compresses it, and writes the result with its card, report and plot into
    `output_dir`: `teacher`, `onnx-float`, `onnx-int8` and what is known of them, once all of it is there. `overwrite`
    replaces what an earlier demo left there, and nothing else. Raises `FileExistsError`: an earlier demo left its
    result there, and `overwrite` is `False`; or files that no demo wrote, or that were changed since, have the names of
    its files. Raises `ImportError`: scikit-learn, matplotlib or the exporter is missing."""
    size, output_dir = size or DemoSize(), Path(output_dir)
    DEMO.check(output_dir, overwrite)
    check_plots()
    set_seed(42)
    processor = ViTImageProcessor(size={"height": SIZE, "width": SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    train, test = load_digits(processor, size.rows)
    with workspace(output_dir / "demo") as made:
        with tempfile.TemporaryDirectory() as scratch:
            teacher = train_teacher(train, test, size, scratch)
            trainer = compress(teacher, train, test, size, scratch)
        report = _publish(teacher, trainer, test, processor, made / "new")
        DEMO.check(output_dir, overwrite)
        DEMO.swap_in(made / "new", output_dir, made / "old")
    console = Console()
    console.print(report.table())
    for name in DEMO.names:
        console.print(f"  {output_dir / name}", highlight=False)
    return report


def load_digits(processor: ViTImageProcessor, rows: int | None = None) -> tuple[Dataset, Dataset]:
    """scikit-learn's 1,797 images as `pixel_values` of shape `(3, 8, 8)` with labels; two in nine are for the test.

    Each training image is there five times: as it is, and moved by one pixel to every side.
    """
    from datasets import Dataset
    from PIL import Image

    try:
        from sklearn.datasets import load_digits as bundled
    except ImportError as error:
        raise ImportError("The demo needs scikit-learn for its images: pip install scikit-learn pillow.") from error
    digits = bundled()
    images = (digits.images[:rows] * 255 / 16).astype(np.uint8)  # (images, 8, 8)
    labels = digits.target[:rows]
    order = np.random.default_rng(0).permutation(len(images))
    test, train = order[: len(order) * 2 // 9], order[len(order) * 2 // 9 :]
    moves = [(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)]
    moved = np.concatenate([_moved(images[train], *move) for move in moves])

    def dataset(images: np.ndarray[Any, Any], targets: np.ndarray[Any, Any]) -> Dataset:
        colored = [Image.fromarray(image).convert("RGB") for image in images]
        pixels = processor(colored, return_tensors="np")["pixel_values"].astype(np.float32)
        return Dataset.from_dict({"pixel_values": pixels, "labels": targets}).with_format("torch")

    return dataset(moved, np.tile(labels[train], len(moves))), dataset(images[test], labels[test])


def _moved(images: np.ndarray[Any, Any], down: int, right: int) -> np.ndarray[Any, Any]:
    """The images moved by so many pixels, with black where they were."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    return padded[:, 1 - down : 1 - down + SIZE, 1 - right : 1 - right + SIZE]


def train_teacher(train: Dataset, test: Dataset, size: DemoSize, scratch: str) -> PreTrainedModel:
    """A vision transformer, from scratch, by the plain Trainer."""
    names = {str(digit): digit for digit in range(10)}
    # Small models learn images this small much sooner from a wider start than the default 0.02.
    config = ViTConfig(
        image_size=SIZE, patch_size=2, num_channels=3, hidden_size=size.width, num_hidden_layers=size.layers,
        num_attention_heads=4, intermediate_size=4 * size.width, label2id=names,
        id2label={digit: name for name, digit in names.items()}, initializer_range=0.1,
    )  # fmt: skip
    teacher = ViTForImageClassification(config)
    _say(f"1/4 Training the teacher, a ViT with {size.layers} layers, from scratch")
    trainer = Trainer(
        teacher, _arguments(scratch, size.teacher_epochs), train_dataset=train, eval_dataset=test,
        compute_metrics=classification_metrics,
    )  # fmt: skip
    trainer.train()
    return teacher


def compress(
    teacher: PreTrainedModel, train: Dataset, test: Dataset, size: DemoSize, scratch: str
) -> DistillationTrainer:
    """Half of the layers, half of the neurons and 8 bits, in one run of the `DistillationTrainer`, whose model is the student."""
    student = make_student(teacher, num_layers=size.layers // 2)
    _say(f"2/4 Distilling, pruning and quantizing a student with {size.layers // 2} layers, in one run")
    trainer = DistillationTrainer(
        student, _arguments(scratch, size.student_epochs), train_dataset=train, eval_dataset=test,
        compute_metrics=classification_metrics, teacher_model=teacher,
        objectives=[TaskLoss(weight=0.5), LogitKD(temperature=2.0), HiddenStateKD(), AttentionKD(weight=0.1)],
        callbacks=[PruningCallback(PruningSpec(sparsity=0.5, structure="neuron")), QATCallback(QuantizationSpec())],
    )  # fmt: skip
    trainer.train()
    return trainer


def _publish(
    teacher: PreTrainedModel, trainer: DistillationTrainer, test: Dataset, processor: ViTImageProcessor, folder: Path
) -> CompressionReport:
    _say("3/4 Exporting to ONNX and comparing every file with PyTorch")
    folder.mkdir()
    for part in (teacher, processor):
        part.save_pretrained(folder / "teacher")
    student: Any = trainer.model
    images = test.remove_columns("labels")
    folders = {
        name: export_onnx(
            student, folder / place, quantization=quantization, processing_class=processor, calibration=images,
            latency_rounds=0,
        )
        for name, place, quantization in (
            ("ONNX float", "onnx-float", "float32"), ("ONNX int8", "onnx-int8", QuantizationSpec()),
        )
    }  # fmt: skip
    _say("4/4 Measuring all four on the test images")
    report = CompressionReport.measure(
        teacher=teacher, student=student, onnx=folders, eval_dataset=test, processing_class=processor,
        compute_metrics=classification_metrics, dataset=DatasetInfo(name="scikit-learn digits", split="test"),
        license="apache-2.0", log_history=trainer.state.log_history, training_args=trainer.args, rows=_pictures(test),
    )  # fmt: skip
    report.save_all(folder)
    DEMO.mark(folder, __version__)
    return report


def _pictures(test: Dataset) -> Dataset:
    """The images that the processor made the rows of."""
    from datasets import Dataset
    from PIL import Image

    pixels = np.asarray(test["pixel_values"][:])  # (images, 3, 8, 8)
    shown = np.round((pixels * 0.5 + 0.5) * 255).astype(np.uint8).transpose(0, 2, 3, 1)
    return Dataset.from_dict({"image": [Image.fromarray(image) for image in shown]})


def _arguments(scratch: str, epochs: int) -> TrainingArguments:
    return TrainingArguments(
        scratch, num_train_epochs=epochs, per_device_train_batch_size=64, learning_rate=1e-3, warmup_steps=50,
        lr_scheduler_type="cosine", weight_decay=0.01, logging_strategy="epoch", eval_strategy="no",
        save_strategy="no", report_to=[], seed=42, dataloader_pin_memory=torch.cuda.is_available(),
    )  # fmt: skip


def _say(text: str) -> None:
    Console().print(f"\n[bold]{text}[/bold]")
