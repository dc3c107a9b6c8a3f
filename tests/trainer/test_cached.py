# SPDX-License-Identifier: Apache-2.0
"""Training on cached outputs of a teacher is training with the teacher, which is not there."""

from __future__ import annotations

import datasets
import pytest
import torch
from transformers import DataCollatorForTokenClassification

from hfkdq import EMATeacher
from hfkdq.caching import cache_info, cache_teacher_outputs
from hfkdq.losses import forward_kl
from hfkdq.objectives import AttentionKD, HiddenStateKD, LogitKD, TaskLoss
from tests import tiny
from tests.trainer.common import assert_equal_weights, losses, make_trainer, teacher_of

TERMS = {
    "logits": [LogitKD()],
    "hidden states": [HiddenStateKD(layers={1: 2, 2: 4}, embeddings=True)],
    "sum": [TaskLoss(weight=0.5), LogitKD(temperature=3.0), HiddenStateKD()],
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    datasets.disable_progress_bars()
    return cache_teacher_outputs(
        teacher_of(), tiny.text_dataset(), processing_class=tiny.tokenizer(), hidden_states=[0, 2, 4],
        folder=tmp_path_factory.mktemp("cache"), batch_size=5,
    )  # fmt: skip


def from_cache(arguments, rows, objectives, **kwargs):
    return make_trainer(arguments, objectives, teacher=None, train_dataset=rows, **kwargs)


@pytest.mark.parametrize("terms", TERMS)
def test_losses_are_those_with_the_teacher(terms, rows, training_arguments):
    steps = dict(optim="sgd", learning_rate=0.05)  # Adam would make large what is small
    live = make_trainer(training_arguments("live", **steps), TERMS[terms])
    live.train()
    cached = from_cache(training_arguments("cached", **steps), rows, TERMS[terms])
    cached.train()
    names = ["loss", *(term.name for term in live._distillation.terms)]
    expected, found = torch.tensor(losses(live, *names)), torch.tensor(losses(cached, *names))
    assert expected.shape == (9, len(names))
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-4)
    assert_equal_weights(cached.model, live.model, rtol=0, atol=3e-4)
    assert cached.teacher_model is None
    assert cached.model.config.hfkdq["distillation"]["teacher"] == "BertForSequenceClassification"


def test_the_likeliest_tokens_train_a_language_model_as_its_teacher_does(tmp_path, training_arguments):
    texts = tiny.text_dataset().map(lambda row: {"labels": row["input_ids"]})
    collator, teacher = DataCollatorForTokenClassification(tiny.tokenizer()), tiny.llama(1, layers=4)
    rows = cache_teacher_outputs(
        teacher, texts, data_collator=collator, top_k=9, temperature=2.0, folder=tmp_path / "cache"
    )
    found = []
    for name, given in (("live", {"teacher": teacher}), ("cached", {"teacher": None})):
        objectives = [TaskLoss(), LogitKD(top_k=9 if name == "live" else None)]
        data = texts if name == "live" else rows
        trainer = make_trainer(
            training_arguments(name), objectives, student=tiny.llama(0), train_dataset=data, eval_dataset=texts,
            data_collator=collator, **given,
        )  # fmt: skip
        trainer.train()
        found.append(torch.tensor(losses(trainer, "loss", "logit_kd")))
    torch.testing.assert_close(found[1], found[0], rtol=3e-3, atol=1e-3)


def test_accumulation_changes_nothing(rows, training_arguments):
    trained = []
    for size, steps in ((8, 1), (4, 2), (2, 4)):
        arguments = training_arguments(
            f"by{size}", per_device_train_batch_size=size, gradient_accumulation_steps=steps, optim="sgd", learning_rate=0.05
        )  # fmt: skip
        trainer = from_cache(arguments, rows, TERMS["sum"])
        trainer.train()
        trained.append((trainer.model, torch.tensor(losses(trainer, "loss", "logit_kd", "hidden_state_kd"))))
    for model, logged in trained[1:]:
        assert_equal_weights(model, trained[0][0], rtol=0, atol=2e-6)
        torch.testing.assert_close(logged, trained[0][1], rtol=1e-4, atol=1e-5)


def test_evaluation_is_that_of_the_student_alone(rows, training_arguments):
    live = make_trainer(training_arguments("live"), TERMS["logits"]).evaluate()
    trainer = from_cache(training_arguments("cached"), rows, TERMS["logits"])
    assert trainer.evaluate()["eval_loss"] == live["eval_loss"]
    plain = trainer.evaluate(tiny.text_dataset())
    assert trainer.evaluate(rows)["eval_loss"] == plain["eval_loss"]  # the outputs in it are not read


def test_rows_that_were_changed_since_stop_the_training(rows, training_arguments):
    changed = rows.map(lambda row: {"input_ids": [2, 9, *row["input_ids"][2:]]})
    assert cache_info(changed) == cache_info(rows)
    with pytest.raises(ValueError, match=r"not what the teacher saw.*other values"):
        from_cache(training_arguments(), changed, TERMS["logits"]).train()


def test_outputs_of_another_teacher_are_refused(rows, training_arguments):
    with pytest.raises(ValueError, match="another model or the same with other weights"):
        make_trainer(training_arguments(), [LogitKD()], teacher=tiny.bert(7, layers=4), train_dataset=rows)
    own = make_trainer(training_arguments(), [LogitKD()], train_dataset=rows)  # whose outputs they are
    own.train()


@pytest.mark.parametrize(
    ("objective", "told"),
    [
        (HiddenStateKD(layers={1: 1}), r"\[1\] are not cached"),
        (AttentionKD(), "hold no attention probabilities"),
    ],
)
def test_what_is_not_cached_is_told_before_training(objective, told, rows, training_arguments):
    with pytest.raises(ValueError, match=told):
        from_cache(training_arguments(), rows, [objective])


def test_a_resumed_run_is_one_that_was_never_stopped(rows, training_arguments):
    saving = dict(save_strategy="steps", save_steps=4)
    whole = from_cache(training_arguments("whole", **saving), rows, TERMS["sum"])
    whole.train()
    again = from_cache(training_arguments("again", **saving), rows, TERMS["sum"])
    again.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-4")
    assert again.state.global_step == whole.state.global_step == 9
    assert_equal_weights(again.model, whole.model)
    assert losses(again, "loss") == losses(whole, "loss")


@pytest.mark.parametrize("first", ["live", "cached"])
def test_a_run_beside_the_teacher_and_one_on_its_cache_go_on_from_each_other(first, rows, training_arguments):
    def trainer(kind, name):
        arguments = training_arguments(name, save_strategy="steps", save_steps=4, optim="sgd", learning_rate=0.05)
        own = make_trainer(arguments, TERMS["sum"]) if kind == "live" else from_cache(arguments, rows, TERMS["sum"])
        return own

    whole = trainer(first, "whole")
    whole.train()
    again = trainer("cached" if first == "live" else "live", "again")
    again.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-4")
    assert again.state.global_step == 9
    assert_equal_weights(again.model, whole.model, rtol=0, atol=3e-4)


@pytest.mark.parametrize("given", [EMATeacher(), {"average": EMATeacher()}])
def test_cached_outputs_stand_for_one_frozen_teacher_alone(given, rows, training_arguments):
    with pytest.raises(ValueError, match="another kind of teacher, or several"):
        make_trainer(training_arguments(), [LogitKD(teacher=None)], teacher=given, train_dataset=rows)


@pytest.mark.parametrize("forbidden", [False, True], ids=["all tokens", "some forbidden"])
def test_padding_on_the_left_and_forbidden_tokens_are_as_beside_the_teacher(forbidden, tmp_path, training_arguments):
    """What padding predicts counts in neither; a token at minus infinity is kept so."""
    student, teacher = tiny.llama(0), tiny.llama(1)

    def forbid(model, args, output):
        output.logits = output.logits.masked_fill(torch.arange(output.logits.shape[-1]) > 88, -torch.inf)
        return output

    for model in (student, teacher) if forbidden else ():
        model.register_forward_hook(forbid)
    texts = tiny.text_dataset(8).map(lambda row: {"labels": [min(i, 88) for i in row["input_ids"]]})
    tokenizer = tiny.tokenizer()
    right = DataCollatorForTokenClassification(tokenizer)
    rows = cache_teacher_outputs(teacher, texts, data_collator=right, top_k=None, folder=tmp_path / "cache")
    left_tokenizer = tiny.tokenizer()
    left_tokenizer.padding_side = "left"
    left, found = DataCollatorForTokenClassification(left_tokenizer), []
    with torch.no_grad():
        alone = [[m(torch.tensor([row["input_ids"]])).logits[0, :-1] for m in (student, teacher)] for row in texts]
    expected = torch.cat([forward_kl(*pair, 2.0) for pair in alone]).mean().item()
    for name, given, data, collator in (
        ("live", teacher, texts, left), ("cached", None, rows, left), ("right", None, rows, right),
    ):  # fmt: skip
        trainer = make_trainer(
            training_arguments(name, max_steps=1, per_device_train_batch_size=8, learning_rate=0.0), [TaskLoss(), LogitKD()],
            student, teacher=given, train_dataset=data, eval_dataset=None, data_collator=collator,
        )  # fmt: skip
        trainer.train()
        found.append(losses(trainer, "logit_kd")[0][0])
    assert found == pytest.approx([expected] * 3, rel=2e-3)
