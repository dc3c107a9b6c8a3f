#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Distil an object detector: each query of the student learns from the query of the teacher that saw the same.

    accelerate launch examples/detector.py --num_student_layers 6 --output_dir out/detector \
        --teacher_model_name_or_path path/to/a/finetuned/yolos --dataset path/to/folder

    python examples/detector.py --tiny --learning_rate 1e-3 --output_dir out/detector
    accelerate launch examples/detector.py --preset gpu

The data have a column `image`, and a column `objects` with lists `bbox`, as `[x, y, width, height]` in pixels, and
`category`. The teacher knows these categories; its image processor decides the size of images. DETR needs timm.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from example_utils import annotated, collate_pictures, load_splits, parse, steps_and_terms, train_and_save
from transformers import (
    AutoImageProcessor,
    AutoModelForObjectDetection,
)

from hfkdq import DistillationTrainer, LogitKD, TaskLoss, make_student

# The guide to object detection of Transformers; image size, batch, learning rate, clipping and epochs are its own.
GPU = {
    "teacher_model_name_or_path": "devonho/detr-resnet-50_finetuned_cppe5", "dataset": "rishitdagli/cppe-5", "image_size": 480,
    "num_student_layers": 3, "num_train_epochs": 30, "learning_rate": 5e-5, "weight_decay": 1e-4, "max_grad_norm": 0.01,
    "lr_scheduler_type": "cosine", "per_device_train_batch_size": 8, "output_dir": "out/detector",
}  # fmt: skip


@dataclass
class Arguments:
    teacher_model_name_or_path: str | None = field(default=None, metadata={"help": "Hub id or folder of a detector."})
    dataset: str | None = field(
        default=None,
        metadata={"help": "Hub id, or a folder of train.parquet and test.parquet, with image and objects."},
    )
    num_student_layers: int = field(default=2, metadata={"help": "Layers of the student, copied from the teacher."})
    image_size: int = field(default=256, metadata={"help": "Height and width that images are resized to."})
    tiny: bool = field(default=False, metadata={"help": "Made-up images and a small model, to try it in seconds."})


def main(argv: list[str] | None = None) -> None:
    # Images are read when they are needed, from a column that no model knows.
    args, training_args = parse(Arguments, argv, GPU, remove_unused_columns=False)
    if args.tiny:
        from made_up import detection, fit

        raw, processor, teacher = detection()
    else:
        raw = load_splits(args.dataset)
        size = {"height": args.image_size, "width": args.image_size}
        processor = AutoImageProcessor.from_pretrained(args.teacher_model_name_or_path, size=size)
        teacher = AutoModelForObjectDetection.from_pretrained(args.teacher_model_name_or_path)

    data = raw.with_transform(annotated(processor))
    if args.tiny:
        fit(teacher, data["train"], collate_pictures, steps=60)
    trainer = DistillationTrainer(
        make_student(teacher, num_layers=args.num_student_layers), training_args, train_dataset=data["train"],
        eval_dataset=data["test"], processing_class=processor, data_collator=collate_pictures, teacher_model=teacher,
        objectives=[TaskLoss(), LogitKD(temperature=1.0)],
    )  # fmt: skip
    metrics = train_and_save(trainer)
    if metrics is None:
        return
    print(f"{steps_and_terms(trainer)}; loss on the test images {metrics['eval_loss']:.3f}.")
    print(f"Saved in {training_args.output_dir}.")


if __name__ == "__main__":
    main()
