# SPDX-License-Identifier: Apache-2.0
"""Mean average precision of detectors without a network, over pycocotools, and `compute_metrics` for their Trainer."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Rows
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Sequence, Value
from transformers import EvalPrediction
from transformers.image_transforms import center_to_corners_format
from transformers.utils import ModelOutput

from .base import LocalMetric, library

_BOXES = Sequence(Sequence(Value("float64")))
_CLASSES = Sequence(Value("int64"))
# Of overlaps from 0.50 to 0.95 in steps of 0.05, those that have a name.
_NAMED = {"map_50": 0, "map_75": 5}


class MeanAveragePrecision(LocalMetric):
    """Mean average precision of boxes, as COCO defines it, as an `evaluate.Metric`.

    The mean, over overlaps (intersection over union) from 0.50 to 0.95 in steps of 0.05 and over classes, of the mean
    precision at 101 recalls, of the 100 best boxes of an image; Lin et al., "Microsoft COCO: Common Objects in Context"
    (2014), computed by pycocotools. Classes without any object to be found do not count. Works without a network; needs
    `pip install hfkdq[metrics]`.

    `compute` takes a dictionary for each image. `predictions`: `boxes` (`list` of `[left, top, right, bottom]`, pixels),
    `scores` (`list` of `float`) and `labels` (`list` of `int`). `references`: `boxes` and `labels` alike. It gives `map`, `map_50`,
    `map_75` and `map_class_<label>` for each class that occurs in the references, in [0, 1].

    Raises:
        ImportError: pycocotools is missing.
        ValueError: there is no object to be found.

    Example:
        ```python
        >>> from hfkdq.metrics.detection import MeanAveragePrecision
        >>> found = {"boxes": [[0, 0, 10, 10]], "scores": [0.9], "labels": [2]}
        >>> there = {"boxes": [[0, 0, 10, 8]], "labels": [2]}  # the overlap is 0.8: right at 7 of 10
        >>> scores = MeanAveragePrecision().compute(predictions=[found], references=[there])
        >>> {name: round(value, 6) for name, value in scores.items()}
        {'map': 0.7, 'map_50': 1.0, 'map_75': 1.0, 'map_class_2': 0.7}

        ```
    """

    about = "Mean average precision of boxes, as COCO defines it."
    citing = "Lin et al., Microsoft COCO: Common Objects in Context, 2014"
    prediction: ClassVar[Any] = {"boxes": _BOXES, "scores": Sequence(Value("float64")), "labels": _CLASSES}
    reference: ClassVar[Any] = {"boxes": _BOXES, "labels": _CLASSES}

    @staticmethod
    def score(predictions: Any, references: Any) -> dict[str, float]:
        return average_precision(predictions, references, {}, "map_class_")


def detection_metrics(
    processor: Any, threshold: float = 0.0, id2label: Mapping[int, str] | None = None
) -> Callable[[EvalPrediction], dict[str, float]]:
    """A `compute_metrics` for the Trainer of a detector: its mean average precision, see [`MeanAveragePrecision`].

    The boxes are those of the processor's `post_process_object_detection`. The Trainer has to have
    `TrainingArguments(eval_do_concat_batches=False)`, as images have different numbers of objects, and a
    `per_device_eval_batch_size` that divides the number of images: Accelerate cuts the labels of each image in a smaller
    last batch to as many as that has images. `export_onnx` and [`CompressionReport.measure`] take any size, with
    `compute_metrics=detection_metrics(processor), concat_batches=False`.

    Args:
        processor (image processor): that of the model.
        threshold (`float`, defaults to 0.0): boxes with a lower score are left out. Any above 0 lowers the metric.
        id2label (`dict`, *optional*): the names of classes, such as `model.config.id2label`, for the keys of the result.

    Returns:
        `Callable`: from an `EvalPrediction` to `map`, `map_50`, `map_75` and `map_<class>` for each class that occurs
        in the labels, in [0, 1]. Its predictions are a list of batches with `logits` of shape `(batch, queries, classes)`
        and then `pred_boxes` of shape `(batch, queries, 4)` among their arrays; its labels a list of batches, each with
        a dictionary for each image as image processors make them: `boxes` of shape `(objects, 4)`, centres and sizes
        as shares of the image, `class_labels` of shape `(objects,)`, `orig_size` (height and width in pixels) and, if
        there are boxes around many objects, `iscrowd` of shape `(objects,)`: in those any number may be found.

    Raises:
        TypeError: the processor has no `post_process_object_detection`.
        ImportError: pycocotools is missing.
        ValueError: from the callable, for predictions or labels that are something else.

    Example:
        ```python
        from transformers import Trainer, TrainingArguments
        from hfkdq.metrics.detection import detection_metrics

        args = TrainingArguments("out", eval_do_concat_batches=False, remove_unused_columns=False)
        trainer = Trainer(
            model, args, data_collator=collate, eval_dataset=validation,
            compute_metrics=detection_metrics(processor, id2label=model.config.id2label),
        )
        trainer.evaluate()["eval_map"]
        ```
    """
    if not hasattr(processor, "post_process_object_detection"):
        raise TypeError(
            f"processor must be the image processor of a detector, got {type(processor).__name__}, which has no "
            "post_process_object_detection. Pass AutoImageProcessor.from_pretrained(...) of the model."
        )
    _coco()
    pairs = detection_pairs(processor, threshold)
    return lambda prediction: average_precision(*pairs(prediction), id2label or {})


def detection_pairs(processor: Any, threshold: float = 0.0) -> Callable[[EvalPrediction], tuple[list[Any], list[Any]]]:
    """What reads the boxes that are found in each image off predictions, and those that are there off labels; the arguments are those of
    [`detection_metrics`]."""

    def pairs(prediction: EvalPrediction) -> tuple[list[Any], list[Any]]:
        found: list[Any] = []
        there: list[Any] = []
        for outputs, labels in _batches(prediction):
            sizes = [tuple(int(side) for side in one["orig_size"]) for one in labels]
            there += [_reference(one, size) for one, size in zip(labels, sizes, strict=True)]
            found += processor.post_process_object_detection(outputs, threshold=threshold, target_sizes=sizes)
        return found, there

    return pairs


def _batches(prediction: EvalPrediction) -> Iterator[tuple[ModelOutput, Rows[Mapping[str, Any]]]]:
    """The outputs and the labels of each batch."""
    predictions, labels = prediction.predictions, prediction.label_ids
    if not isinstance(predictions, list) or not isinstance(labels, (list, tuple)) or len(predictions) != len(labels):
        raise ValueError(
            f"detection_metrics takes the outputs of each batch by itself; got {type(predictions).__name__} and labels of type "
            f"{type(labels).__name__}. Pass TrainingArguments(eval_do_concat_batches=False)."
        )
    for outputs, row in zip(predictions, labels, strict=True):
        arrays = [value for value in outputs if hasattr(value, "shape")] if isinstance(outputs, (tuple, list)) else []
        shapes = [tuple(array.shape) for array in arrays[:2]]
        if len(shapes) < 2 or any(len(shape) != 3 for shape in shapes) or shapes[1] != (*shapes[0][:2], 4):
            raise ValueError(
                "detection_metrics needs logits of shape (batch, queries, classes) and pred_boxes of shape (batch, queries, 4) "
                f"first among the arrays of each batch, got {shapes}. Models for object detection give them."
            )
        for one in row:
            missing = [name for name in ("boxes", "class_labels", "orig_size") if name not in one]
            if missing:
                raise ValueError(
                    f"Labels lack {' and '.join(missing)}; they have {', '.join(one)}. Make them with the image processor: "
                    "processor(images=images, annotations=annotations)['labels']."
                )
            if len(one["orig_size"]) != 2 or len(one["boxes"]) != len(one["class_labels"]):
                raise ValueError(
                    f"Labels have {len(one['boxes'])} boxes, {len(one['class_labels'])} class_labels and an orig_size of "
                    f"{len(one['orig_size'])} numbers, which is to be height and width. Accelerate cuts those of a last batch that "
                    "is smaller: take a per_device_eval_batch_size that divides the number of images."
                )
        logits, boxes = (torch.as_tensor(np.asarray(array)).float() for array in arrays[:2])
        yield ModelOutput(logits=logits, pred_boxes=boxes), row


def _reference(labels: Mapping[str, Any], size: Rows[int]) -> dict[str, Any]:
    """What there is in an image of this height and width."""
    boxes = torch.as_tensor(np.asarray(labels["boxes"])).float().reshape(-1, 4)
    corners: Any = center_to_corners_format(boxes)  # type: ignore[arg-type]
    classes = np.asarray(labels["class_labels"])
    height, width = size
    scaled = corners * torch.tensor([width, height, width, height])
    return {"boxes": scaled, "labels": classes, "iscrowd": labels.get("iscrowd", np.zeros_like(classes))}


def average_precision(
    predictions: Rows[Mapping[str, Any]], references: Rows[Mapping[str, Any]], names: Mapping[int, str], prefix: str = "map_"
) -> dict[str, float]:  # fmt: skip
    """What pycocotools says of a dictionary for each image; a class without a name has its number."""
    coco, evaluator = _coco()
    classes = sorted({int(label) for one in references for label in one["labels"]})
    if not classes:
        raise ValueError("There is no object in any image, so there is nothing to find. Use data with labels.")
    with contextlib.redirect_stdout(io.StringIO()):  # which tells how far it is
        pair = []
        for rows in (references, predictions):
            data = coco()
            data.dataset = {
                "images": [{"id": image} for image in range(len(rows))],
                "categories": [{"id": label} for label in classes],
                # Number 0 stands for none.
                "annotations": [{**one, "id": number} for number, one in enumerate(_boxes(rows), 1)],
            }
            data.createIndex()
            pair.append(data)
        run = evaluator(*pair, iouType="bbox")
        run.evaluate()
        run.accumulate()
    # (overlap, recall, class), of boxes of all sizes; -1 without objects.
    precision = run.eval["precision"][..., 0, -1]
    means = {"map": precision, **{name: precision[index] for name, index in _NAMED.items()}}
    means |= {f"{prefix}{names.get(label, label)}": precision[..., k] for k, label in enumerate(classes)}
    return {name: float(found[found > -1].mean()) for name, found in means.items() if (found > -1).any()}


def _boxes(rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for image, one in enumerate(rows):
        crowds = one.get("iscrowd", [0] * len(one["labels"]))
        for index, (left, top, right, bottom) in enumerate(np.asarray(one["boxes"], dtype=np.float64).reshape(-1, 4)):
            found = {
                "image_id": image, "category_id": int(one["labels"][index]), "iscrowd": int(crowds[index]),
                "bbox": [left, top, right - left, bottom - top], "area": (right - left) * (bottom - top),
            }  # fmt: skip
            yield {**found, "score": float(one["scores"][index])} if "scores" in one else found


def _coco() -> tuple[Any, Any]:
    """The data and the evaluator of pycocotools."""
    return library("pycocotools.coco").COCO, library("pycocotools.cocoeval").COCOeval
