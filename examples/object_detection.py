#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Compress an object detector to an int8 file, and measure the mean average precision of the file.

    accelerate launch examples/object_detection.py --num_student_layers 6 --output_dir out/object-detection \
        --teacher_model_name_or_path path/to/a/finetuned/detector --dataset path/to/folder

    python examples/object_detection.py --tiny --learning_rate 1e-3 --output_dir out/object-detection
    accelerate launch examples/object_detection.py --preset gpu

The student learns classes (LogitKD) and boxes (BoxKD) from the queries of the teacher that see the same, trains with the
rounding of its integers, and loses the neurons that matter least if `--neuron_sparsity` says so. Parts of the model that
integers ruin stay in floating point: `--max_drop` says how much precision all others together may cost, found by
quantizing each part of the teacher alone and measuring. The data are those of examples/detector.py.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import detector
from example_utils import annotated, collate_pictures, load_splits, parse, to_file, train_and_save
from transformers import AutoImageProcessor, AutoModelForObjectDetection, PreTrainedModel, Trainer

from hfkdq import (
    BoxKD,
    DistillationTrainer,
    LogitKD,
    PruningCallback,
    PruningSpec,
    QATCallback,
    QuantizationSpec,
    TaskLoss,
    make_student,
    quantize,
)
from hfkdq.metrics.detection import detection_metrics

GPU = {**detector.GPU, "neuron_sparsity": 0.25, "max_drop": 0.01, "output_dir": "out/object-detection"}


@dataclass
class Arguments:
    teacher_model_name_or_path: str | None = field(default=None, metadata={"help": "Hub id or folder of a detector."})
    dataset: str | None = field(
        default=None,
        metadata={"help": "Hub id, or a folder of train.parquet and test.parquet, with image and objects."},
    )
    num_student_layers: int | None = field(
        default=None, metadata={"help": "Layers of the student, copied from the teacher. All by default."}
    )
    image_size: int = field(default=256, metadata={"help": "Height and width that images are resized to."})
    neuron_sparsity: float = field(default=0.0, metadata={"help": "Share of the neurons that are removed."})
    max_drop: float | None = field(
        default=None,
        metadata={"help": "What integers may cost the teacher before parts of it stay in floating point."},
    )
    tiny: bool = field(default=False, metadata={"help": "Made-up images and a small model, to try it in seconds."})


def parts_left_in_float(
    model: PreTrainedModel, calibration: list[Any], score: Callable[[PreTrainedModel], float], max_drop: float
) -> list[str]:
    """The parts of a model to leave in floating point, so that its score drops by at most `max_drop`: costly ones first.

    Parts are what the first two names of a module say, as `model.encoder`. Each is quantized alone; what one costs is
    taken to add to what the others do until the sum is measured.
    """
    layers = [name for name, module in model.named_modules() if QuantizationSpec().selects(name, module)]
    parts = list(dict.fromkeys(".".join(name.split(".")[:2]) for name in layers))

    def drop(left: list[str]) -> float:
        spec = QuantizationSpec(exclude_modules=pattern(left))
        return before - score(quantize(copy.deepcopy(model), spec, calibration))

    before, left = score(model), list[str]()
    if drop(left) <= max_drop:
        return left
    costs = {part: drop([other for other in parts if other != part]) for part in parts}
    for part in sorted(parts, key=lambda one: -costs[one])[:-1]:
        left.append(part)
        print(f"{part} alone costs {costs[part]:.4f} and stays in floating point.")
        if drop(left) <= max_drop:
            break
    return left


def pattern(parts: list[str]) -> str | None:
    """A regular expression for all modules of some parts."""
    return rf"({'|'.join(map(re.escape, parts))})(\..+)?" if parts else None


def main(argv: list[str] | None = None) -> None:
    # Images are read when they are needed, from a column that no model knows. They have different numbers of objects, which
    # Accelerate cuts in a last batch that is smaller than the others: one image at a time, and each by itself.
    args, training_args = parse(
        Arguments, argv, GPU, remove_unused_columns=False, eval_do_concat_batches=False, per_device_eval_batch_size=1
    )
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
    metrics = detection_metrics(processor, id2label=teacher.config.id2label)
    calibration = [collate_pictures([data["train"][i] for i in range(min(32, len(data["train"])))])]

    def score(model: PreTrainedModel) -> float:
        trainer = Trainer(
            model, training_args, eval_dataset=data["test"], data_collator=collate_pictures, compute_metrics=metrics
        )
        return trainer.evaluate()["eval_map"]

    left = [] if args.max_drop is None else parts_left_in_float(teacher, calibration, score, args.max_drop)
    spec = QuantizationSpec(exclude_modules=pattern(left))
    callbacks = [QATCallback(spec)]
    if args.neuron_sparsity:
        callbacks.insert(0, PruningCallback(PruningSpec(structure="neuron", sparsity=args.neuron_sparsity)))
    layers = args.num_student_layers
    trainer = DistillationTrainer(
        copy.deepcopy(teacher) if layers is None else make_student(teacher, num_layers=layers), training_args,
        train_dataset=data["train"], eval_dataset=data["test"], processing_class=processor,
        data_collator=collate_pictures, compute_metrics=metrics, teacher_model=teacher, callbacks=callbacks,
        objectives=[TaskLoss(), LogitKD(temperature=1.0), BoxKD()],
    )  # fmt: skip
    if train_and_save(trainer) is not None:
        to_file(trainer, teacher, data["test"], timed=not args.tiny)


if __name__ == "__main__":
    main()
