# SPDX-License-Identifier: Apache-2.0
"""ULD: its formula, which tokens it compares, and what it refuses."""

import copy

import pytest
import torch

from hfkdq.losses.divergences import in_chunks
from hfkdq.losses.relations import sorted_distance
from hfkdq.objectives import cross_vocabulary
from hfkdq.objectives.cross_vocabulary import ULD
from hfkdq.objectives.model_signature import ModelSignature
from hfkdq.schedules import Linear
from tests import tiny


def attached(student, teacher, **kwargs):
    objective = ULD(**kwargs)
    objective.attach(student, teacher)
    return objective


def by_hand(student, teacher, temperature=1.0):
    """The distance of two vectors of logits, number by number."""
    probabilities = []
    for logits in (student, teacher):
        exponentials = [float(z) for z in (logits.double() / temperature).exp()]
        probabilities.append(sorted((x / sum(exponentials) for x in exponentials), reverse=True))
    longest = max(map(len, probabilities))
    p, q = ([*x, *[0.0] * (longest - len(x))] for x in probabilities)
    return sum(abs(a - b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("classes", [(5, 5), (5, 9), (9, 5)])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_sorted_distance_is_its_formula(classes, temperature):
    student, teacher = (3 * torch.randn(4, n) for n in classes)
    expected = [by_hand(s, t, temperature) for s, t in zip(student, teacher, strict=True)]
    torch.testing.assert_close(sorted_distance(student, teacher, temperature), torch.tensor(expected))


def test_the_sorted_distance_lies_between_its_limits():
    sure, unsure = torch.tensor([[50.0, 0, 0, 0]]), torch.zeros(1, 4)
    torch.testing.assert_close(sorted_distance(sure, unsure), torch.tensor([1.5]))
    assert sorted_distance(sure, sure.roll(2, dims=1)) == 0
    assert sorted_distance(sure.bfloat16(), unsure.bfloat16()).dtype == torch.float32


def test_its_gradient_is_that_of_the_sorted_probabilities():
    student = torch.randn(2, 6, dtype=torch.double).float().requires_grad_()
    teacher = torch.randn(2, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(sorted_distance(student, teacher.detach()).sum(), student)
    step = 1e-2 * torch.randn_like(student)
    ahead, behind = (sorted_distance(student + s * step, teacher).sum() for s in (1, -1))
    torch.testing.assert_close((gradient * step).sum(), (ahead - behind) / 2, rtol=1e-2, atol=1e-5)


def test_chunks_change_neither_value_nor_gradient():
    student, teacher = torch.randn(7, 6), torch.randn(7, 11)
    results = []
    for elements in (12, 10**6):
        x = student.clone().requires_grad_()
        values = in_chunks(sorted_distance, x, teacher, elements=elements)
        (gradient,) = torch.autograd.grad((values * torch.arange(7)).sum(), x)
        results.append((values, gradient))
    torch.testing.assert_close(*results, rtol=0, atol=1e-7)


def answers(rows, width, left=False):
    """Ids, mask and labels of rows given as (prompt, answer, padding) lengths."""
    ids, labels = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), -100)
    mask = torch.zeros_like(ids)
    for i, (prompt, answer) in enumerate(rows):
        start = width - prompt - answer if left else 0
        text = torch.randint(5, 90, (prompt + answer,))
        ids[i, start : start + prompt + answer], mask[i, start : start + prompt + answer] = text, 1
        labels[i, start + prompt : start + prompt + answer] = text[prompt:]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def outputs(student, teacher, batch):
    theirs = {k.removeprefix("teacher_"): v for k, v in batch.items() if k.startswith("teacher_")}
    inputs = [{k: v for k, v in b.items() if k in ("input_ids", "attention_mask")} for b in (batch, theirs or batch)]
    with torch.no_grad():
        theirs = teacher(**inputs[1])
    return student(**inputs[0]), theirs


def for_two(left=False):
    """A student's batch, and the teacher's columns with other tokens, prompts and answers."""
    own = answers([(3, 4), (2, 2), (1, 5)], 9)
    theirs = answers([(5, 2), (1, 6), (4, 5)], 12, left)
    return {**own, **{f"teacher_{key}": value for key, value in theirs.items()}}, [(3, 5, 2), (2, 1, 2), (1, 4, 5)]


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_the_ith_token_of_the_answer_is_compared_with_the_ith(left):
    student, teacher = tiny.llama(0), tiny.llama(1, vocab=120)
    batch, places = for_two(left)
    objective = attached(student, teacher, temperature=2.0)
    ours, theirs = outputs(student, teacher, batch)
    mean = objective(ours, theirs, batch)
    count = objective.positions(batch)
    expected = []
    for row, (own, other, length) in enumerate(places):
        shift = int(batch["teacher_attention_mask"][row].argmax())
        for i in range(length):
            expected.append(
                by_hand(ours.logits[row, own - 1 + i].detach(), theirs.logits[row, shift + other - 1 + i], 2.0)
            )
    assert int(count) == int(objective.positions(batch)) == len(expected) == 9
    assert mean.item() == pytest.approx(sum(expected) / 9, rel=1e-5)


def test_padding_changes_nothing():
    student, teacher = tiny.llama(0), tiny.llama(1, vocab=120)
    batch, _ = for_two()
    objective = attached(student, teacher)
    expected = objective(*outputs(student, teacher, batch), batch)
    padded = {
        key: torch.nn.functional.pad(value, (0, 3), value={"labels": -100}.get(key.removeprefix("teacher_"), 0))
        for key, value in batch.items()
    }
    for prefix in ("", "teacher_"):
        padding = padded[f"{prefix}attention_mask"] == 0
        padded[f"{prefix}input_ids"] = padded[f"{prefix}input_ids"].masked_fill(padding, 77)
    found = objective(*outputs(student, teacher, padded), padded)
    torch.testing.assert_close(found, expected)


def test_without_columns_of_its_own_the_teacher_has_the_positions_of_the_student():
    student, teacher = tiny.llama(0), tiny.llama(1, vocab=120)
    batch = answers([(3, 4), (2, 2), (1, 5)], 9)
    objective = attached(student, teacher)
    ours, theirs = outputs(student, teacher, batch)
    mean = objective(ours, theirs, batch)
    count = objective.positions(batch)
    predicted = batch["labels"][:, 1:] != -100
    values = sorted_distance(ours.logits[:, :-1][predicted], theirs.logits[:, :-1][predicted])
    torch.testing.assert_close(mean, values.mean())
    assert int(count) == 11
    # Without labels every token attended to is an answer, the first one apart, which nothing predicts.
    unlabelled = {key: batch[key] for key in ("input_ids", "attention_mask")}
    assert int(objective.positions(unlabelled)) == 6 + 3 + 5
    assert int(objective.positions({"input_ids": batch["input_ids"]})) == 3 * 8
    theirs_too = {**unlabelled, "teacher_input_ids": torch.zeros(3, 5).long()}
    assert int(objective.positions(theirs_too)) == 4 + 3 + 4
    theirs_too["teacher_attention_mask"] = torch.tensor([[1, 1, 0, 0, 0]] * 3)
    assert int(objective.positions(theirs_too)) == 3


def test_a_teacher_with_its_vocabulary_in_another_order_is_no_teacher_at_all():
    student = tiny.llama(0)
    teacher = copy.deepcopy(student)
    teacher.lm_head.weight.data = student.lm_head.weight.data[torch.randperm(95)]
    batch = answers([(3, 4), (2, 2)], 9)
    mean = attached(student, teacher)(*outputs(student, teacher, batch), batch)
    assert mean.item() == pytest.approx(0.0, abs=1e-5)
    other = attached(student, tiny.llama(1))(*outputs(student, tiny.llama(1), batch), batch)
    assert other > 0.1


def test_the_gradient_reaches_the_student_alone(monkeypatch):
    student, teacher = tiny.llama(0), tiny.llama(1, vocab=120)
    batch, _ = for_two()
    objective = attached(student, teacher)
    gradients, rows = [], []

    def recorded(ours, others, temperature):
        rows.append(len(others))
        return sorted_distance(ours, others, temperature)

    monkeypatch.setattr(cross_vocabulary, "sorted_distance", recorded)
    for chunk in (2**24, 250):  # whole, and two rows of the larger vocabulary at a time
        monkeypatch.setattr(cross_vocabulary, "_CHUNK", chunk)
        student.zero_grad()
        ours, theirs = outputs(student, teacher, batch)
        objective(ours, theirs, batch).backward()
        gradients.append([p.grad.clone() for p in student.parameters()])
    assert all(g.abs().sum() > 0 for g in gradients[0])
    assert rows == [9, *[2, 2, 2, 2, 1] * 2]
    torch.testing.assert_close(*gradients)
    assert all(p.grad is None for p in teacher.parameters())


def test_a_batch_without_answers_is_zero_over_no_position():
    student, teacher = tiny.llama(0), tiny.llama(1, vocab=120)
    batch = answers([(3, 0), (2, 0)], 5)
    mean = attached(student, teacher)(*outputs(student, teacher, batch), batch)
    count = attached(student, teacher).positions(batch)
    assert (mean.item(), int(count)) == (0.0, 0)


def test_the_temperature_may_be_a_schedule():
    student, teacher = tiny.llama(0), tiny.llama(1)
    batch = answers([(3, 4), (2, 2)], 9)
    out = outputs(student, teacher, batch)
    scheduled = attached(student, teacher, temperature=Linear(1.0, 5.0))
    values = []
    for progress, temperature in ((0.0, 1.0), (0.5, 3.0)):
        values.append(scheduled(*out, batch, progress=progress))
        torch.testing.assert_close(values[-1], attached(student, teacher, temperature=temperature)(*out, batch))
    assert values[0] > values[1]


def test_decoders_of_encoder_decoders_are_compared_where_their_labels_are():
    student, teacher = tiny.t5(0), tiny.t5(1, vocab=130)
    ids = torch.randint(5, 90, (2, 6))
    labels = torch.tensor([[7, 8, 9, 3], [7, 3, -100, -100]])
    theirs = torch.tensor([[9, 3, -100], [7, 8, 3]])
    batch = {"input_ids": ids, "labels": labels, "teacher_input_ids": ids, "teacher_labels": theirs}
    objective = attached(student, teacher)
    with torch.no_grad():
        out = student(input_ids=ids, labels=labels), teacher(input_ids=ids, labels=theirs)
    mean = objective(*out, batch)
    count = objective.positions(batch)
    places = [(0, 0), (0, 1), (1, 0), (1, 1)]
    expected = [by_hand(out[0].logits[place], out[1].logits[place]) for place in places]
    assert int(count) == 4
    assert mean.item() == pytest.approx(sum(expected) / 4, rel=1e-5)
    with pytest.raises(ValueError, match="ULD needs labels"):
        objective.positions({"input_ids": ids})


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (tiny.llama, tiny.t5),
        (tiny.bert, tiny.bert),
        (tiny.bert_mlm, tiny.llama),
    ],
)
def test_models_that_do_not_write_alike_are_refused(student, teacher):
    with pytest.raises(ValueError, match="ULD compares what two language models write"):
        attached(student(0), teacher(1))


def test_what_makes_no_sense_is_refused():
    for temperature in (0.0, Linear(1.0, -1.0), float("nan")):
        with pytest.raises(ValueError, match="temperature must be larger than 0"):
            ULD(temperature=temperature)
    teacher = tiny.llama(1)
    cached = ModelSignature("LlamaForCausalLM", teacher.config, {"logits": (1, 4, 95)}, temperature=2.0)
    with pytest.raises(ValueError, match="likeliest tokens alone were cached"):
        attached(tiny.llama(0), cached)
    shifted = ModelSignature("LlamaForCausalLM", teacher.config, {"logits": (1, 9, 95)})
    with pytest.raises(ValueError, match="logits at 4 and 9 positions"):
        attached(tiny.llama(0), shifted)
    batch, _ = for_two()
    del batch["teacher_labels"]
    with pytest.raises(ValueError, match="Add a column teacher_labels"):
        attached(tiny.llama(0), teacher).positions(batch)
