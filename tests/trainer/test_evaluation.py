# SPDX-License-Identifier: Apache-2.0
"""What a trainer with a teacher measures, predicts and keeps is what the plain `Trainer` would."""

import copy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import DatasetDict
from safetensors.torch import load_file
from transformers import DataCollatorWithPadding, PretrainedConfig, PreTrainedModel, Trainer

from hfkdq.losses import forward_kl
from hfkdq.objectives import HiddenStateKD, LogitKD, TaskLoss
from hfkdq.pruning import PruningCallback
from hfkdq.quantization import QATCallback
from hfkdq.quantization.records import quantizer_states, recorded_quantization, weights_digest
from hfkdq.specs import PruningSpec, QuantizationSpec
from hfkdq.trainer import DistillationTrainer
from tests import tiny

from .common import ALL_TERMS, assert_equal_weights, losses, make_trainer, teacher_of

KD = [TaskLoss(weight=0.5), LogitKD(), HiddenStateKD()]


def history(trainer, *leave_out):
    """The log history without what a clock measured."""
    clocked = ("runtime", "per_second", *leave_out)
    return [{k: v for k, v in row.items() if not k.endswith(clocked)} for row in trainer.state.log_history]


def without_times(metrics):
    return {key: value for key, value in metrics.items() if not key.endswith(("time", "per_second"))}


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def assert_same_arrays(one, other):
    """Equal trees of arrays: tuples and lists of the same form, with the same bits."""
    assert type(one) is type(other)
    if isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same_arrays(a, b)
    elif one is not None:
        np.testing.assert_array_equal(one, other)


# ---------------------------------------------------------------------- without a teacher


@pytest.mark.parametrize(
    ("settings", "dev_sets"),
    [
        (dict(label_smoothing_factor=0.1), None),
        (dict(metric_for_best_model="eval_b_loss"), DatasetDict),
        (dict(gradient_accumulation_steps=3, per_device_train_batch_size=2), None),
    ],
    ids=["label smoothing", "two dev sets", "accumulation"],
)
def test_without_a_teacher_logs_files_and_predictions_are_those_of_trainer(
    training_arguments, tmp_path, settings, dev_sets
):
    arguments = training_arguments(
        max_steps=4, save_steps=2, save_strategy="steps", eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, **settings
    )  # fmt: skip
    runs = []
    for cls in (Trainer, DistillationTrainer):
        kwargs = {"eval_dataset": dev_sets({k: tiny.text_dataset(10, seed=ord(k)) for k in "ab"})} if dev_sets else {}
        trainer = make_trainer(
            copy.deepcopy(arguments), student=tiny.bert(0, hidden_dropout_prob=0.2), teacher=None, cls=cls,
            compute_metrics=accuracy, **kwargs,
        )  # fmt: skip
        trainer.train()
        evaluated = without_times(trainer.evaluate())
        runs.append((trainer, evaluated, trainer.predict(tiny.text_dataset(6, seed=4))))
        if cls is Trainer:
            shutil.move(tmp_path / "out", tmp_path / "plain")
    (plain, *_), (ours, *_) = runs
    assert history(plain) == history(ours)
    assert runs[0][1] == runs[1][1]
    assert_same_arrays(runs[0][2].predictions, runs[1][2].predictions)
    assert without_times(runs[0][2].metrics) == without_times(runs[1][2].metrics)
    files = {path.relative_to(tmp_path / "plain") for path in (tmp_path / "plain").rglob("*") if path.is_file()}
    assert files == {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*") if path.is_file()}
    for file in files - {file for file in files if file.name == "trainer_state.json"}:
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "out" / file).read_bytes(), file


# ---------------------------------------------------------------------- with a teacher


@pytest.mark.parametrize(
    "settings",
    [
        dict(eval_accumulation_steps=1),
        dict(eval_do_concat_batches=False),
        dict(include_for_metrics=["inputs", "loss"]),
        dict(batch_eval_metrics=True),
        dict(preprocess=True),
        dict(prediction_loss_only=True),
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_metrics_are_computed_from_what_trainer_would_gather(training_arguments, settings):
    """The data holds a column for the teacher alone, which must not reach the metrics either."""
    dataset = tiny.text_dataset(10).map(lambda row: {"token_type_ids": [0] * len(row["input_ids"])})
    settings = dict(settings)
    first_two = settings.pop("preprocess", False)
    seen = {}

    def run(cls, objectives):
        calls = seen.setdefault(cls, [])

        def metrics(prediction, compute_result=None):
            calls.append([prediction.predictions, prediction.label_ids, prediction.inputs, prediction.losses])
            return {"rows": float(len(calls))} if compute_result is not False else {}

        trainer = make_trainer(
            training_arguments(per_device_eval_batch_size=4, **settings), objectives, tiny.distilbert(),
            tiny.bert(1, layers=4, hidden=48), cls=cls, eval_dataset=dataset, compute_metrics=metrics,
            preprocess_logits_for_metrics=(lambda logits, labels: logits[:, :2]) if first_two else None,
        )  # fmt: skip
        return without_times(trainer.evaluate())

    plain, ours = run(Trainer, None), run(DistillationTrainer, KD)
    assert plain == ours
    as_arrays = [
        [[np.asarray(x) if isinstance(x, torch.Tensor) else x for x in call] for call in seen[cls]]
        for cls in (Trainer, DistillationTrainer)
    ]
    assert_same_arrays(*as_arrays)
    assert seen[Trainer] or "prediction_loss_only" in settings


def test_evaluating_first_under_bf16_runs_the_student_in_bf16(training_arguments):
    """Trainer prepares the model it evaluates only where nothing was prepared before."""
    results = []
    for cls in (Trainer, DistillationTrainer):
        student, types = tiny.bert(0), []
        student.classifier.register_forward_pre_hook(lambda module, args, types=types: types.append(args[0].dtype))
        student.bert.pooler.dense.register_forward_hook(
            lambda module, args, output, types=types: types.append(output.dtype)
        )
        trainer = make_trainer(training_arguments(bf16=True), KD, student, cls=cls)
        types.clear()
        results.append((trainer.evaluate()["eval_loss"], types))
    assert results[0] == results[1]
    assert torch.bfloat16 in results[1][1]


def test_every_dev_set_has_its_prefix_and_one_decides_the_best_model(training_arguments, tmp_path):
    sets = {"a": tiny.text_dataset(10, seed=8), "b": tiny.text_dataset(12, seed=9)}
    arguments = training_arguments(
        max_steps=2, lr_scheduler_type="constant", eval_on_start=True, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        save_total_limit=1, load_best_model_at_end=True, metric_for_best_model="b_loss", learning_rate=0.05,
    )  # fmt: skip
    settings = dict(student=tiny.bert(0), eval_dataset=sets, compute_metrics=accuracy)
    plain = make_trainer(copy.deepcopy(arguments), cls=Trainer, **settings)
    untrained = without_times(plain.evaluate())
    ours = make_trainer(arguments, [LogitKD(), HiddenStateKD()], **settings)
    ours.train()

    rows = [row for row in history(ours) if "eval_a_loss" in row or "eval_b_loss" in row]
    assert {**rows[0], **rows[1]} == {**untrained, "step": 0, "epoch": 0}
    measured = {row["step"]: row["eval_b_loss"] for row in rows if "eval_b_loss" in row}
    best = min(set(measured) - {0}, key=measured.get)
    assert best != max(measured), "the last model must not be the best one, or there is nothing to bring back"
    kept = {path.name for path in (tmp_path / "out").glob("checkpoint-*")}
    assert kept == {Path(ours.state.best_model_checkpoint).name} == {f"checkpoint-{best}"}
    assert ours.evaluate()["eval_b_loss"] == measured[best]
    predicted = ours.predict(sets["b"], metric_key_prefix="held_out")
    assert predicted.metrics["held_out_loss"] == measured[best]
    assert_same_arrays(predicted.predictions, plain_predictions(ours, training_arguments, sets["b"]))


def plain_predictions(trainer, training_arguments, dataset, **kwargs):
    return make_trainer(training_arguments("check"), student=trainer.model, cls=Trainer).predict(dataset, **kwargs)[0]


def test_outputs_asked_for_or_ignored_are_those_of_trainer(training_arguments):
    """A user who wants hidden states in the predictions gets them, and can leave them out again."""
    dataset, predictions = tiny.text_dataset(6), {}
    dataset = dataset.filter(lambda row: len(row["input_ids"]) >= 0).map(
        lambda row: {"input_ids": row["input_ids"][:4], "attention_mask": [1] * 4}
    )
    for cls in (Trainer, DistillationTrainer):
        trainer = make_trainer(
            training_arguments(), KD, tiny.bert(0, output_hidden_states=True), cls=cls, eval_dataset=dataset
        )
        predictions[cls] = [
            trainer.predict(dataset).predictions,
            trainer.predict(dataset, ignore_keys=["hidden_states"]).predictions,
        ]
    assert_same_arrays(predictions[Trainer], predictions[DistillationTrainer])
    assert isinstance(predictions[DistillationTrainer][0], tuple)
    assert isinstance(predictions[DistillationTrainer][1], np.ndarray)


def test_evaluation_amid_training_sees_nothing_of_the_objectives(training_arguments):
    gathered = []

    def metrics(prediction):
        gathered.append(prediction.predictions)
        return {}

    trainer = make_trainer(
        training_arguments(max_steps=2, eval_strategy="steps", eval_steps=1), ALL_TERMS["sum"], compute_metrics=metrics
    )
    trainer.train()
    assert [type(array) for array in gathered] == [np.ndarray] * 2
    assert gathered[-1].shape == (10, 3)
    rows = [row for row in trainer.state.log_history if "eval_loss" in row]
    assert not any("kd" in key for row in rows for key in row)
    assert_same_arrays(gathered[-1], plain_predictions(trainer, training_arguments, trainer.eval_dataset))


def test_data_without_labels_is_evaluated_and_predicted_as_by_trainer(training_arguments):
    unlabelled = tiny.text_dataset(10).remove_columns("labels")
    runs = []
    for cls in (Trainer, DistillationTrainer):
        trainer = make_trainer(training_arguments(), [LogitKD()], cls=cls, eval_dataset=unlabelled)
        predicted = trainer.predict(unlabelled)
        assert predicted.label_ids is None
        runs.append((without_times(trainer.evaluate()), predicted.predictions))
    assert runs[0][0] == runs[1][0]
    assert_same_arrays(runs[0][1], runs[1][1])


def test_tokens_without_labels_are_weighted_by_what_is_attended_to(training_arguments):
    """Pure distillation of a language model: accumulation must weight uneven micro batches by their tokens."""
    logs, models = [], []
    for size, steps in ((16, 1), (4, 4)):
        arguments = training_arguments(
            f"{size}", per_device_train_batch_size=size, gradient_accumulation_steps=steps, max_steps=3, optim="sgd"
        )
        trainer = make_trainer(
            arguments, [LogitKD()], tiny.llama(0), tiny.llama(1, layers=4), eval_dataset=None,
            train_dataset=tiny.text_dataset().remove_columns("labels"),
            data_collator=DataCollatorWithPadding(tiny.tokenizer()),
        )  # fmt: skip
        trainer.train()
        logs.append(losses(trainer, "loss", "grad_norm", "logit_kd"))
        models.append(trainer.model)
    np.testing.assert_allclose(*logs, rtol=1e-3)
    assert_equal_weights(*models, rtol=1e-3, atol=2e-5)


def test_a_task_loss_without_labels_fails_as_trainer_does(training_arguments):
    dataset = tiny.text_dataset().remove_columns("labels")
    for cls in (Trainer, DistillationTrainer):
        trainer = make_trainer(training_arguments(), [TaskLoss(), LogitKD()], cls=cls, train_dataset=dataset)
        with pytest.raises(ValueError, match="did not return a loss"):
            trainer.train()


# ---------------------------------------------------------------------- models that return other things


class DictConfig(PretrainedConfig):
    model_type = "tests_dict"

    def __init__(self, width=16, **kwargs):
        self.vocab_size, self.width = len(tiny.VOCABULARY), width
        super().__init__(**kwargs)


class DictModel(PreTrainedModel):
    """A model of the user's own: a plain dict comes back, and its forward pass takes nothing but tensors."""

    config_class = DictConfig
    main_input_name = "input_ids"

    def __init__(self, config):
        super().__init__(config)
        self.embed = torch.nn.Embedding(config.vocab_size, config.width)
        self.head = torch.nn.Linear(config.width, config.num_labels)
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, (torch.nn.Embedding, torch.nn.Linear)):
            torch.nn.init.normal_(module.weight, std=0.5)

    def forward(self, input_ids, attention_mask=None, labels=None):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        pooled = (self.embed(input_ids) * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        output = {"logits": self.head(pooled), "pooled": pooled}
        if labels is not None:
            output = {"loss": torch.nn.functional.cross_entropy(output["logits"], labels), **output}
        return output


def dict_model(seed, width=16):
    torch.manual_seed(seed)
    return DictModel(DictConfig(width=width, num_labels=3))


def test_models_that_return_a_plain_dict_are_student_and_teacher(training_arguments):
    student, teacher = dict_model(0), dict_model(1, width=24)
    batch = DataCollatorWithPadding(tiny.tokenizer())(list(tiny.text_dataset(8)))
    with torch.no_grad():
        outputs = student(**batch), teacher(**batch)
    distance = forward_kl(outputs[0]["logits"], outputs[1]["logits"], 2.0).mean()
    shapes = []

    def metrics(prediction):
        shapes.append([array.shape for array in prediction.predictions])
        return {}

    trainer = make_trainer(
        training_arguments(max_steps=2), [TaskLoss(weight=0.5), LogitKD()], student, teacher,
        train_dataset=tiny.text_dataset(8), compute_metrics=metrics,
    )  # fmt: skip
    trainer.train()
    first, second = losses(trainer, "task_loss", "logit_kd", "loss")
    assert first[:2] == pytest.approx([outputs[0]["loss"].item(), distance.item()], rel=1e-4)
    assert second[2] < first[2]
    ours = trainer.evaluate()
    assert shapes == [[(10, 3), (10, 16)]], "both outputs of the student reach compute_metrics"
    assert (
        ours["eval_loss"] == make_trainer(training_arguments(), student=student, cls=Trainer).evaluate()["eval_loss"]
    )


def test_plain_dict_and_model_output_learn_from_each_other(training_arguments):
    for student, teacher in ((dict_model(0), teacher_of()), (tiny.bert(0), dict_model(1))):
        trainer = make_trainer(
            training_arguments(max_steps=12, learning_rate=0.02, label_names=["labels"]), [LogitKD()], student, teacher,
            train_dataset=tiny.text_dataset(8),
        )  # fmt: skip
        trainer.train()
        first, *_, last = losses(trainer, "logit_kd")
        assert last[0] < 0.5 * first[0]


def test_a_configuration_that_asks_for_tuples_changes_nothing(training_arguments):
    """In training objectives read names; in evaluation the user gets the tuples that Trainer unpacks."""
    runs = []
    for returns in (True, False):
        student, teacher = tiny.bert(0), teacher_of()
        student.config.return_dict = teacher.config.return_dict = returns
        trainer = make_trainer(training_arguments(max_steps=2), ALL_TERMS["sum"], student, teacher)
        trainer.train()
        assert trainer.model.config.return_dict is returns
        runs.append((trainer, trainer.evaluate()["eval_loss"], trainer.predict(trainer.eval_dataset).predictions))
    assert losses(runs[0][0], "loss", "grad_norm") == losses(runs[1][0], "loss", "grad_norm")
    assert_equal_weights(runs[0][0].model, runs[1][0].model)
    assert runs[0][1] == runs[1][1]
    assert_same_arrays(runs[0][2], runs[1][2])


# ---------------------------------------------------------------------- steps called by the user


def expected_loss(model, teacher, batch):
    model.train()
    ours, theirs = model(**batch), teacher(**{k: v for k, v in batch.items() if k != "labels"})
    return 0.5 * ours.loss + forward_kl(ours.logits, theirs.logits, 2.0).mean()


@pytest.mark.parametrize("steps", [1, 4])
def test_a_training_step_called_by_the_user_is_the_loss_of_its_batch(training_arguments, steps):
    student, teacher = tiny.bert(0), teacher_of()
    batch = dict(DataCollatorWithPadding(tiny.tokenizer())(list(tiny.text_dataset(8))))
    trainer = make_trainer(
        training_arguments(max_steps=2, gradient_accumulation_steps=steps), [TaskLoss(weight=0.5), LogitKD()], student,
        teacher, train_dataset=tiny.text_dataset(32),
    )  # fmt: skip
    trainer.train()
    student.zero_grad()
    expected = expected_loss(student, teacher, batch)
    expected.backward()
    gradient = student.classifier.weight.grad.clone()
    student.zero_grad()
    loss = trainer.training_step(student, dict(batch))
    # As Trainer, the returned loss is divided by the accumulation steps that it would be summed over.
    torch.testing.assert_close(loss.float(), expected.detach())
    torch.testing.assert_close(student.classifier.weight.grad, gradient, rtol=1e-4, atol=1e-6)


def test_a_training_step_after_training_has_its_projections_and_leaves_none(training_arguments):
    trainer = make_trainer(
        training_arguments(max_steps=1, learning_rate=0), [HiddenStateKD()], train_dataset=tiny.text_dataset(8)
    )
    trainer.train()
    modules = dict(trainer.model.named_modules()).keys()
    batch = next(iter(trainer.get_train_dataloader()))
    assert trainer.training_step(trainer.model, batch).item() == pytest.approx(losses(trainer, "loss")[0][0], rel=1e-4)
    assert dict(trainer.model.named_modules()).keys() == modules


def test_a_loss_computed_by_the_user_is_that_of_trainer(training_arguments):
    batch = dict(DataCollatorWithPadding(tiny.tokenizer())(list(tiny.text_dataset(8))))
    values = []
    for cls in (Trainer, DistillationTrainer):
        trainer = make_trainer(training_arguments(), KD, cls=cls)
        loss, outputs = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
        values.append((loss, trainer.compute_loss(trainer.model, dict(batch)), outputs.logits, list(outputs)))
    for plain, ours in zip(*values, strict=True):
        assert plain == ours if isinstance(plain, list) else torch.equal(plain, ours)


# ---------------------------------------------------------------------- the best model


def test_the_best_model_of_pruned_and_quantized_distillation_is_whole(training_arguments):
    """Of the models that are fully pruned the best comes back, with the ranges that were saved beside it."""
    worse = iter(range(100))
    arguments = training_arguments(
        max_steps=8, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, save_total_limit=1,
        load_best_model_at_end=True, metric_for_best_model="score", greater_is_better=False, learning_rate=0.01,
    )  # fmt: skip
    trainer = make_trainer(
        arguments, ALL_TERMS["sum"], compute_metrics=lambda _: {"score": float(next(worse))},
        callbacks=[PruningCallback(PruningSpec(sparsity=0.6, begin=0.2, end=0.6)), QATCallback(QuantizationSpec())],
    )  # fmt: skip
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-5"
    saved = load_file(best / "model.safetensors")
    assert all(torch.equal(saved[key], value) for key, value in trainer.model.state_dict().items())
    weight = trainer.model.bert.encoder.layer[0].intermediate.dense.weight
    assert (weight == 0).float().mean().item() == pytest.approx(0.6, abs=0.01)
    then = recorded_quantization(type(trainer.model.config).from_pretrained(best))[1]
    now = recorded_quantization(trainer.model.config)[1]
    # A training that goes on does not hash its weights; what it made at its end names those that it has.
    assert then == {key: value for key, value in now.items() if key != "digest"}
    assert now["digest"] == weights_digest(trainer.model)
    assert "left_in_float" not in now  # the projections of the objectives are none of the model's weights
    assert quantizer_states(trainer.model)
