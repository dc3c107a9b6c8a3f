#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Compress a segmenter, which says the class of each pixel, to an int8 file, and measure the mean IoU of the file.

    accelerate launch examples/segmentation.py --neuron_sparsity 0.5 --output_dir out/segmentation \
        --teacher_model_name_or_path path/to/a/finetuned/segformer --dataset path/to/folder

    python examples/segmentation.py --tiny --learning_rate 2e-3 --output_dir out/segmentation
    accelerate launch examples/segmentation.py --preset gpu

The data are a column `image`, and either images of classes in a column `mask`, or `objects` with boxes as for examples/detector.py: a
pixel then has the class after that of the box whose ellipse it is in, and 0 outside. That fits round things, such as blood cells. The stages
of a SegFormer have sizes of their own, so the student keeps all layers and loses neurons.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from example_utils import load_splits, parse, to_file, train_and_save
from PIL import Image, ImageDraw
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

from hfkdq import (
    DistillationTrainer,
    LogitKD,
    PruningCallback,
    PruningSpec,
    QATCallback,
    QuantizationSpec,
    TaskLoss,
)
from hfkdq.metrics import metrics_for

# Learning rate and batch of SegFormer on ADE20K (Xie et al., 2021).
GPU = {
    "teacher_model_name_or_path": "mattmdjaga/segformer_b2_clothes", "dataset": "mattmdjaga/human_parsing_dataset",
    "num_train_epochs": 20, "learning_rate": 6e-5, "weight_decay": 0.01, "lr_scheduler_type": "polynomial", "warmup_steps": 1500,
    "per_device_train_batch_size": 16, "per_device_eval_batch_size": 16, "output_dir": "out/segmentation",
}  # fmt: skip


@dataclass
class Arguments:
    teacher_model_name_or_path: str | None = field(default=None, metadata={"help": "Hub id or folder of a segmenter."})
    dataset: str | None = field(
        default=None,
        metadata={"help": "Hub id, or a folder of train.parquet and test.parquet, with image and mask or objects."},
    )
    neuron_sparsity: float = field(default=0.5, metadata={"help": "Share of the neurons that are removed."})
    tiny: bool = field(default=False, metadata={"help": "Made-up images and a small model, to try it in seconds."})


def ellipses(size: tuple[int, int], objects: Any) -> Image.Image:
    """The class of each pixel of a picture of this size, from boxes (x, y, width, height in pixels)."""
    canvas = Image.new("L", size)
    for (x, y, w, h), category in zip(objects["bbox"], objects["category"], strict=True):
        ImageDraw.Draw(canvas).ellipse((x, y, x + w, y + h), fill=category + 1)
    return canvas


def main(argv: list[str] | None = None) -> None:
    # Images are read when they are needed, from columns that no model knows.
    args, training_args = parse(Arguments, argv, GPU, remove_unused_columns=False)
    if args.tiny:
        from made_up import fit, segmentation

        raw, processor, teacher = segmentation()
    else:
        raw = load_splits(args.dataset)
        processor = AutoImageProcessor.from_pretrained(args.teacher_model_name_or_path)
        teacher = AutoModelForSemanticSegmentation.from_pretrained(args.teacher_model_name_or_path)

    def encode(rows: Any) -> dict[str, Any]:
        pictures = [image.convert("RGB") for image in rows["image"]]
        masks = rows.get("mask") or [
            ellipses(picture.size, objects) for picture, objects in zip(pictures, rows["objects"], strict=True)
        ]
        encoded = processor(
            pictures, segmentation_maps=[np.asarray(mask if mask.mode == "P" else mask.convert("L")) for mask in masks]
        )
        return {
            "pixel_values": torch.as_tensor(np.stack(encoded["pixel_values"])),
            "labels": torch.as_tensor(np.stack(encoded["labels"])).long(),
        }

    data = raw.with_transform(encode)
    if args.tiny:
        fit(teacher, data["train"], None, steps=30)
    metrics = metrics_for(teacher, processor)
    pruning = PruningSpec(structure="neuron", sparsity=args.neuron_sparsity, plain_checkpoint=False)
    trainer = DistillationTrainer(
        copy.deepcopy(teacher), training_args, train_dataset=data["train"], eval_dataset=data["test"], processing_class=processor,
        compute_metrics=metrics, preprocess_logits_for_metrics=metrics.preprocess, teacher_model=teacher,
        objectives=[TaskLoss(weight=0.5), LogitKD(temperature=1.0)],
        callbacks=[PruningCallback(pruning), QATCallback(QuantizationSpec())],
    )  # fmt: skip
    if train_and_save(trainer) is not None:
        to_file(trainer, teacher, data["test"], timed=not args.tiny)


if __name__ == "__main__":
    main()
