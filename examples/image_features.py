#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Distil an image classifier by its features: relations, samples, mutual information, feature maps, or under noise.

    accelerate launch examples/image_features.py --objective relations --output_dir out/relations \
        --teacher_model_name_or_path path/to/vit --dataset zalando-datasets/fashion_mnist

    accelerate launch examples/image_features.py --objective feature_maps --output_dir out/maps \
        --teacher_model_name_or_path path/to/resnet-50 --student_model_name_or_path microsoft/resnet-18 \
        --dataset zalando-datasets/fashion_mnist

    python examples/image_features.py --objective noise --tiny --learning_rate 1e-3 --output_dir out/noise
    accelerate launch examples/image_features.py --preset gpu
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from example_utils import load_splits, parse, train_and_save
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
)

from hfkdq import (
    CRD,
    RKD,
    VID,
    AdversarialKD,
    DistillationTrainer,
    FeatureMapKD,
    LogitKD,
    NoisyKD,
    RelationKD,
    SimilarityPreservingKD,
    TaskLoss,
    make_student,
)
from hfkdq.metrics import classification_metrics

GPU = {
    "teacher_model_name_or_path": "nateraw/food", "dataset": "ethz/food101", "num_train_epochs": 10, "learning_rate": 5e-5,
    "lr_scheduler_type": "cosine", "warmup_steps": 500, "per_device_train_batch_size": 128,
    "per_device_eval_batch_size": 256, "dataloader_num_workers": 16, "output_dir": "out/relations",
}  # fmt: skip
OBJECTIVES = {
    "relations": [RelationKD()],  # between the patches of an image, for transformers
    "samples": [RKD(weight=0.02), SimilarityPreservingKD(weight=10.0)],  # between the images of a batch
    "mutual_information": [CRD(weight=0.8), VID(weight=0.1)],
    "feature_maps": [FeatureMapKD(weight=5.0)],  # where stages are active, for convolutional models
    "noise": [NoisyKD(objective=LogitKD(temperature=2.0), std=0.2), AdversarialKD()],
}


@dataclass
class Arguments:
    objective: Literal["relations", "samples", "mutual_information", "feature_maps", "noise"] = field(
        default="relations", metadata={"help": "What is learned along with the labels."}
    )
    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or folder of a classifier."}
    )
    student_model_name_or_path: str | None = field(
        default=None, metadata={"help": "The same of the student; by default half of the teacher's layers."}
    )
    dataset: str | None = field(
        default=None, metadata={"help": "Hub id, or a folder of train.parquet and test.parquet, with image and label."}
    )
    tiny: bool = field(
        default=False, metadata={"help": "scikit-learn's digits and small models, to try it in seconds."}
    )


def main(argv: list[str] | None = None) -> None:
    # Images are read when they are needed, from a column that no model knows.
    args, training_args = parse(Arguments, argv, GPU, remove_unused_columns=False)
    processor = None
    if args.tiny:
        from made_up import images

        data, student, teacher = images(convolutional=args.objective == "feature_maps")
    else:
        raw = load_splits(args.dataset)
        labels = raw["train"].features["label"].names
        settings = dict(id2label=dict(enumerate(labels)), label2id={name: i for i, name in enumerate(labels)})
        processor = AutoImageProcessor.from_pretrained(args.teacher_model_name_or_path)
        teacher = AutoModelForImageClassification.from_pretrained(args.teacher_model_name_or_path, **settings)
        if args.student_model_name_or_path:
            student = AutoModelForImageClassification.from_pretrained(
                args.student_model_name_or_path, ignore_mismatched_sizes=True, **settings
            )
        else:
            student = make_student(teacher, num_layers=teacher.config.num_hidden_layers // 2)

        def pixels(rows: Any) -> dict[str, Any]:
            pictures = [image.convert("RGB") for image in rows["image"]]
            return {"pixel_values": processor(pictures, return_tensors="pt")["pixel_values"], "labels": rows["label"]}

        data = raw.with_transform(pixels)

    trainer = DistillationTrainer(
        student, training_args, train_dataset=data["train"], eval_dataset=data["test"], processing_class=processor,
        compute_metrics=classification_metrics, teacher_model=teacher,
        objectives=[TaskLoss(), *OBJECTIVES[args.objective]],
    )  # fmt: skip
    metrics = train_and_save(trainer)
    if metrics is None:
        return
    last = next(row for row in reversed(trainer.state.log_history) if "loss" in row)
    other = {"loss", "grad_norm", "learning_rate", "epoch", "step"}
    terms = ", ".join(f"{name} {last[name]:.3f}" for name in last if name not in other)
    print(f"{trainer.state.global_step} steps: {terms}; accuracy {metrics['eval_accuracy']:.3f}.")
    print(f"Saved in {training_args.output_dir}.")


if __name__ == "__main__":
    main()
