# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch
from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

from hfkdq.losses import attention_kl, forward_kl, mean_squared_error
from hfkdq.objectives import (
    AttentionKD,
    HiddenStateKD,
    LogitKD,
    NoisyKD,
    Objective,
    TaskLoss,
    TrainingStep,
    as_objective,
)
from hfkdq.objectives.layers import layer_map
from hfkdq.objectives.projections import Projections
from hfkdq.schedules import Linear

from . import tiny


def outputs(student, teacher, batch, **request):
    return student(**batch, **request), teacher(**batch, **request)


def test_logit_kd_is_the_mean_over_examples():
    student, teacher, batch = tiny.bert(0), tiny.bert(1), tiny.batch(tiny.bert(0))
    objective = LogitKD(temperature=3.0)
    objective.attach(student, teacher)
    out = outputs(student, teacher, batch)
    mean = objective(*out, batch)
    count = objective.positions(batch)
    torch.testing.assert_close(mean, forward_kl(out[0].logits, out[1].logits, 3.0).mean())
    assert count == objective.positions(batch) == 4


def test_token_logits_count_labelled_tokens_only():
    student, teacher = tiny.bert_tokens(0), tiny.bert_tokens(1)
    batch = tiny.batch(student)
    labels = torch.where(batch["attention_mask"].bool(), 1, -100)
    labels[0, :5] = -100
    objective = LogitKD()
    objective.attach(student, teacher)
    out = outputs(student, teacher, batch)
    mean = objective(*out, {**batch, "labels": labels})
    count = objective.positions({**batch, "labels": labels})
    divergence = forward_kl(out[0].logits, out[1].logits, 2.0)
    torch.testing.assert_close(mean, divergence[labels != -100].mean())
    assert count == (labels != -100).sum()
    without_labels = objective(*out, batch)
    count = objective.positions(batch)
    torch.testing.assert_close(without_labels, divergence[batch["attention_mask"] == 1].mean())
    assert count == batch["attention_mask"].sum()


def test_causal_logits_are_compared_where_the_next_token_is_a_label():
    student, teacher = tiny.llama(0), tiny.llama(1)
    batch = tiny.batch(student)
    labels = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
    objective, task = LogitKD(temperature=1.0), TaskLoss()
    objective.attach(student, teacher)
    task.attach(student, teacher)
    out = outputs(student, teacher, batch)
    mean = objective(*out, {**batch, "labels": labels})
    count = objective.positions({**batch, "labels": labels})
    divergence = forward_kl(out[0].logits[:, :-1], out[1].logits[:, :-1])
    torch.testing.assert_close(mean, divergence[labels[:, 1:] != -100].mean())
    assert count == (labels[:, 1:] != -100).sum() == task.positions({"labels": labels})


def test_hidden_states_follow_the_copied_layers_and_ignore_padding():
    student, teacher = tiny.bert(0, layers=2), tiny.bert(1, layers=4)
    student.config.hfkdq = {"student": {"teacher_layers": 4, "layers": [1, 4]}}
    batch = tiny.batch(student)
    objective = HiddenStateKD()
    objective.attach(student, teacher)
    out = outputs(student, teacher, batch, output_hidden_states=True)
    mean = objective(*out, batch)
    count = objective.positions(batch)
    valid = batch["attention_mask"] == 1
    pairs = [(1, 1), (2, 4)]
    by_hand = [mean_squared_error(out[0].hidden_states[s], out[1].hidden_states[t])[valid].mean() for s, t in pairs]
    torch.testing.assert_close(mean, torch.stack(by_hand).mean())
    assert count == valid.sum()
    padded = {**batch, "input_ids": batch["input_ids"].masked_fill(~valid, 7)}
    again = objective(*outputs(student, teacher, padded, output_hidden_states=True), padded)
    torch.testing.assert_close(again, mean)


def test_projections_ride_in_the_student_and_leave_no_trace():
    student, teacher = tiny.bert(0), tiny.bert(1, hidden=48)
    keys, state = set(student.state_dict()), torch.get_rng_state()
    objective = HiddenStateKD()
    objective.attach(student, teacher)
    assert torch.equal(torch.get_rng_state(), state)
    assert set(student.state_dict()) == keys
    projections = getattr(student, Projections.NAME)
    assert len(list(projections.parameters())) == 4  # two layers, weight and bias
    assert student.load_state_dict(student.state_dict(), strict=True).missing_keys == []
    batch = tiny.batch(student)
    student.train()
    out = outputs(student, teacher, batch, output_hidden_states=True)
    objective(*out, batch).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in projections.parameters())
    student.eval()
    assert len(student(**batch, output_hidden_states=True).hidden_states) == 3
    projections.remove(student)
    assert not hasattr(student, Projections.NAME)
    assert len(student.train()(**batch, output_hidden_states=True).hidden_states) == 3


def test_attentions_are_compared_head_by_head():
    student, teacher = tiny.vit(0, layers=2), tiny.vit(1, layers=4)
    objective = AttentionKD(layers={2: 3})
    objective.attach(student, teacher)
    batch = tiny.batch(student)
    out = outputs(student, teacher, batch, output_attentions=True)
    mean = objective(*out, batch)
    count = objective.positions(batch)
    torch.testing.assert_close(mean, attention_kl(out[0].attentions[1], out[1].attentions[2]).mean())
    assert count == 4


@pytest.mark.parametrize(
    ("layers", "expected"),
    [(None, {1: 2, 2: 4, 3: 6}), ("uniform", {1: 2, 2: 4, 3: 6}), ({1: 5}, {1: 5}), ({0: 0, 3: 6}, {0: 0, 3: 6})],
)
def test_layer_maps(layers, expected):
    assert layer_map(layers, tiny.bert(), 3, 6) == expected


@pytest.mark.parametrize("layers", [{4: 1}, {1: 7}, {}, "sideways", {-1: 1}])
def test_layer_maps_out_of_range_are_refused(layers):
    with pytest.raises(ValueError, match="layers="):
        layer_map(layers, tiny.bert(), 3, 6)


def renamed(model, names):
    model.config.id2label = dict(enumerate(names))
    return model


@pytest.mark.parametrize(
    ("objective", "student", "teacher", "message"),
    [
        (LogitKD(), lambda: tiny.bert(labels=3), lambda: tiny.bert(labels=4), "same labels or vocabulary"),
        (LogitKD(), lambda: tiny.llama(vocab=95), lambda: tiny.llama(vocab=96), "same labels or vocabulary"),
        (
            LogitKD(),
            lambda: renamed(tiny.bert(), "abc"),
            lambda: renamed(tiny.bert(), "acb"),
            "another order or under other names",
        ),
        (LogitKD(), lambda: tiny.bert(labels=1), lambda: tiny.bert(labels=1), "regression"),
        (
            LogitKD(),
            lambda: tiny.bert(problem_type="multi_label_classification"),
            tiny.bert,
            "gives several labels at once and BertForSequenceClassification gives a class per example",
        ),
        (HiddenStateKD(layers={3: 1}), tiny.bert, tiny.bert, "out of range"),
        (AttentionKD(layers={1: 9}), tiny.bert, tiny.bert, "out of range"),
        (AttentionKD(layers={0: 0}), tiny.bert, tiny.bert, "embeddings"),
        (AttentionKD(), tiny.bert, tiny.vit, "position with position"),
    ],
)
def test_pairs_that_do_not_fit_are_refused_at_attach(objective, student, teacher, message):
    with pytest.raises(ValueError, match=message):
        objective.attach(student(), teacher())


def wav2vec2(layerdrop):
    config = Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, conv_dim=(16, 16),
        conv_stride=(20, 10), conv_kernel=(20, 10), num_feat_extract_layers=2, num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4, layerdrop=layerdrop, num_labels=3, classifier_proj_size=16, vocab_size=32,
    )  # fmt: skip
    return Wav2Vec2ForSequenceClassification(config)


@pytest.mark.parametrize("objective", [HiddenStateKD(), AttentionKD()])
def test_a_student_that_drops_layers_at_random_is_refused_where_layers_are_compared(objective):
    with pytest.raises(ValueError, match="drops layers at random"):
        objective.attach(wav2vec2(0.1), wav2vec2(0.1))
    student = wav2vec2(0.1)
    student.config.layerdrop = 0
    objective.attach(student, wav2vec2(0.1))
    torch.manual_seed(0)
    for _ in range(20):  # none of its layers is dropped any more
        states = student.train()(torch.randn(1, 4000), output_hidden_states=True).hidden_states
        assert len({state.data_ptr() for state in states}) == 3


class _NoAttentions(tiny.BertForSequenceClassification):
    """A model whose attention implementation computes no probabilities."""

    def set_attn_implementation(self, implementation):
        raise ValueError(f"{implementation} is not supported")

    def forward(self, *args, output_attentions=None, **kwargs):
        return super().forward(*args, **kwargs)


def test_attentions_asked_of_a_model_that_has_none():
    model = _NoAttentions(tiny.bert_config())
    with pytest.raises(ValueError, match="gives no attention"):
        AttentionKD().attach(model, tiny.bert())


@pytest.mark.parametrize(
    "make",
    [
        lambda: LogitKD(temperature=0),
        lambda: LogitKD(temperature=-1.0),
        lambda: LogitKD(temperature=Linear(2, 0)),
        lambda: TaskLoss(weight=-1),
        lambda: HiddenStateKD(weight=Linear(1, -1)),
    ],
)
def test_impossible_hyper_parameters_are_refused(make):
    with pytest.raises(ValueError, match=r"temperature|weight"):
        make()


def test_float_labels_are_refused_by_logit_kd():
    objective = LogitKD()
    objective.attach(tiny.bert(), tiny.bert(1))
    out = SequenceClassifierOutput(logits=torch.zeros(2, 3))
    with pytest.raises(ValueError, match="regression or several"):
        objective(out, out, {"labels": torch.zeros(2, 3)})


def test_objectives_are_values():
    assert LogitKD(temperature=2.0) == LogitKD() != LogitKD(temperature=3.0)
    with pytest.raises(AttributeError):
        LogitKD().temperature = 5
    assert copy.deepcopy(HiddenStateKD(layers={1: 2})) == HiddenStateKD(layers={1: 2})
    settings = {"weight": 1.0, "divergence": "forward_kl", "temperature": 2.0, "per": "token"}
    assert LogitKD().describe() == {"name": "LogitKD", **settings}
    assert "Linear" in LogitKD(weight=Linear(0, 1)).describe()["weight"]


def test_schedules_follow_progress():
    objective = LogitKD(temperature=Linear(1, 3))
    student, teacher, batch = tiny.bert(0), tiny.bert(1), tiny.batch(tiny.bert(0))
    objective.attach(student, teacher)
    out = outputs(student, teacher, batch)
    found = objective(*out, batch, progress=0.5)
    torch.testing.assert_close(found, forward_kl(out[0].logits, out[1].logits, 2.0).mean())


def test_plain_callables_are_objectives():
    def distance(student_out, teacher_out, batch):
        return (student_out.logits - teacher_out.logits).abs().mean()

    objective = as_objective(distance)
    assert isinstance(objective, Objective)
    assert objective.name == "distance"
    out = SequenceClassifierOutput(logits=torch.ones(2, 3)), SequenceClassifierOutput(logits=torch.zeros(2, 3))
    batch = {"labels": torch.zeros(2)}
    assert (objective(*out, batch), objective.positions(batch)) == (torch.tensor(1.0), 2)
    for wrong in (LogitKD, 3, "kd"):
        with pytest.raises(TypeError, match="parentheses"):
            as_objective(wrong)


class Doubled(LogitKD):
    def __call__(self, student_out, teacher_out, batch):
        return 2 * super().__call__(student_out, teacher_out, batch)


class Deeper(Doubled):
    def loss(self, step):
        return 2 * super().loss(step)


class Early(LogitKD):
    def before(self, passes, batch):
        """As it was called."""


class Plain(Objective):
    def __call__(self, student_out, teacher_out, batch):
        return (student_out.logits - teacher_out.logits).abs().mean()


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (Doubled(), r"Doubled defines __call__ over the loss of LogitKD.* Define loss\(step\)"),
        (NoisyKD(objective=Doubled()), "Doubled defines __call__ over the loss of LogitKD"),
        (Early(), r"before is called run_forward\(passes, step\) now"),
    ],
)
def test_methods_that_the_trainer_would_never_call_are_refused(objective, message):
    with pytest.raises(TypeError, match=message):
        objective.check_settings()


def test_classes_of_a_users_own_give_their_mean():
    student, teacher, batch = tiny.bert(0), tiny.bert(1), tiny.batch(tiny.bert(0))
    out = outputs(student, teacher, batch)
    step = TrainingStep(batch, student=out[0], teacher=out[1])
    for objective in (Plain(), Deeper()):
        objective.check_settings()
        objective.attach(student, teacher)
    torch.testing.assert_close(Plain().loss(step), (out[0].logits - out[1].logits).abs().mean())
    deeper, plain = Deeper(), LogitKD()
    for each in (deeper, plain):
        each.attach(student, teacher)
    torch.testing.assert_close(deeper.loss(step), 2 * plain(*out, batch))
    with pytest.raises(NotImplementedError, match="must define __call__"):
        Objective()(*out, batch)
