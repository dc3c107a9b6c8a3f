# SPDX-License-Identifier: Apache-2.0
"""Arguments, callbacks and habits of scripts that were written for the plain `Trainer`."""

import copy
import gc
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    HfArgumentParser,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from hfkdq.objectives import AttentionKD, HiddenStateKD, LogitKD, TaskLoss
from hfkdq.pruning import PruningCallback
from hfkdq.quantization import QATCallback
from hfkdq.specs import PruningSpec, QuantizationSpec
from hfkdq.trainer import DistillationTrainer
from tests import tiny

from .common import ALL_TERMS, StopAt, assert_equal_weights, losses, make_trainer, teacher_of, weights

V5 = int(transformers.__version__.split(".")[0]) >= 5
SILENT = [TaskLoss(), LogitKD(weight=0.0)]  # a teacher that runs and changes nothing


def history(trainer):
    """The log history without what a clock or a memory counter measured."""
    measured = ("runtime", "per_second", "_delta", "_alloc", "_peaked", "before_init_mem_cpu")
    return [{k: v for k, v in row.items() if not k.endswith(measured)} for row in trainer.state.log_history]


def as_plain(rows):
    return [{k: v for k, v in row.items() if k not in ("task_loss", "logit_kd")} for row in rows]


# ---------------------------------------------------------------------- what Trainer takes


def test_all_thirteen_arguments_of_trainer_go_where_they_go_there(training_arguments):
    dataset, seen = tiny.text_dataset(8), {"collated": 0, "preprocessed": 0}
    collate = DataCollatorWithPadding(tiny.tokenizer())

    def collator(rows):
        seen["collated"] += 1
        return collate(rows)

    def loss_func(outputs, labels, num_items_in_batch=None):
        return 10 * torch.nn.functional.cross_entropy(outputs.logits, labels)

    def metrics(prediction):
        return {"rows": float(len(prediction.label_ids))}

    def preprocess(logits, labels):
        seen["preprocessed"] += 1
        return logits

    callback, runs = StopAt(2), []
    for cls, ours in (
        (Trainer, {}),
        (DistillationTrainer, dict(teacher_model=teacher_of(), objectives=SILENT)),
    ):
        trainer = cls(
            None, training_arguments(max_steps=5), collator, dataset, tiny.text_dataset(6), tiny.tokenizer(),
            lambda: tiny.bert(0), loss_func, metrics, [callback], (None, None), (torch.optim.SGD, {"lr": 0.5}),
            preprocess, **ours,
        )  # fmt: skip
        seen.update(collated=0, preprocessed=0)
        trainer.train()
        evaluated = trainer.evaluate()
        assert type(trainer.optimizer.optimizer) is torch.optim.SGD
        assert trainer.state.global_step == 2
        runs.append((losses(trainer, "loss"), evaluated["eval_loss"], evaluated["eval_rows"], dict(seen)))
    np.testing.assert_allclose(runs[0][0], runs[1][0], rtol=2e-4)
    assert runs[0][1] == pytest.approx(runs[1][1], rel=1e-4)
    assert runs[0][2:] == runs[1][2:]
    assert runs[1][3]["collated"] > 0 < runs[1][3]["preprocessed"]


@pytest.mark.skipif(V5, reason="Transformers 5 no longer takes tokenizer=")
def test_the_old_name_of_the_processing_class_is_still_taken(training_arguments):
    tokenizer = tiny.tokenizer()
    with pytest.warns(FutureWarning, match="tokenizer"):
        trainer = DistillationTrainer(
            tiny.bert(), training_arguments(max_steps=1), train_dataset=tiny.text_dataset(8), tokenizer=tokenizer,
            teacher_model=teacher_of(), objectives=[LogitKD()],
        )  # fmt: skip
    assert trainer.processing_class is trainer.data_collator.tokenizer is tokenizer


GROUPED = dict(train_sampling_strategy="group_by_length") if V5 else dict(group_by_length=True)


@pytest.mark.parametrize(
    "settings",
    [
        dict(cls=Seq2SeqTrainingArguments),
        GROUPED,
        dict(torch_empty_cache_steps=1, include_num_input_tokens_seen=True),
        dict(skip_memory_metrics=False),
        dict(logging_first_step=True, logging_steps=2),
        dict(logging_steps=0.5),
        dict(logging_strategy="epoch"),
        dict(accelerator_config={"split_batches": True}),
        dict(accelerator_config={"dispatch_batches": False}, dataloader_drop_last=True),
        dict(data_seed=7, weight_decay=0.1, max_grad_norm=0.5, warmup_steps=2),
        dict(full_determinism=True, optim="adafactor"),
    ],
    ids=lambda settings: ",".join(settings),
)
def test_settings_mean_what_they_mean_to_trainer(training_arguments, settings):
    """Beside a teacher that changes nothing, all that is logged is what Trainer logs, and the terms."""
    runs = []
    for cls in (Trainer, DistillationTrainer):
        student = tiny.bert(0, hidden_dropout_prob=0.2)
        arguments = training_arguments(num_train_epochs=1, **settings)
        trainer = make_trainer(arguments, SILENT, student, cls=cls, train_dataset=tiny.text_dataset(20))
        trainer.train()
        runs.append(history(trainer))
    torch.use_deterministic_algorithms(False)
    plain, ours = runs[0], as_plain(runs[1])
    assert [row.keys() for row in plain] == [row.keys() for row in ours]
    for one, other in zip(plain, ours, strict=True):
        for key in one:
            close = key in ("loss", "grad_norm", "train_loss")
            assert other[key] == (pytest.approx(one[key], rel=2e-3) if close else one[key]), key
    assert all({"task_loss", "logit_kd"} <= row.keys() for row in runs[1] if "loss" in row)


def test_batches_grouped_by_length_are_those_of_trainer(training_arguments):
    orders = []
    for cls in (Trainer, DistillationTrainer):
        collate, seen = DataCollatorWithPadding(tiny.tokenizer()), []

        def collator(rows, collate=collate, seen=seen):
            seen.append([row["input_ids"] for row in rows])
            return collate(rows)

        trainer = make_trainer(
            training_arguments(max_steps=6, **GROUPED), ALL_TERMS["sum"], cls=cls, data_collator=collator,
            train_dataset=tiny.text_dataset(48),
        )  # fmt: skip
        trainer.train()
        orders.append(seen)
    assert orders[0] == orders[1]


@pytest.mark.parametrize(
    "settings", [dict(logging_first_step=True, logging_steps=3), dict(logging_steps=0.5)], ids=str
)
def test_terms_are_means_over_windows_of_any_length(training_arguments, settings):
    objectives = [TaskLoss(weight=0.5), LogitKD()]
    names = ("loss", "task_loss", "logit_kd")
    single = make_trainer(training_arguments("single", max_steps=6), objectives)
    single.train()
    single = np.array(losses(single, *names))
    trainer = make_trainer(training_arguments(max_steps=6, **settings), objectives)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["step"] for row in rows] == ([1, 3, 6] if "logging_first_step" in settings else [3, 6])
    start = 0
    for row in rows:
        np.testing.assert_allclose([row[name] for name in names], single[start : row["step"]].mean(0), rtol=1e-3)
        start = row["step"]


def test_what_reports_are_sent_to_gets_the_terms(training_arguments, monkeypatch):
    sent = []

    class Report(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            sent.append(dict(logs))

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "a_report", Report)
    trainer = make_trainer(training_arguments(max_steps=2, report_to=["a_report"]), [TaskLoss(), LogitKD()])
    trainer.train()
    logged = [{k: v for k, v in row.items() if k != "step"} for row in trainer.state.log_history]
    assert sent == logged
    assert sum("logit_kd" in row for row in sent) == 2


def test_a_loss_that_is_not_a_number_ends_the_training_at_its_step(training_arguments):
    """Whatever the filter of Trainer would have logged; the weights are those of the step before."""

    def broken(student_out, teacher_out, batch):
        value = float("nan") if len(batch["labels"]) == 4 else 1.0
        return student_out.logits.sum() * 0 + value

    weights = []
    for objectives, steps in (([TaskLoss(), broken], -1), ([TaskLoss()], 2)):
        settings = dict(num_train_epochs=1, max_steps=steps, logging_nan_inf_filter=True, lr_scheduler_type="constant")
        trainer = make_trainer(training_arguments(**settings), objectives, train_dataset=tiny.text_dataset(20))
        if steps < 0:
            with pytest.raises(
                RuntimeError, match=r"At step 3 broken is nan, loss is nan, so there is nothing to learn"
            ):
                trainer.train()
        else:
            trainer.train()
        weights.append(trainer.model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


# ---------------------------------------------------------------------- arguments as files


def test_arguments_of_a_parser_are_plain_and_stay_plain(training_arguments, tmp_path):
    """The teacher is in no file of arguments; they are those of the plain Trainer, byte for byte."""
    line = (
        f"--output_dir {tmp_path / 'out'} --use_cpu True --report_to none --max_steps 2 --save_steps 2 --disable_tqdm True "
        "--gradient_checkpointing True --logging_steps 1"
    ).split()
    (arguments,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(line)
    assert type(arguments) is TrainingArguments
    # The first use of a TrainingArguments fills it in; copies of the filled one can be compared.
    described = json.loads(arguments.to_json_string())
    saved = []
    for cls in (Trainer, DistillationTrainer):
        trainer = make_trainer(copy.deepcopy(arguments), [TaskLoss(), LogitKD(), HiddenStateKD()], cls=cls)
        trainer.train()
        assert json.loads(trainer.args.to_json_string()) == described
        file = tmp_path / "out" / "checkpoint-2" / "training_args.bin"
        saved.append(file.read_bytes())
        assert torch.load(file, weights_only=False).to_dict() == arguments.to_dict()
    assert saved[0] == saved[1]


def test_arguments_that_attentions_need_are_still_written(training_arguments):
    trainer = make_trainer(training_arguments(gradient_checkpointing=True), [AttentionKD()])
    name = "activation" if hasattr(trainer.args, "activation_checkpointing") else "gradient"
    written = json.loads(trainer.args.to_json_string())
    assert written[f"{name}_checkpointing_kwargs"] == {"use_reentrant": False}


# ---------------------------------------------------------------------- scaling of the task loss


def causal_run(arguments, **kwargs):
    data = tiny.text_dataset(22).map(
        lambda row: {"labels": [-100, -100, *row["input_ids"][2:]]}, remove_columns="labels"
    )
    trainer = make_trainer(
        arguments, [TaskLoss(weight=0.5), LogitKD()], tiny.llama(0), tiny.llama(1, layers=3), eval_dataset=None,
        train_dataset=data, data_collator=DataCollatorForTokenClassification(tiny.tokenizer()), **kwargs,
    )  # fmt: skip
    trainer.train()
    return losses(trainer, "loss", "grad_norm", "task_loss", "logit_kd"), trainer.model


def token_mean(outputs, labels, num_items_in_batch=None):
    logits, labels = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch


@pytest.mark.parametrize("by", ["model", "label_smoothing_factor", "compute_loss_func"])
def test_the_task_loss_of_a_language_model_does_not_depend_on_accumulation(training_arguments, by):
    """Its forward pass takes the number of labels; whoever computes the loss, it is divided by them once."""
    settings = {"label_smoothing_factor": 0.2} if by == "label_smoothing_factor" else {}
    kwargs = {"compute_loss_func": token_mean} if by == "compute_loss_func" else {}
    runs = []
    for size, steps in ((16, 1), (4, 4), (2, 8)):
        arguments = training_arguments(
            f"{size}", per_device_train_batch_size=size, gradient_accumulation_steps=steps, num_train_epochs=1,
            optim="sgd", learning_rate=0.1, **settings,
        )  # fmt: skip
        runs.append(causal_run(arguments, **kwargs))
    for log, model in runs[1:]:
        np.testing.assert_allclose(runs[0][0], log, rtol=2e-3)
        assert_equal_weights(runs[0][1], model, rtol=1e-3, atol=2e-5)
    for loss, _, task, kd in runs[0][0]:
        assert loss == pytest.approx(0.5 * task + kd, rel=1e-3)


@pytest.mark.parametrize("settings", [{}, {"label_smoothing_factor": 0.1}], ids=["model", "label smoothing"])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_micro_batch_without_any_label_adds_nothing(training_arguments, kind, settings):
    """BERT's mean over no token is NaN, Llama divides by the number of labels that it is told; both must be 0."""
    models = (tiny.bert_tokens(0), tiny.bert_tokens(1, layers=3)) if kind == "bert" else (tiny.llama(0), tiny.llama(1))
    labelled = tiny.token_dataset(4)
    empty = tiny.text_dataset(4, seed=5).map(lambda row: {"labels": [-100] * len(row["input_ids"])})
    runs = []
    for rows, steps in (([*labelled, *empty], 2), ([*labelled], 1)):
        arguments = training_arguments(
            f"{steps}", per_device_train_batch_size=4, gradient_accumulation_steps=steps, max_steps=1, optim="sgd",
            learning_rate=0.1, **settings,
        )  # fmt: skip
        trainer = make_trainer(
            arguments, [TaskLoss(), LogitKD()], *copy.deepcopy(models), train_dataset=rows, eval_dataset=None,
            data_collator=DataCollatorForTokenClassification(tiny.tokenizer()),
        )  # fmt: skip
        trainer._get_train_sampler = lambda *_, rows=rows: torch.utils.data.SequentialSampler(rows)
        trainer.train()
        runs.append((losses(trainer, "loss", "grad_norm", "task_loss", "logit_kd"), trainer.model))
    assert np.isfinite(runs[0][0]).all()
    np.testing.assert_allclose(runs[0][0], runs[1][0], rtol=1e-3)
    assert_equal_weights(runs[0][1], runs[1][1], rtol=1e-3, atol=1e-5)


def test_a_window_without_any_label_is_finite_and_changes_nothing(training_arguments):
    empty = tiny.text_dataset(8).map(lambda row: {"labels": [-100] * len(row["input_ids"])}, remove_columns="labels")
    student = tiny.bert_tokens(0)
    before = weights(student)
    trainer = make_trainer(
        training_arguments(max_steps=1, optim="sgd"), [TaskLoss(), LogitKD()], student, tiny.bert_tokens(1),
        train_dataset=empty, eval_dataset=None, data_collator=DataCollatorForTokenClassification(tiny.tokenizer()),
    )  # fmt: skip
    trainer.train()
    assert losses(trainer, "loss", "grad_norm", "task_loss", "logit_kd") == [[0.0] * 4]
    assert all(torch.equal(before[key], value) for key, value in weights(student).items())


# ---------------------------------------------------------------------- callbacks


class Recorder(TrainerCallback):
    """Writes down every event with the step at which it came."""

    def __init__(self):
        self.events = []

    def __getattribute__(self, name):
        if not name.startswith("on_"):
            return super().__getattribute__(name)
        return lambda args, state, control, **kwargs: self.events.append((name, state.global_step))


def test_callbacks_see_the_events_of_trainer_in_its_order(training_arguments):
    runs = []
    for cls in (Trainer, DistillationTrainer):
        arguments = training_arguments(
            max_steps=3, gradient_accumulation_steps=2, per_device_train_batch_size=4, eval_strategy="steps",
            eval_steps=2, save_strategy="steps", save_steps=2, disable_tqdm=False, load_best_model_at_end=True,
        )  # fmt: skip
        recorder, late = Recorder(), Recorder()
        trainer = make_trainer(arguments, ALL_TERMS["sum"], cls=cls, callbacks=[recorder, EarlyStoppingCallback(9)])
        trainer.add_callback(late)
        trainer.train()
        order = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
        runs.append((recorder.events, late.events, order))
    assert runs[0] == runs[1]
    assert ("on_substep_end", 0) in runs[1][0]
    assert runs[1][0][0] == ("on_init_end", 0)
    assert runs[1][1][0] == ("on_train_begin", 0)


def test_early_stopping_stops_where_trainer_stops(training_arguments):
    steps = []
    for cls in (Trainer, DistillationTrainer):
        scores = iter([5, 4, 6, 6, 3, 2, 1])
        arguments = training_arguments(
            max_steps=7, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
            load_best_model_at_end=True, metric_for_best_model="score", greater_is_better=False,
        )  # fmt: skip
        trainer = make_trainer(
            arguments, ALL_TERMS["sum"], cls=cls, compute_metrics=lambda _, scores=scores: {"score": next(scores)},
            callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
        )  # fmt: skip
        trainer.train()
        steps.append((trainer.state.global_step, Path(trainer.state.best_model_checkpoint).name))
    assert steps == [(4, "checkpoint-2")] * 2


@pytest.mark.parametrize("late", [False, True], ids=["constructor", "add_callback"])
def test_callbacks_restored_from_a_checkpoint_go_on_exactly(training_arguments, late):
    def run(folder, stop=None, resume=None):
        arguments = training_arguments(
            folder, max_steps=6, save_strategy="steps", save_steps=3, logging_steps=2, learning_rate=0.01,
            restore_callback_states_from_checkpoint=True,
        )  # fmt: skip
        callbacks = [QATCallback(QuantizationSpec()), PruningCallback(PruningSpec(sparsity=0.6, begin=0.1, end=0.9))]
        student = tiny.bert(0, hidden_dropout_prob=0.1)
        trainer = make_trainer(arguments, ALL_TERMS["sum"], student, callbacks=None if late else callbacks)
        for callback in (callbacks if late else []) + ([StopAt(stop)] if stop else []):
            trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run("whole")
    # Stopping early prunes to the end; the checkpoint of the third step was written before.
    run("cut", stop=3)
    again = run("cut", resume=True)
    assert_equal_weights(whole.model, again.model)
    assert whole.model.config.hfkdq == again.model.config.hfkdq
    names = ("loss", "grad_norm", "logit_kd", "hidden_state_kd")
    assert losses(whole, *names) == losses(again, *names)


# ---------------------------------------------------------------------- optimizers


def given_optimizer(student, lr=0.1):
    decayed = [p for p in student.parameters() if p.dim() > 1]
    rest = [p for p in student.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": rest}], lr=lr * 0.1)
    return optimizer, LambdaLR(optimizer, lambda step: 1 / (1 + step))


def test_an_optimizer_of_the_users_is_stepped_as_by_trainer(training_arguments):
    runs = []
    for cls in (Trainer, DistillationTrainer):
        student = tiny.bert(0)
        optimizer, schedule = given_optimizer(student)
        trainer = make_trainer(
            training_arguments(max_steps=4), SILENT, student, cls=cls, optimizers=(optimizer, schedule)
        )
        trainer.train()
        assert trainer.optimizer.optimizer is optimizer
        runs.append((losses(trainer, "loss", "learning_rate"), [group["lr"] for group in optimizer.param_groups]))
    np.testing.assert_allclose(runs[0][0], runs[1][0], rtol=2e-3)
    assert runs[0][1] == runs[1][1]


def test_projections_are_trained_by_an_optimizer_that_the_user_made_before_them(training_arguments):
    """They do not exist yet when the user collects the parameters; untrained, the student would chase noise."""

    def run(folder, resume=None):
        student = tiny.bert(0)
        trainer = make_trainer(
            training_arguments(folder, max_steps=4, save_strategy="steps", save_steps=2), [HiddenStateKD()], student,
            optimizers=given_optimizer(student),
        )  # fmt: skip
        before = weights(trainer._distillation.projections.maps)
        trainer.train(resume_from_checkpoint=resume)
        after = weights(trainer._distillation.projections.maps)
        assert all(not torch.equal(before[key], after[key]) for key in before)
        assert len(trainer.optimizer.param_groups) == 2
        return trainer

    whole = run("out")
    again = run("out", resume=str(Path(whole.args.output_dir, "checkpoint-2")))
    assert_equal_weights(whole._distillation.projections.maps, again._distillation.projections.maps)
    assert_equal_weights(whole.model, again.model)
    parameters = [id(p) for group in whole.optimizer.param_groups for p in group["params"]]
    whole.train()
    assert len(parameters) == len(set(parameters))
    assert [id(p) for group in whole.optimizer.param_groups for p in group["params"]] == parameters


def test_the_class_of_an_optimizer_trains_projections_too(training_arguments):
    trainer = make_trainer(
        training_arguments(max_steps=2), [HiddenStateKD()], optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.1})
    )
    before = weights(trainer._distillation.projections.maps)
    trainer.train()
    assert all(
        not torch.equal(before[key], value) for key, value in weights(trainer._distillation.projections.maps).items()
    )


# ---------------------------------------------------------------------- more than one training


@pytest.mark.parametrize("between", ["nothing", "evaluate", "free_memory"])
def test_training_twice_is_what_it_is_for_trainer(training_arguments, between):
    runs = []
    for cls in (Trainer, DistillationTrainer):
        student = tiny.bert(0, hidden_dropout_prob=0.1)
        trainer = make_trainer(training_arguments(max_steps=3), SILENT, student, cls=cls)
        if between == "evaluate":
            trainer.evaluate()
        trainer.train()
        if between == "evaluate":
            trainer.evaluate()
        elif between == "free_memory":
            trainer.accelerator.free_memory()
            gc.collect()
        trainer.train()
        runs.append((as_plain(history(trainer)), trainer.model, trainer.evaluate()["eval_loss"]))
    (plain, plain_model, plain_loss), (ours, our_model, our_loss) = runs
    assert [row.keys() for row in plain] == [row.keys() for row in ours]
    np.testing.assert_allclose(
        [row["loss"] for row in plain if "loss" in row], [row["loss"] for row in ours if "loss" in row], rtol=1e-3
    )
    # AdamW makes signs of the smallest gradients, and so steps, of differences in rounding.
    assert_equal_weights(plain_model, our_model, rtol=1e-2, atol=2e-3)
    assert our_loss == pytest.approx(plain_loss, rel=1e-2)


def test_trainers_that_share_teacher_and_objectives_do_not_know_of_each_other(training_arguments):
    """One student is as wide as the teacher, so that it needs no projections where the other does."""
    objectives = [TaskLoss(weight=0.5), LogitKD(), HiddenStateKD()]

    def run(pairs):
        trainers = []
        for hidden, (teacher, terms) in zip((32, 48), pairs, strict=True):
            student = tiny.bert(0, hidden=hidden, hidden_dropout_prob=0.1)
            trainers.append(make_trainer(training_arguments(f"{hidden}", max_steps=3), terms, student, teacher))
        for trainer in trainers:
            trainer.train()
        return trainers

    teacher = teacher_of()
    alone = run([(copy.deepcopy(teacher), copy.deepcopy(objectives)) for _ in range(2)])
    shared = run([(teacher, objectives)] * 2)
    for one, other in zip(alone, shared, strict=True):
        assert losses(one, "loss", "logit_kd", "hidden_state_kd") == losses(
            other, "loss", "logit_kd", "hidden_state_kd"
        )
        assert_equal_weights(one.model, other.model)


def test_a_second_trainer_of_the_same_student_leaves_the_first_its_own(training_arguments):
    def make(student, teacher):
        return make_trainer(training_arguments(max_steps=2), [LogitKD(), HiddenStateKD()], student, teacher)

    alone = make(tiny.bert(0), teacher_of())
    alone.train()
    student = tiny.bert(0)
    names = [name for name, _ in student.named_parameters()]
    first = make(student, teacher_of())
    second = make(student, tiny.bert(1, layers=3, hidden=64))
    first.train()
    assert losses(first, "loss") == losses(alone, "loss")
    assert_equal_weights(first.model, alone.model)

    fresh = make(copy.deepcopy(student), tiny.bert(1, layers=3, hidden=64))
    fresh._distillation.projections.maps.load_state_dict(second._distillation.projections.maps.state_dict())
    second.train()
    fresh.train()
    assert losses(second, "loss") == losses(fresh, "loss")
    assert_equal_weights(second.model, fresh.model)
    assert [name for name, _ in student.named_parameters()] == names
    assert len(student._forward_hooks) == 0


# ---------------------------------------------------------------------- bad input


class TupleModel(tiny.BertForSequenceClassification):
    """Returns tuples whatever it is asked for."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, return_dict=None):
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels).to_tuple()


def test_a_student_that_names_no_outputs_is_refused(training_arguments):
    student = TupleModel(tiny.bert_config())
    with pytest.raises(ValueError, match="student TupleModel gives no logits"):
        make_trainer(training_arguments(), [LogitKD()], student)
    trainer = make_trainer(training_arguments(max_steps=1), [TaskLoss()], student, teacher=None)
    with pytest.raises(TypeError, match="TupleModel returned tuple in training"):
        trainer.train()


def test_a_student_that_shares_a_layer_with_its_teacher_is_refused(training_arguments):
    student, teacher = tiny.bert(0), tiny.bert(1)
    student.bert.embeddings = teacher.bert.embeddings
    with pytest.raises(ValueError, match=r"shares its parameters.*copy\.deepcopy"):
        make_trainer(training_arguments(), [LogitKD()], student, teacher)
    assert all(p.requires_grad for p in teacher.parameters())
    # What is frozen in the student may be shared: nobody trains it.
    student.bert.embeddings.requires_grad_(False)
    make_trainer(training_arguments(max_steps=1), [LogitKD()], student, teacher).train()


def test_a_teacher_in_the_student_is_refused(training_arguments):
    student, teacher = tiny.bert(0), tiny.bert(1)
    student.teacher = teacher
    with pytest.raises(ValueError, match="shares its parameters"):
        make_trainer(training_arguments(), [LogitKD()], student, teacher)


def test_a_student_that_is_no_transformers_model_is_refused(training_arguments):
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, input_ids, labels=None):
            return {"loss": self.scale * input_ids.sum()}

    with pytest.raises(TypeError, match="the student is a Linear"):
        make_trainer(training_arguments(), [LogitKD()], torch.nn.Linear(2, 2))
    with pytest.raises((TypeError, ValueError), match=r"Module.* logits"):
        make_trainer(training_arguments(), [LogitKD()], Module()).train()


def test_data_parallelism_within_a_process_is_refused(training_arguments):
    arguments = training_arguments()
    arguments._n_gpu = 2
    with pytest.raises(NotImplementedError, match=r"DataParallel over 2 GPUs.*accelerate launch"):
        make_trainer(arguments, [LogitKD()])
