# SPDX-License-Identifier: Apache-2.0
"""The metric of detectors, and a detector's whole way to a measured file."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import EvalPrediction, Trainer, YolosImageProcessor

from hfkdq import CompressionReport, QuantizationSpec, export_onnx
from hfkdq.metrics.detection import MeanAveragePrecision, detection_metrics

from . import tiny


def overlap(a, b):
    sides = [min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1)]
    shared = max(sides[0], 0) * max(sides[1], 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return shared / (sum(areas) - shared)


def naive(predictions, references, label, bound):
    """Average precision of a class: best boxes first, each takes the object it covers best, 101 recalls."""
    found = [
        (score, image, box)
        for image, one in enumerate(predictions)
        for score, box, own in zip(one["scores"], one["boxes"], one["labels"], strict=True)
        if own == label
    ]
    there = [[b for b, own in zip(one["boxes"], one["labels"], strict=True) if own == label] for one in references]
    taken, hits = set(), []
    for _, image, box in sorted(found, key=lambda entry: -entry[0]):
        free = [(overlap(box, b), i) for i, b in enumerate(there[image]) if (image, i) not in taken]
        best, index = max(free, default=(0.0, None))
        hits.append(best >= bound)
        taken |= {(image, index)} if hits[-1] else set()
    right = np.cumsum(hits)
    recall, precision = right / sum(map(len, there)), right / np.arange(1, len(hits) + 1)
    return np.mean([precision[recall >= r].max(initial=0.0) for r in np.linspace(0, 1, 101)])


def made_up_boxes(images=6, labels=3):
    """Boxes with the objects that they are near to, some missing, some too many."""
    rng = np.random.default_rng(0)
    predictions, references = [], []
    for _ in range(images):
        corners = rng.uniform(0, 60, (4, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(15, 40, (4, 2))], axis=1)
        near = boxes + rng.normal(0, 2.5, boxes.shape)
        classes = rng.integers(0, labels, 4)
        guessed = np.where(rng.random(4) < 0.8, classes, rng.integers(0, labels, 4))
        references.append({"boxes": boxes[:3].tolist(), "labels": classes[:3].tolist()})
        predictions.append({"boxes": near.tolist(), "scores": rng.random(4).tolist(), "labels": guessed.tolist()})
    return predictions, references


def test_mean_average_precision_equals_its_definition():
    predictions, references = made_up_boxes()
    found = MeanAveragePrecision().compute(predictions=predictions, references=references)
    bounds = [0.5 + 0.05 * i for i in range(10)]
    table = np.array([[naive(predictions, references, label, bound) for label in range(3)] for bound in bounds])
    assert 0.1 < table.mean() < 0.9
    expected = {"map": table.mean(), "map_50": table[0].mean(), "map_75": table[5].mean()}
    expected |= {f"map_class_{label}": table[:, label].mean() for label in range(3)}
    assert found == pytest.approx(expected, abs=1e-9)
    assert all(type(value) is float for value in found.values())


def test_images_without_boxes_and_batches_count():
    predictions, references = made_up_boxes()
    empty = {"boxes": [], "labels": []}
    metric = MeanAveragePrecision()
    metric.add_batch(
        predictions=[{**empty, "scores": []}, *predictions[:2]], references=[references[5], *references[:2]]
    )
    metric.add_batch(predictions=predictions[2:], references=[*references[2:5], empty])
    assert 0 < metric.compute()["map"] < 0.9
    with pytest.raises(ValueError, match="no object in any image"):
        MeanAveragePrecision().compute(predictions=[{**empty, "scores": []}], references=[empty])


def labelled(boxes, classes, size=(40, 80), **more):
    boxes = torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return {
        "boxes": boxes, "class_labels": torch.as_tensor(classes, dtype=torch.int64), "orig_size": torch.tensor(size), **more
    }  # fmt: skip


def logits_of(classes, number=2, sure=6.0):
    """Of one image: a query for each class, which sees it; `None` sees nothing, which is the last class."""
    logits = torch.zeros(1, len(classes), number + 1)
    for query, label in enumerate(classes):
        logits[0, query, number if label is None else label] = sure
    return logits


def test_detection_metrics_takes_what_the_trainer_has_of_each_batch():
    boxes = torch.tensor([[[0.25, 0.5, 0.3, 0.6], [0.75, 0.5, 0.2, 0.4], [0.5, 0.5, 0.1, 0.1]]])
    metrics = detection_metrics(YolosImageProcessor(), id2label={0: "red", 1: "blue"})
    first = ({}, logits_of([0, 1, None]).numpy(), boxes.numpy(), np.zeros((1, 9)))
    second = ({}, logits_of([1, None]).repeat(2, 1, 1).numpy(), boxes[:, :2].repeat(2, 1, 1).numpy())
    labels = [
        [labelled(boxes[0, :2], [0, 1])],
        [labelled(boxes[0, :1], [1]), labelled([], [])],
    ]
    assert metrics(EvalPrediction([first, second], labels)) == pytest.approx(
        {"map": 1.0, "map_50": 1.0, "map_75": 1.0, "map_red": 1.0, "map_blue": 1.0}
    )
    wrong = [[labelled(boxes[0, :2], [1, 0])], labels[1]]
    assert metrics(EvalPrediction([first, second], wrong))["map_red"] == 0


def test_a_crowd_may_be_found_any_number_of_times():
    boxes = torch.tensor([[[0.25, 0.5, 0.3, 0.6], [0.25, 0.5, 0.3, 0.6], [0.75, 0.5, 0.2, 0.4]]])
    metrics = detection_metrics(YolosImageProcessor())
    outputs = [({}, logits_of([0, 0, 0]).numpy(), boxes.numpy())]
    there = [boxes[0, 0].tolist(), boxes[0, 2].tolist()]
    crowd = [[labelled(there, [0, 0], iscrowd=torch.tensor([1, 0]))]]
    assert metrics(EvalPrediction(outputs, crowd))["map"] == pytest.approx(1.0)
    assert metrics(EvalPrediction(outputs, [[labelled(there, [0, 0])]]))["map"] < 0.9


def test_detection_metrics_refuses_what_does_not_fit():
    with pytest.raises(TypeError, match="image processor of a detector, got object"):
        detection_metrics(object())
    metrics = detection_metrics(YolosImageProcessor())
    logits, boxes = np.zeros((1, 3, 2)), np.zeros((1, 3, 4))
    with pytest.raises(ValueError, match="eval_do_concat_batches=False"):
        metrics(EvalPrediction((logits, boxes), [labelled([], [])]))
    with pytest.raises(ValueError, match=r"first among the arrays of each batch, got \[\(1, 3, 4\), \(1, 3, 2\)\]"):
        metrics(EvalPrediction([(boxes, logits)], [[labelled([], [])]]))
    with pytest.raises(ValueError, match="Labels lack orig_size; they have boxes, class_labels"):
        metrics(EvalPrediction([(logits, boxes)], [[{"boxes": boxes[0], "class_labels": [0]}]]))


def collate(rows):
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": [row["labels"] for row in rows],
    }


def pictures(model, count=5):
    """Random images, labelled with some of what the model itself sees there: different numbers of objects."""
    pixels = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        seen = model(pixel_values=pixels)
    classes = seen.logits[..., :-1].argmax(-1)
    chosen = [torch.arange(index % 3 + 1) for index in range(count)]
    return [
        {"pixel_values": pixels[i], "labels": labelled(seen.pred_boxes[i, rows], classes[i, rows])}
        for i, rows in enumerate(chosen)
    ]


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_a_detector_and_its_file_are_measured_by_the_same_metric(quantization, tmp_path, training_arguments):
    model = tiny.yolos().eval()
    rows, processor = pictures(model), YolosImageProcessor(size={"height": 16, "width": 16})
    seen, compute = [], detection_metrics(processor)

    def metrics(prediction):
        arrays = [[value for value in batch if hasattr(value, "shape")][:2] for batch in prediction.predictions]
        seen.append([[array.shape for array in batch] for batch in arrays])
        return compute(prediction)

    data = dict(eval_dataset=rows, data_collator=collate, compute_metrics=metrics, concat_batches=False)
    spec = None if quantization is None else QuantizationSpec()
    calibration = None if spec is None else [collate(rows)]
    folder = export_onnx(
        model, tmp_path / "onnx", quantization=spec, calibration=calibration, metric="map", max_drop=1.0, latency_rounds=0,
        **data,
    )  # fmt: skip
    exported = json.loads((folder / "export_facts.json").read_text())["metrics"]
    report = CompressionReport.measure(student=model, onnx=folder, latency_rounds=0, batch_size=2, **data)
    by_torch, by_file = (engine.metrics for engine in report.engines)
    args = training_arguments(eval_do_concat_batches=False, remove_unused_columns=False, per_device_eval_batch_size=5)
    by_trainer = Trainer(model, args, eval_dataset=rows, data_collator=collate, compute_metrics=compute).evaluate()
    assert by_torch["map"] == by_trainer["eval_map"] == exported["torch"]["map"] > 0.3
    assert by_file == exported["onnx"]
    if spec is None:
        assert by_file == pytest.approx(by_torch)
    uneven = [[(size, 6, 4)] * 2 for size in (2, 2, 1)]
    assert seen[-2:] == [uneven, uneven]
