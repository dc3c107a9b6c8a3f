# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    BertModel,
    DataCollatorWithFlattening,
    Trainer,
    TrainerCallback,
)

from hfkdq.losses import forward_kl
from hfkdq.objectives import AttentionKD, HiddenStateKD, LogitKD, TaskLoss
from hfkdq.schedules import Linear
from hfkdq.trainer import DistillationMixin, DistillationTrainer
from hfkdq.trainer.checkpoints import STATE_FILE
from tests import tiny

from .common import ALL_TERMS, StopAt, assert_equal_weights, losses, make_trainer, teacher_of, weights

# ---------------------------------------------------------------------- a drop-in Trainer


def test_without_a_teacher_it_is_the_plain_trainer(training_arguments):
    runs = []
    for cls, folder in ((Trainer, "plain"), (DistillationTrainer, "ours")):
        student = tiny.bert(0, hidden_dropout_prob=0.2)
        arguments = training_arguments(
            folder, max_steps=4, save_strategy="steps", save_steps=4, eval_strategy="steps", eval_steps=2
        )
        trainer = make_trainer(arguments, student=student, teacher=None, cls=cls)
        trainer.train()
        runs.append((trainer, losses(trainer, "loss", "grad_norm"), trainer.evaluate()["eval_loss"]))
    assert runs[0][1:] == runs[1][1:]
    assert_equal_weights(runs[0][0].model, runs[1][0].model)
    for name in ("config.json", "model.safetensors"):
        plain, ours = (Path(run[0].args.output_dir, "checkpoint-4", name).read_bytes() for run in runs)
        assert plain == ours, name


def test_positional_arguments_are_those_of_trainer(training_arguments):
    dataset, tokenizer = tiny.text_dataset(8), tiny.tokenizer()
    trainer = DistillationTrainer(
        tiny.bert(), training_arguments(max_steps=1), None, dataset, dataset, tokenizer,
        teacher_model=teacher_of(), objectives=[LogitKD()],
    )  # fmt: skip
    trainer.train()
    assert trainer.train_dataset is dataset
    assert trainer.processing_class is tokenizer


def test_the_teacher_does_not_disturb_the_random_state(training_arguments):
    """With all weight on the task, dropout and data order are those of a run without a teacher, step for step."""
    runs = []
    for cls in (Trainer, DistillationTrainer):
        objectives = [TaskLoss(), LogitKD(weight=0.0), HiddenStateKD(weight=0.0)]
        student = tiny.bert(0, hidden_dropout_prob=0.2)
        teacher = teacher_of(hidden_dropout_prob=0.3)
        trainer = make_trainer(training_arguments(max_steps=5), objectives, student, teacher, cls=cls, model_init=None)
        trainer.train()
        runs.append(losses(trainer, "loss"))
    np.testing.assert_allclose(runs[0], runs[1], rtol=2e-4)


def test_evaluation_is_plain_and_runs_no_teacher(training_arguments):
    teacher, student = teacher_of(), tiny.bert(0)
    trainer = make_trainer(training_arguments(), ALL_TERMS["sum"], student, teacher)
    teacher.forward = lambda *args, **kwargs: pytest.fail("the teacher ran in evaluation")
    ours, predictions = trainer.evaluate(), trainer.predict(trainer.eval_dataset)
    plain = make_trainer(training_arguments(), student=student, cls=Trainer)
    assert ours["eval_loss"] == plain.evaluate()["eval_loss"]
    np.testing.assert_array_equal(predictions.predictions, plain.predict(plain.eval_dataset).predictions)


# ---------------------------------------------------------------------- what is trained and logged


def test_every_term_is_logged_under_its_own_name_as_the_mean_of_the_window(training_arguments):
    def squared(student_out, teacher_out, batch):
        return (student_out.logits - teacher_out.logits).square().mean()

    objectives = [TaskLoss(weight=0.5), LogitKD(), LogitKD(temperature=4.0, weight=2.0), squared]
    single = make_trainer(training_arguments("single", max_steps=4), objectives)
    single.train()
    rows = [row for row in single.state.log_history if "loss" in row]
    for row in rows:
        total = 0.5 * row["task_loss"] + row["logit_kd"] + 2 * row["logit_kd_2"] + row["squared"]
        assert row["loss"] == pytest.approx(total, rel=1e-3)
    grouped = make_trainer(training_arguments("grouped", max_steps=4, logging_steps=2), objectives)
    grouped.train()
    means = np.array(losses(single, "logit_kd", "squared")).reshape(2, 2, 2).mean(1)
    np.testing.assert_allclose(losses(grouped, "logit_kd", "squared"), means, rtol=1e-3)


def test_a_teacher_that_no_objective_uses_is_not_run(training_arguments):
    teacher = teacher_of()
    trainer = make_trainer(training_arguments(max_steps=1), [TaskLoss()], teacher=teacher)
    teacher.forward = lambda *args, **kwargs: pytest.fail("the teacher ran")
    trainer.train()
    assert "teacher" not in trainer.model.config.hfkdq["distillation"]


def test_weights_follow_their_schedule(training_arguments):
    objectives = [TaskLoss(weight=Linear(1, 0)), LogitKD(weight=Linear(0, 1))]
    trainer = make_trainer(training_arguments(max_steps=4), objectives)
    trainer.train()
    for step, (loss, task, kd) in enumerate(losses(trainer, "loss", "task_loss", "logit_kd")):
        assert loss == pytest.approx((1 - step / 4) * task + step / 4 * kd, rel=1e-3)


def test_the_student_learns_from_the_teacher_without_labels(training_arguments):
    trainer = make_trainer(
        training_arguments(num_train_epochs=15, logging_steps=3), [LogitKD()], teacher=tiny.bert(1),
        train_dataset=tiny.text_dataset(48).remove_columns("labels"),
    )  # fmt: skip
    trainer.train()
    first, *_, last = losses(trainer, "logit_kd")
    assert last[0] < 0.3 * first[0]


def test_columns_of_the_teacher_alone_reach_only_the_teacher(training_arguments):
    seen = []
    teacher = tiny.bert(1, layers=4)
    teacher.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("token_type_ids")), with_kwargs=True
    )
    dataset = tiny.text_dataset(8).map(lambda row: {"token_type_ids": [1] * len(row["input_ids"])})
    trainer = make_trainer(
        training_arguments(max_steps=1),
        [TaskLoss(), LogitKD()],
        tiny.distilbert(),
        teacher,
        train_dataset=dataset,
        eval_dataset=dataset,
    )
    seen.clear()
    trainer.train()
    assert len(seen) == 1
    assert seen[0].max() == 1
    assert np.isfinite(trainer.evaluate()["eval_loss"])


def test_mixed_precision_keeps_the_losses_in_float32(training_arguments):
    trainer = make_trainer(training_arguments(max_steps=2, bf16=True), ALL_TERMS["sum"])
    types = []
    trainer.objectives[1].__class__.loss, original = (
        lambda self, step: types.append(original(self, step)) or types[-1],
        trainer.objectives[1].__class__.loss,
    )
    try:
        trainer.train()
    finally:
        trainer.objectives[1].__class__.loss = original
    assert [mean.dtype for mean in types] == [torch.float32] * 2
    assert np.isfinite(losses(trainer, "loss")).all()


# ---------------------------------------------------------------------- files and resuming


def test_checkpoints_are_the_students_alone(training_arguments, tmp_path):
    student = tiny.bert(0)
    keys, teacher = set(student.state_dict()), teacher_of()
    before = weights(teacher)
    trainer = make_trainer(
        training_arguments(max_steps=2, save_strategy="steps", save_steps=1), ALL_TERMS["sum"], student, teacher
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    for folder in (tmp_path / "out" / "checkpoint-1", tmp_path / "final"):
        assert set(load_file(folder / "model.safetensors")) == keys
        loaded, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
        assert type(loaded) is type(student)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
    assert not (tmp_path / "final" / STATE_FILE).exists()
    assert_equal_weights(loaded, trainer.model)
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not optimized & {id(p) for p in teacher.parameters()}
    assert all(not p.requires_grad and p.grad is None for p in teacher.parameters())
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())
    facts = loaded.config.hfkdq["distillation"]
    assert [o["name"] for o in facts["objectives"]] == ["TaskLoss", "LogitKD", "HiddenStateKD", "AttentionKD"]
    assert facts["steps"] == 2


def test_resuming_equals_never_stopping(training_arguments):
    def run(folder, stop=None, resume=None):
        arguments = training_arguments(folder, max_steps=6, save_strategy="steps", save_steps=3, logging_steps=2)
        trainer = make_trainer(arguments, ALL_TERMS["sum"], tiny.bert(0, hidden_dropout_prob=0.1))
        if stop:
            trainer.add_callback(StopAt(stop))
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run("whole")
    run("cut", stop=3)
    again = run("cut", resume=True)
    assert_equal_weights(whole.model, again.model)
    projections = [trainer._distillation.projections.maps for trainer in (whole, again)]
    assert_equal_weights(*projections)
    names = ("loss", "grad_norm", "logit_kd", "hidden_state_kd")
    assert losses(whole, *names)[-1] == losses(again, *names)[-1]


def test_a_checkpoint_without_its_projections_is_refused(training_arguments):
    trainer = make_trainer(training_arguments(max_steps=1, save_strategy="steps", save_steps=1), [LogitKD()])
    trainer.train()
    other = make_trainer(training_arguments(max_steps=2), [LogitKD(), HiddenStateKD()])
    with pytest.raises(ValueError, match=r"written by another training.*HiddenStateKD"):
        other.train(resume_from_checkpoint=True)


def test_model_init_gets_its_objectives_each_time(training_arguments):
    trainer = DistillationTrainer(
        args=training_arguments(max_steps=3), model_init=lambda: tiny.bert(0), train_dataset=tiny.text_dataset(),
        processing_class=tiny.tokenizer(), teacher_model=teacher_of(), objectives=ALL_TERMS["sum"],
    )  # fmt: skip
    trainer.train()
    first = losses(trainer, "loss", "hidden_state_kd")
    trainer.train()
    assert losses(trainer, "loss", "hidden_state_kd")[-3:] == first[-3:]


def test_the_mixin_goes_before_a_trainer_of_the_users_own(training_arguments):
    class Doubled(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            return (2 * loss, outputs) if return_outputs else 2 * loss

    class Mine(DistillationMixin, Doubled):
        pass

    single, doubled = (
        make_trainer(training_arguments(max_steps=1), [TaskLoss(), LogitKD()], cls=cls)
        for cls in (DistillationTrainer, Mine)
    )
    single.train()
    doubled.train()
    one, two = losses(single, "task_loss", "logit_kd")[0], losses(doubled, "task_loss", "logit_kd")[0]
    assert two == pytest.approx([2 * one[0], one[1]], rel=1e-4)


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        (dict(teacher=teacher_of(), objectives=[]), ValueError, "objectives is empty"),
        (dict(teacher=teacher_of(), objectives=None), ValueError, "objectives is empty"),
        (dict(teacher=None, objectives=[]), ValueError, "objectives is empty"),
        (dict(teacher=None, objectives=[LogitKD()]), ValueError, "logit_kd compare with a teacher"),
        (dict(teacher=7, objectives=[LogitKD()]), TypeError, "by name, got int"),
        (dict(teacher=teacher_of(), objectives=LogitKD()), TypeError, "must be a list"),
        (dict(teacher=teacher_of(), objectives=[LogitKD]), TypeError, "parentheses"),
        (dict(teacher=tiny.bert(labels=5), objectives=[LogitKD()]), ValueError, "same labels or vocabulary"),
        (dict(teacher=teacher_of(), objectives=[HiddenStateKD(layers={1: 9})]), ValueError, "out of range"),
    ],
)
def test_bad_input_is_refused_before_training(training_arguments, kwargs, error, message):
    with pytest.raises(error, match=message):
        make_trainer(training_arguments(), **kwargs)


def test_a_teacher_that_is_the_student_is_refused(training_arguments):
    student = tiny.bert()
    with pytest.raises(ValueError, match="shares its parameters"):
        make_trainer(training_arguments(), [LogitKD()], student, student)
    assert all(p.requires_grad for p in student.parameters())


def test_attentions_under_reentrant_checkpointing_are_refused(training_arguments):
    arguments = training_arguments(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant"):
        make_trainer(arguments, [AttentionKD()])


def test_nan_in_the_teacher_names_the_step(training_arguments):
    teacher = teacher_of()

    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                teacher.classifier.bias.data[0] = float("nan")

    trainer = make_trainer(
        training_arguments(max_steps=5), [TaskLoss(), LogitKD()], teacher=teacher, callbacks=[Poison()]
    )
    before_third = {}

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            before_third.update(weights(model))

    trainer.add_callback(Watch())
    with pytest.raises(RuntimeError, match="at step 3"):
        trainer.train()
    assert all(torch.equal(before_third[key], value) for key, value in trainer.model.state_dict().items())


def test_packed_texts_are_those_that_are_padded(training_arguments):
    """Both models are asked for no cache, with which transformers 4 lets texts in one row see one another."""
    rows = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in tiny.text_dataset(4)]
    student, teacher, expected = tiny.llama(0), tiny.llama(1), []
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            expected.append(forward_kl(student(ids).logits, teacher(ids).logits, 2.0)[0, :-1])
    trainer = make_trainer(
        training_arguments(max_steps=1, per_device_train_batch_size=4, remove_unused_columns=False), [TaskLoss(), LogitKD()],
        student, teacher, train_dataset=rows, data_collator=DataCollatorWithFlattening(return_tensors="pt"), eval_dataset=None,
    )  # fmt: skip
    trainer.train()
    assert losses(trainer, "logit_kd")[0][0] == pytest.approx(torch.cat(expected).mean().item(), rel=1e-4)


def test_a_function_compares_what_models_without_a_head_return(training_arguments):
    student, teacher = (BertModel(tiny.bert_config(layers=1)).eval() for _ in range(2))
    rows = [{"input_ids": ids} for ids in torch.randint(5, 90, (8, 6))]

    def distance(student_out, teacher_out, batch):
        return (student_out.last_hidden_state - teacher_out.last_hidden_state).square().mean()

    batch = torch.stack([row["input_ids"] for row in rows])
    with torch.no_grad():
        expected = distance(student(batch), teacher(batch), None).item()
    trainer = make_trainer(
        training_arguments(max_steps=1, per_device_train_batch_size=8), [distance], student, teacher, train_dataset=rows,
        eval_dataset=None,
    )  # fmt: skip
    trainer.train()
    assert losses(trainer, "loss")[0][0] == pytest.approx(expected, rel=1e-3)
