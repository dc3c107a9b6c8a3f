# SPDX-License-Identifier: Apache-2.0
"""Which columns of a data set reach the student, the teacher, or nobody; data sets that are read as they come."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import IterableDataset
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

from hfkdq.losses import forward_kl
from hfkdq.objectives import HiddenStateKD, LogitKD, TaskLoss
from hfkdq.trainer import DistillationTrainer
from tests import tiny

from .common import ALL_TERMS, assert_equal_weights, losses, make_trainer, teacher_of


def spy(model):
    """The keyword arguments of every call of `model` from now on."""
    calls = []
    model.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
    return calls


def for_two_tokenizers(rows=16, seed=0):
    """Rows with another tokenization for the teacher, of another length and over a larger vocabulary."""

    def add(row):
        ids = [i + 100 for i in row["input_ids"] for _ in range(2)]
        return {"teacher_input_ids": ids, "teacher_attention_mask": [1] * len(ids)}

    return tiny.text_dataset(rows, seed=seed).map(add)


def pad_both(rows):
    pad = DataCollatorWithPadding(tiny.tokenizer())
    own = pad([{k: v for k, v in row.items() if not k.startswith("teacher_")} for row in rows])
    other = pad([{k.removeprefix("teacher_"): v for k, v in row.items() if k.startswith("teacher_")} for row in rows])
    return {**own, **{f"teacher_{key}": value for key, value in other.items()}}


@pytest.mark.parametrize("kept", [False, True], ids=["unused columns removed", "kept"])
@pytest.mark.parametrize("streamed", [False, True], ids=["in memory", "streamed"])
def test_a_teacher_with_its_own_tokenizer_reads_the_columns_that_bear_its_name(training_arguments, kept, streamed):
    student, teacher = tiny.bert(0), tiny.bert(1, layers=3, vocab_size=300)
    data, dev = for_two_tokenizers(8), for_two_tokenizers(6, seed=3)
    to_teacher, to_student = spy(teacher), spy(student)
    trainer = make_trainer(
        training_arguments(max_steps=1, remove_unused_columns=not kept), [TaskLoss(weight=0.5), LogitKD()], student,
        teacher, train_dataset=data.to_iterable_dataset() if streamed else data, eval_dataset=dev,
        data_collator=pad_both,
    )  # fmt: skip
    to_teacher.clear(), to_student.clear()
    batch = pad_both(list(data))
    with torch.no_grad():
        ours = student(batch["input_ids"], batch["attention_mask"], labels=batch["labels"])
        theirs = teacher(batch["teacher_input_ids"], batch["teacher_attention_mask"])
    to_teacher.clear(), to_student.clear()
    trainer.train()
    assert len(to_teacher) == 1
    assert to_teacher[0]["input_ids"].shape == batch["teacher_input_ids"].shape
    assert "labels" not in to_teacher[0]
    expected = [ours.loss.item(), forward_kl(ours.logits, theirs.logits, 2.0).mean().item()]
    assert losses(trainer, "task_loss", "logit_kd")[0] == pytest.approx(expected, rel=1e-4)
    evaluated, predicted = trainer.evaluate(), trainer.predict(dev).predictions
    assert not any(key.startswith("teacher_") for call in to_student for key in call)
    plain = make_trainer(
        training_arguments("plain"), student=student, cls=Trainer,
        eval_dataset=dev.remove_columns(["teacher_input_ids", "teacher_attention_mask"]),
    )  # fmt: skip
    assert evaluated["eval_loss"] == plain.evaluate()["eval_loss"]
    np.testing.assert_array_equal(predicted, plain.predict(plain.eval_dataset).predictions)


@pytest.mark.parametrize("streamed", [False, True], ids=["in memory", "streamed"])
def test_columns_that_nobody_takes_are_removed_as_by_trainer(training_arguments, streamed):
    """The student has no token types and the teacher has; neither knows of a `text`."""
    data = tiny.text_dataset(8).map(
        lambda row: {"token_type_ids": [1] * len(row["input_ids"]), "text": "w1", "teacher_text": "w1"}
    )
    collate, seen = DataCollatorWithPadding(tiny.tokenizer()), {}

    def run(cls):
        def collator(rows):
            seen.setdefault(cls, set()).update(*rows)
            return collate(rows)

        teacher = tiny.bert(1, layers=4)
        calls = spy(teacher)
        trainer = make_trainer(
            training_arguments(max_steps=1), [TaskLoss(), LogitKD()], tiny.distilbert(), teacher, cls=cls,
            train_dataset=data.to_iterable_dataset() if streamed else data, data_collator=collator,
        )  # fmt: skip
        calls.clear()
        trainer.train()
        return calls

    run(Trainer)
    (call,) = run(DistillationTrainer)
    assert seen[Trainer] == {"input_ids", "attention_mask", "labels"}
    assert seen[DistillationTrainer] == seen[Trainer] | {"token_type_ids"}
    assert call["token_type_ids"].max() == 1


@pytest.mark.parametrize("evaluated", [False, True], ids=["training", "evaluation"])
def test_a_column_that_is_kept_for_nobody_reaches_the_student_as_with_trainer(training_arguments, evaluated):
    """Only what is the teacher's is taken away; a mistake of the user's stays as loud or as quiet as it is."""
    data, outcomes = tiny.text_dataset(8).add_column("weight", [1.0] * 8), []
    for cls in (Trainer, DistillationTrainer):
        student = tiny.bert(0)
        trainer = make_trainer(
            training_arguments(max_steps=1, remove_unused_columns=False), [TaskLoss(), LogitKD()], student, cls=cls,
            train_dataset=data, eval_dataset=data,
        )  # fmt: skip
        calls = spy(student)
        try:
            (trainer.evaluate if evaluated else trainer.train)()
            outcomes.append(None)
        except TypeError as error:
            outcomes.append(str(error))
        assert "weight" in calls[0]
    assert outcomes[0] == outcomes[1]


class TakesAnything(tiny.BertForSequenceClassification):
    """A student of the user's own whose signature says nothing."""

    accepts_loss_kwargs = False

    def forward(self, **inputs):
        assert "teacher_input_ids" not in inputs
        return super().forward(**inputs)


def test_a_student_whose_signature_says_nothing_gets_its_inputs(training_arguments):
    """Trainer feeds it if unused columns are kept and the labels are named; so must a trainer with a teacher."""
    data, runs = tiny.text_dataset(8), []
    for kind in (tiny.BertForSequenceClassification, TakesAnything):
        student = kind(tiny.bert_config())
        student.load_state_dict(tiny.bert(0).state_dict())
        trainer = make_trainer(
            training_arguments(max_steps=2, remove_unused_columns=False, label_names=["labels"]),
            [TaskLoss(weight=0.5), LogitKD()], student, train_dataset=data, eval_dataset=data,
        )  # fmt: skip
        trainer.train()
        runs.append((losses(trainer, "loss", "grad_norm"), trainer.evaluate()["eval_loss"]))
    assert runs[0] == runs[1]


def test_token_types_that_both_take_reach_both(training_arguments):
    student, teacher = tiny.bert(0), tiny.bert(1, layers=3)
    data = tiny.text_dataset(8).map(lambda row: {"token_type_ids": [0, *[1] * (len(row["input_ids"]) - 1)]})
    trainer = make_trainer(training_arguments(max_steps=1), [LogitKD()], student, teacher, train_dataset=data)
    calls = spy(student), spy(teacher)
    trainer.train()
    assert [len(c) for c in calls] == [1, 1]
    assert torch.equal(calls[0][0]["token_type_ids"], calls[1][0]["token_type_ids"])
    assert calls[0][0]["token_type_ids"].sum() > 0


# ---------------------------------------------------------------------- data sets that are read as they come


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = list(rows)

    def __iter__(self):
        yield from self.rows


def stream_of(kind, rows):
    return {"torch": Stream, "datasets": lambda r: Dataset.from_list(list(r)).to_iterable_dataset()}[kind](rows)


@pytest.mark.parametrize("kind", ["torch", "datasets"])
@pytest.mark.parametrize(
    "config",
    [None, {"split_batches": True}, {"dispatch_batches": True}],
    ids=["default", "split_batches", "dispatch_batches"],
)
def test_streams_are_accumulated_exactly(training_arguments, kind, config):
    stream_in_two_ways(training_arguments, kind, config, rows=32)


@pytest.mark.xfail(strict=True, reason="Trainer adds the gradient of a stream's short last window to the next step")
def test_a_short_window_at_the_end_of_a_stream_is_a_step_of_its_own(training_arguments):
    stream_in_two_ways(training_arguments, "datasets", None, rows=20)


def stream_in_two_ways(training_arguments, kind, config, rows):
    runs = []
    for size, steps in ((16, 1), (4, 4)):
        arguments = training_arguments(
            f"{size}", per_device_train_batch_size=size, gradient_accumulation_steps=steps, max_steps=4, optim="sgd",
            learning_rate=0.1, accelerator_config=config,
        )  # fmt: skip
        trainer = make_trainer(arguments, ALL_TERMS["sum"], train_dataset=stream_of(kind, tiny.text_dataset(rows)))
        trainer.train()
        runs.append((losses(trainer, "loss", "grad_norm", "logit_kd", "hidden_state_kd"), trainer.model))
    np.testing.assert_allclose(runs[0][0], runs[1][0], rtol=2e-3)
    assert_equal_weights(runs[0][1], runs[1][1], rtol=1e-3, atol=2e-5)
    assert len(runs[0][0]) == 4


@pytest.mark.parametrize("kind", ["torch", "datasets"])
def test_a_stream_gives_the_log_of_trainer(training_arguments, kind):
    logs = []
    for cls in (Trainer, DistillationTrainer):
        trainer = make_trainer(
            training_arguments(max_steps=5), [TaskLoss(), LogitKD(weight=0.0)], tiny.bert(0, hidden_dropout_prob=0.2),
            cls=cls, train_dataset=stream_of(kind, tiny.text_dataset(20)),
            eval_dataset=stream_of(kind, tiny.text_dataset(10, seed=9)),
        )  # fmt: skip
        trainer.train()
        logs.append([[*row, trainer.evaluate()["eval_loss"]] for row in losses(trainer, "loss", "epoch", "step")])
    np.testing.assert_allclose(*logs, rtol=2e-3)


def test_data_shorter_than_a_window_is_one_step(training_arguments):
    runs = []
    for size, steps in ((6, 1), (2, 8)):
        arguments = training_arguments(
            f"{size}", per_device_train_batch_size=size, gradient_accumulation_steps=steps, max_steps=3, optim="sgd",
            learning_rate=0.1,
        )  # fmt: skip
        trainer = make_trainer(arguments, ALL_TERMS["sum"], train_dataset=tiny.text_dataset(6))
        trainer.train()
        assert trainer.state.epoch == 3
        runs.append(losses(trainer, "loss", "grad_norm", "task_loss", "logit_kd", "attention_kd"))
    assert len(runs[0]) == 3
    np.testing.assert_allclose(*runs, rtol=2e-3)


def test_a_stream_of_unknown_length_needs_max_steps_as_with_trainer(tmp_path):
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    for cls in (Trainer, DistillationTrainer):
        with pytest.raises(ValueError, match="max_steps"):
            make_trainer(arguments, [HiddenStateKD()], cls=cls, train_dataset=Stream(tiny.text_dataset(4)))


def test_columns_do_not_depend_on_which_student_came_first(training_arguments):
    """`model_init` makes the student; the columns of its teacher survive from the first training on."""
    data = tiny.text_dataset(8).map(lambda row: {"token_type_ids": [1] * len(row["input_ids"])})
    teacher = teacher_of()
    calls = spy(teacher)
    trainer = DistillationTrainer(
        args=training_arguments(max_steps=1), model_init=lambda: tiny.distilbert(0), train_dataset=data,
        processing_class=tiny.tokenizer(), teacher_model=teacher, objectives=[LogitKD()],
    )  # fmt: skip
    for _ in range(2):
        calls.clear()
        trainer.train()
        assert calls[-1]["token_type_ids"].min() == 0 < calls[-1]["token_type_ids"].max()
