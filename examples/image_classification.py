#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Compress an image classifier to an int8 file of a small family, with augmentation that teacher and student both see.

    accelerate launch examples/image_classification.py --mixing cutmix --num_train_epochs 20 --output_dir out/mobile \
        --teacher_model_name_or_path path/to/resnet-50 --dataset zalando-datasets/fashion_mnist

    python examples/image_classification.py --tiny --mixing mixup --learning_rate 1e-3 --output_dir out/mobile
    accelerate launch examples/image_classification.py --preset gpu

Pictures of the training are cropped at random, mirrored, and mixed in pairs; the teacher says what it sees in the mixture. The
student is a MobileNetV2 of `--depth_multiplier` times the usual channels, from random weights or from --student_model_name_or_path.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from example_utils import load_splits, parse, to_file, train_and_save
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot, pad
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
)

from hfkdq import DistillationTrainer, LogitKD, QATCallback, QuantizationSpec, TaskLoss
from hfkdq.metrics import classification_metrics

# Mixed pictures that teacher and student see alike, a cosine and patience: Beyer et al., 2022, who train for far longer still.
GPU = {
    "teacher_model_name_or_path": "nateraw/food", "student_model_name_or_path": "google/mobilenet_v2_1.0_224",
    "dataset": "ethz/food101", "mixing": "mixup", "num_train_epochs": 100, "learning_rate": 1e-3, "weight_decay": 1e-4,
    "lr_scheduler_type": "cosine", "warmup_steps": 1000, "per_device_train_batch_size": 256,
    "per_device_eval_batch_size": 256, "dataloader_num_workers": 16, "output_dir": "out/mobile",
}  # fmt: skip


@dataclass
class Arguments:
    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or folder of a classifier."}
    )
    student_model_name_or_path: str | None = field(default=None, metadata={"help": "The same of the student."})
    dataset: str | None = field(
        default=None, metadata={"help": "Hub id, or a folder of train.parquet and test.parquet, with image and label."}
    )
    depth_multiplier: float = field(default=0.5, metadata={"help": "Channels of the student, of the usual ones."})
    mixing: Literal["none", "mixup", "cutmix"] = field(default="none", metadata={"help": "How pictures are mixed."})
    mirror: bool = field(default=True, metadata={"help": "Whether a mirrored picture shows the same."})
    tiny: bool = field(default=False, metadata={"help": "scikit-learn's digits and small models, in seconds."})


def cropped(pixels: Tensor, margin: int = 4) -> Tensor:
    """Each of the pictures (batch, channels, height, width), moved by up to `margin` pixels."""
    wide, (height, width) = pad(pixels, [margin] * 4, mode="replicate"), pixels.shape[-2:]
    places = torch.randint(2 * margin + 1, (len(pixels), 2)).tolist()
    return torch.stack([one[:, y : y + height, x : x + width] for one, (y, x) in zip(wide, places, strict=True)])


def mixed(pixels: Tensor, labels: Tensor, how: str) -> tuple[Tensor, Tensor]:
    """Pictures mixed with others of the batch, and labels (batch, classes) in the same shares.

    Mixup adds up pictures (Zhang et al., 2018), CutMix pastes a rectangle (Yun et al., 2019); the share is uniform in [0, 1].
    """
    share, others = float(torch.rand(())), torch.randperm(len(pixels))
    if how == "mixup":
        pixels = share * pixels + (1 - share) * pixels[others]
    else:
        height, width = pixels.shape[-2:]
        h, w = (round(side * (1 - share) ** 0.5) for side in (height, width))
        y, x = (int(torch.randint(side - cut + 1, ())) for side, cut in ((height, h), (width, w)))
        pixels = pixels.clone()
        pixels[..., y : y + h, x : x + w] = pixels[others][..., y : y + h, x : x + w]
        share = 1 - h * w / (height * width)
    return pixels, share * labels + (1 - share) * labels[others]


def loss_of(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Cross-entropy with classes (batch,) or shares of them (batch, classes), as the mean over all that one update sees."""
    count = len(labels) if num_items_in_batch is None else num_items_in_batch / labels[0].numel()
    return cross_entropy(outputs.logits, labels, reduction="sum") / count


def main(argv: list[str] | None = None) -> None:
    # Pictures are read when they are needed, from a column that no model knows.
    args, training_args = parse(Arguments, argv, GPU, remove_unused_columns=False)
    processor, labels = None, [str(digit) for digit in range(10)]
    if args.tiny:
        from made_up import images

        raw, _, teacher = images(convolutional=True)

        def read(rows: Any) -> tuple[Tensor, Tensor]:
            return torch.as_tensor(rows["pixel_values"]), torch.as_tensor(rows["labels"])

    else:
        raw = load_splits(args.dataset)
        labels = raw["train"].features["label"].names
        processor = AutoImageProcessor.from_pretrained(args.teacher_model_name_or_path)
        teacher = AutoModelForImageClassification.from_pretrained(args.teacher_model_name_or_path)

        def read(rows: Any) -> tuple[Tensor, Tensor]:
            pictures = [image.convert("RGB") for image in rows["image"]]
            return processor(pictures, return_tensors="pt")["pixel_values"], torch.as_tensor(rows["label"])

    def learned(rows: Any) -> dict[str, Tensor]:
        """A batch of the training: the Trainer asks for whole batches, so pictures of one can be mixed here."""
        pixels, numbers = read(rows)
        pixels = cropped(pixels)
        if args.mirror and not args.tiny:
            pixels = torch.where(torch.rand(len(pixels), 1, 1, 1) < 0.5, pixels.flip(-1), pixels)
        if args.mixing == "none":
            return {"pixel_values": pixels, "labels": numbers}
        pixels, shares = mixed(pixels, one_hot(numbers, len(labels)).float(), args.mixing)
        return {"pixel_values": pixels, "labels": shares}

    def measured(rows: Any) -> dict[str, Tensor]:
        return dict(zip(("pixel_values", "labels"), read(rows), strict=True))

    names = dict(id2label=dict(enumerate(labels)), label2id={name: i for i, name in enumerate(labels)})
    if args.student_model_name_or_path:
        student = AutoModelForImageClassification.from_pretrained(
            args.student_model_name_or_path, ignore_mismatched_sizes=True, **names
        )
    else:
        student = MobileNetV2ForImageClassification(
            MobileNetV2Config(depth_multiplier=args.depth_multiplier, finegrained_output=False, **names)
        )
    test = raw["test"].with_transform(measured)
    trainer = DistillationTrainer(
        student, training_args, train_dataset=raw["train"].with_transform(learned), eval_dataset=test,
        processing_class=processor, compute_metrics=classification_metrics, compute_loss_func=loss_of,
        teacher_model=teacher,
        objectives=[TaskLoss(weight=0.5), LogitKD(temperature=2.0)],
        callbacks=[QATCallback(QuantizationSpec(), freeze_batch_norm=0.8)],
    )  # fmt: skip
    if train_and_save(trainer) is not None:
        to_file(trainer, teacher, test, timed=not args.tiny)


if __name__ == "__main__":
    main()
