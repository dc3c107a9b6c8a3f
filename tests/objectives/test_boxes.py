# SPDX-License-Identifier: Apache-2.0
"""BoxKD on matched queries, against the formula by hand."""

import pytest
import torch

from hfkdq import BoxKD, CoTrainedTeacher, DistillationTrainer, LogitKD, TaskLoss
from hfkdq.modeling.examples import tried_on
from hfkdq.objectives.heads import matched_queries
from tests import tiny


def images(rows=2):
    return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=torch.Generator().manual_seed(0))}


def overlaps(a, b):
    """IoU and generalized IoU."""
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = (
        (x - w / 2, y - h / 2, x + w / 2, y + h / 2) for x, y, w, h in (a, b)
    )
    inter = max(0, min(ax1, bx1) - max(ax0, bx0)) * max(0, min(ay1, by1) - max(ay0, by0))
    union = (ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - inter
    hull = (max(ax1, bx1) - min(ax0, bx0)) * (max(ay1, by1) - min(ay0, by0))
    return inter / union, inter / union - (hull - union) / hull


def test_boxes_of_matched_queries_count_as_far_as_the_teacher_sees_an_object():
    student, teacher = tiny.yolos(0, queries=4), tiny.yolos(1, queries=6, hidden=48)
    objective = BoxKD()
    objective.attach(student, teacher)
    ours, theirs = student(**images()), teacher(**images())
    mean = objective(ours, theirs, images())
    count = objective.positions(images())
    expected = 0.0
    for row, (own, other, _) in enumerate(zip(*matched_queries(ours, theirs, True), strict=True)):
        total = weights = 0.0
        for i, j in zip(own.tolist(), other.tolist(), strict=True):
            a, b = ours.pred_boxes[row, i].tolist(), theirs.pred_boxes[row, j].tolist()
            seen = 1 - theirs.logits[row, j].softmax(-1)[-1].item()
            total += seen * (5 * sum(abs(x - y) for x, y in zip(a, b, strict=True)) + 2 * (1 - overlaps(a, b)[1]))
            weights += seen
        expected += total / weights / 2
    assert mean.item() == pytest.approx(expected, rel=1e-4)
    assert count == 2
    mean.backward()
    assert student.bbox_predictor.layers[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("objective", [BoxKD(), LogitKD()], ids=["boxes", "classes"])
@pytest.mark.parametrize("make", [tiny.yolos, tiny.rt_detr])
def test_equal_detectors_are_at_0(make, objective):
    student, teacher, size = make(1), make(1), 16 if make is tiny.yolos else 64
    batch = {"pixel_values": torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))}
    with tried_on(batch, student):
        objective.attach(student, teacher)
    assert objective(student(**batch), teacher(**batch), batch).item() == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [(tiny.vit, tiny.vit, "draws none"), (tiny.yolos, lambda: tiny.yolos(labels=5), "same labels")],
)
def test_models_that_detect_nothing_in_common_are_refused(student, teacher, message):
    with pytest.raises(ValueError, match=message):
        BoxKD().attach(student(), teacher())


def test_scores_are_taught_as_far_as_the_boxes_overlap_where_classes_do_not_exclude_one_another():
    student, teacher = tiny.rt_detr(0), tiny.rt_detr(1)
    objective = LogitKD(temperature=1.0)
    batch = {"pixel_values": torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))}
    with tried_on(batch, student):
        objective.attach(student, teacher)
    ours, theirs = student(**batch), teacher(**batch)
    for out in (ours, theirs):
        out["pred_boxes"] = torch.rand(2, 6, 4).clamp(0.3, 0.7).requires_grad_()
    mean = objective(ours, theirs, batch)
    expected, found = 0.0, []
    for row, pairs in enumerate(zip(*matched_queries(ours, theirs, False), strict=True)):
        total = weights = 0.0
        for i, j, seen in zip(*(one.tolist() for one in pairs), strict=True):
            found.append(overlaps(ours.pred_boxes[row, i].tolist(), theirs.pred_boxes[row, j].tolist())[0])
            p, q = theirs.logits[row, j].double().sigmoid(), ours.logits[row, i].double().sigmoid()
            p = (p * found[-1]).maximum(p.clamp(max=0.01))
            divergence = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
            total += (0.1 + 0.9 * seen) * divergence.mean().item()
            weights += 0.1 + 0.9 * seen
        expected += total / weights / 2
    assert mean.item() == pytest.approx(expected, rel=1e-4)
    assert any(0 < overlap < 1 for overlap in found)
    assert 0 in found
    mean.backward()
    assert ours.pred_boxes.grad is None  # boxes are BoxKD's
    assert ours.logits.requires_grad


@pytest.mark.parametrize("family", ["RTDetr", "RTDetrV2"])
def test_queries_of_noised_labels_have_no_part_in_the_match(family, training_arguments):
    """They stand before the others in training; the loss of the labels is theirs alone."""
    generator = torch.Generator().manual_seed(0)
    label = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.3, 0.3]])}
    rows = [{"pixel_values": torch.randn(3, 64, 64, generator=generator), "labels": label} for _ in range(2)]

    def collate(features):
        pixels = torch.stack([row["pixel_values"] for row in features])
        return {"pixel_values": pixels, "labels": [row["labels"] for row in features]}

    student, teacher = tiny.rt_detr(0, 20, family), tiny.rt_detr(1, 20, family)
    given = []
    for peer in (teacher, CoTrainedTeacher(teacher)):
        trainer = DistillationTrainer(
            student, training_arguments(max_steps=1, remove_unused_columns=False, learning_rate=0.0), train_dataset=rows,
            data_collator=collate, teacher_model=peer, objectives=[TaskLoss(), LogitKD(), BoxKD()],
        )  # fmt: skip
        losses = [term.objective for term in trainer._distillation.terms][1:3]
        for objective in losses:
            loss = type(objective).loss

            def keep(step, objective=objective, loss=loss):
                given.append((step.student.logits.shape, step.teacher.pred_boxes.shape))
                return loss(objective, step)

            objective._keep(loss=keep)
        trainer.train()
    assert given == [((2, 6, 3), (2, 6, 4))] * 4
    student.train()
    assert student(**collate(rows)).logits.shape[1] > 6
