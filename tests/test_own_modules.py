# SPDX-License-Identifier: Apache-2.0
"""Plain modules that take and return dictionaries: trained, pruned, quantized, saved, loaded and exported like models of Transformers."""

import copy
import dataclasses
import json
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from huggingface_hub import PyTorchModelHubMixin
from torch import nn
from torch.nn import functional
from transformers import BertConfig, BertModel, PretrainedConfig, PreTrainedModel, Trainer

from hfkdq import (
    CompressionReport,
    CoTrainedTeacher,
    DistillationTrainer,
    EMATeacher,
    HiddenStateKD,
    LogitKD,
    PruningCallback,
    PruningSpec,
    QATCallback,
    QuantizationSpec,
    TaskLoss,
    cache_teacher_outputs,
    cluster_weights,
    export_onnx,
    load_pruned,
    load_quantized,
    make_student,
    prune,
    quantize,
    suggest_bits,
)
from hfkdq.facts import read_facts
from hfkdq.modeling.own_modules import as_pretrained_


class SmallCNN(nn.Module):
    """Its attributes have names that `PreTrainedModel` has for other things."""

    def __init__(self, width=8):
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.base_model = nn.Conv2d(width, 2 * width, 3)
        self.loss_function = nn.CrossEntropyLoss()
        self.register_buffer("framework", torch.arange(3.0), persistent=False)
        self.device = "here"
        self.fc = nn.Linear(2 * width, 3)

    def forward(self, pixel_values, labels=None):
        states = self.base_model(self.norm(self.conv(pixel_values)).relu()).relu()
        logits = self.fc(states.mean((2, 3))) + self.framework
        return answer(logits, None if labels is None else self.loss_function(logits, labels))


class SmallGRU(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.gru = nn.GRU(8, width, batch_first=True)
        self.head = nn.Linear(width, 3)

    def forward(self, input_features, labels=None):
        logits = self.head(self.gru(input_features)[0].mean(1))
        return answer(logits, None if labels is None else functional.cross_entropy(logits, labels))


class Wrapped(nn.Module):
    """A model of Transformers within, whose table the head shares."""

    def __init__(self):
        super().__init__()
        sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
        self.bert = BertModel(BertConfig(vocab_size=20, **sizes))
        self.head = nn.Linear(16, 20)
        self.head.weight = self.bert.embeddings.word_embeddings.weight

    def forward(self, input_ids, attention_mask=None):
        return {"logits": self.head(self.bert(input_ids, attention_mask=attention_mask).last_hidden_state)}


class Published(nn.Module, PyTorchModelHubMixin):
    """With ways to save and load of its own."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 3)

    def forward(self, input_features):
        return {"logits": self.fc(input_features.mean(1))}


def answer(logits, loss):
    return {"logits": logits} if loss is None else {"loss": loss, "logits": logits}


INPUTS = {
    SmallCNN: ("pixel_values", (1, 8, 8)),
    SmallGRU: ("input_features", (12, 8)),
    Published: ("input_features", (12, 8)),
}


def rows(cls, count=32):
    column, shape = INPUTS[cls]
    numbers = np.random.default_rng(0)
    values = numbers.normal(size=(count, *shape)).astype("float32").tolist()
    return Dataset.from_dict({column: values, "labels": numbers.integers(0, 3, count).tolist()}).with_format("torch")


def batch_of(cls):
    if cls is Wrapped:
        return {"input_ids": torch.randint(20, (3, 5))}
    column = INPUTS[cls][0]
    return {column: rows(cls)[:8][column]}


@torch.no_grad()
def logits_of(model, batch):
    return model.eval()(**batch)["logits"]


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


OWN = [SmallCNN, SmallGRU, Wrapped, Published]


@pytest.mark.parametrize("cls", OWN)
def test_it_stays_the_module_that_it_was(cls):
    model, batch = cls(), batch_of(cls)
    before, parameters = logits_of(model, batch), list(map(id, model.parameters()))
    keys, mode = list(model.state_dict()), model.training
    assert as_pretrained_(model) is model
    assert as_pretrained_(model) is model
    assert isinstance(model, cls)
    assert isinstance(model, PreTrainedModel)
    assert type(model).__name__ == cls.__name__
    assert (list(map(id, model.parameters())), list(model.state_dict()), model.training) == (parameters, keys, mode)
    assert torch.equal(logits_of(model, batch), before)
    if cls is SmallCNN:
        model.device = "there"
        assert model.device == torch.device("cpu")  # where its parameters are, whatever it wrote down


@pytest.mark.parametrize("cls", OWN)
def test_it_is_copied_pickled_saved_and_loaded(cls, tmp_path):
    model, batch = as_pretrained_(cls()), batch_of(cls)
    before = logits_of(model, batch)
    model.save_pretrained(tmp_path)
    others = [
        copy.deepcopy(model), pickle.loads(pickle.dumps(model)), type(model).from_pretrained(tmp_path),
        load_pruned(tmp_path, model=cls()),
    ]  # fmt: skip
    for other in others:
        assert isinstance(other, cls)
        assert torch.equal(logits_of(other, batch), before)
        assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}
    if cls is Wrapped:
        assert all(o.head.weight is o.bert.embeddings.word_embeddings.weight for o in others)


@pytest.mark.parametrize("cls", [SmallCNN, SmallGRU])
def test_the_whole_chain(cls, training_arguments, tmp_path):
    """Distilled, pruned and quantized in training, stopped and gone on, saved, loaded."""
    data, batch = rows(cls), batch_of(cls)
    teacher, weights = cls(24), copy.deepcopy(cls()).state_dict()

    def trainer(folder):
        student = cls()
        student.load_state_dict(weights)
        arguments = training_arguments(folder, max_steps=4, save_strategy="steps", save_steps=2)
        callbacks = [PruningCallback(PruningSpec(sparsity=0.5, end=0.5)), QATCallback(QuantizationSpec())]
        return DistillationTrainer(
            student, arguments, train_dataset=data, eval_dataset=data, teacher_model=teacher,
            objectives=[LogitKD(), TaskLoss()], callbacks=callbacks, compute_metrics=accuracy,
        )  # fmt: skip

    first, second = trainer("first"), trainer("second")
    first.train()
    second.train(resume_from_checkpoint=f"{first.args.output_dir}/checkpoint-2")
    for one, other in zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert first.evaluate()["eval_accuracy"] >= 0.0
    first.save_model(tmp_path / "saved")
    assert {"distillation", "pruning", "quantization"} <= read_facts(first.model).keys()
    loaded = load_quantized(tmp_path / "saved", model=cls())
    assert torch.equal(logits_of(loaded, batch), logits_of(first.model, batch))


@pytest.mark.parametrize("teacher", [lambda: EMATeacher(), lambda: CoTrainedTeacher(SmallCNN())], ids=["ema", "peer"])
def test_it_learns_from_any_teacher(teacher, training_arguments):
    arguments = dict(train_dataset=rows(SmallCNN), teacher_model=teacher(), objectives=[LogitKD(), TaskLoss()])
    trainer = DistillationTrainer(SmallCNN(), training_arguments(max_steps=2), **arguments)
    assert np.isfinite(trainer.train().training_loss)


def test_outputs_of_it_are_cached(training_arguments, tmp_path):
    teacher, student = SmallCNN(16), SmallCNN()
    cached = cache_teacher_outputs(teacher, rows(SmallCNN), folder=tmp_path)
    start = copy.deepcopy(student.state_dict())
    losses = []
    for data, given in ((rows(SmallCNN), teacher), (cached, None)):
        student.load_state_dict(start)
        arguments = dict(train_dataset=data, teacher_model=given, objectives=[LogitKD()])
        losses.append(DistillationTrainer(student, training_arguments(max_steps=2), **arguments).train().training_loss)
    assert losses[1] == pytest.approx(losses[0], rel=2**-10)  # the cache holds halves


def test_the_callbacks_serve_the_trainer_of_transformers(training_arguments, tmp_path):
    model, batch = SmallCNN(), batch_of(SmallCNN)
    trainer = Trainer(
        model,
        training_arguments(max_steps=2),
        train_dataset=rows(SmallCNN),
        callbacks=[QATCallback(QuantizationSpec())],
    )
    trainer.train()
    trainer.save_model(tmp_path)
    assert torch.equal(logits_of(load_quantized(tmp_path, model=SmallCNN()), batch), logits_of(model, batch))


def test_functions_of_the_package_take_it(tmp_path):
    batch = batch_of(SmallCNN)
    model = prune(SmallCNN(), PruningSpec(sparsity=0.5))
    assert (model.fc.weight == 0).float().mean() == 0.5
    assert len(cluster_weights(SmallCNN(), clusters=4).fc.weight.unique()) == 4
    assert suggest_bits(SmallCNN(), [batch], budget=0.2).bits
    quantize(model, QuantizationSpec(), [batch])
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(load_quantized(tmp_path, model=SmallCNN()), batch), logits_of(model, batch))


def test_it_is_exported_and_reported(tmp_path):
    batch, data = batch_of(SmallCNN), rows(SmallCNN)
    model = quantize(SmallCNN(), QuantizationSpec(), [batch])
    folder = export_onnx(model, tmp_path / "onnx", inputs=batch, latency_rounds=0)
    assert json.loads((folder / "export_facts.json").read_text())["kind"] == "int8"
    report = CompressionReport.measure(
        student=model, onnx=folder, eval_dataset=data, compute_metrics=accuracy, latency_rounds=0
    )
    student, file = report.engines
    assert abs(student.metrics["accuracy"] - file.metrics["accuracy"]) <= 1 / len(data)


class Unnamed(SmallGRU):
    """Returns its logits alone."""

    def forward(self, input_features, labels=None):
        return super().forward(input_features)["logits"]


def test_outputs_without_names_are_refused_before_anything_is_written(training_arguments, tmp_path):
    with pytest.raises(TypeError, match=r"Unnamed returns a Tensor.*return a dictionary"):
        export_onnx(Unnamed(), tmp_path / "onnx", inputs=batch_of(SmallGRU), latency_rounds=0)
    assert not (tmp_path / "onnx").exists()
    arguments = dict(train_dataset=rows(SmallGRU), teacher_model=SmallGRU(), objectives=[LogitKD()])
    with pytest.raises(ValueError, match="Unnamed gives no logits"):
        DistillationTrainer(Unnamed(), training_arguments(), **arguments)


@dataclasses.dataclass
class Sizes:
    width: int = 8


class Configured(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.fc = nn.Linear(config["width"] if isinstance(config, dict) else config.width, 3)

    def forward(self, input_features):
        width = self.config["width"] if isinstance(self.config, dict) else self.config.width
        return {"logits": self.fc(input_features[..., :width].mean(1))}


class Read(Configured):
    """Reads its dict as one, whatever it is."""

    def forward(self, input_features):
        return {"logits": self.fc(input_features[..., : self.config["width"]].mean(1))}


@pytest.mark.parametrize(
    ("cls", "config"),
    [(Read, {"width": 8}), (Configured, Sizes()), (Configured, SimpleNamespace(width=8)), (Configured, BertConfig(width=8))],
)  # fmt: skip
def test_the_fields_of_its_own_configuration_are_kept(cls, config, tmp_path):
    model, batch = cls(config), {"input_features": torch.randn(2, 5, 9)}
    before = logits_of(model, batch)
    as_pretrained_(model).save_pretrained(tmp_path)
    assert isinstance(model.config, PretrainedConfig)
    assert model.config.width == 8
    assert torch.equal(logits_of(model, batch), before)
    assert torch.equal(logits_of(load_pruned(tmp_path, model=cls(config)), batch), before)


def test_what_cannot_be_is_refused_and_the_module_left_alone(training_arguments, tmp_path):
    class Unlike:
        width = 8

        def depth(self):
            return 2

    arguments = dict(train_dataset=rows(SmallCNN), teacher_model=SmallCNN())
    with pytest.raises(TypeError, match=r"Configured.config is .*Unlike.*another name"):
        as_pretrained_(model := Configured(Unlike()))
    assert type(model) is Configured
    model = SmallCNN()
    model.opened = open(__file__)  # noqa: SIM115
    with model.opened, pytest.raises(TypeError, match=r"SmallCNN cannot be copied.*open files"):
        prune(model, PruningSpec(sparsity=0.5))
    assert type(model) is SmallCNN
    with pytest.raises(TypeError, match="the student is a Linear"):
        DistillationTrainer(nn.Linear(2, 2), training_arguments(), objectives=[LogitKD()], **arguments)
    with pytest.raises(ValueError, match="output_hidden_states=True"):
        DistillationTrainer(SmallCNN(), training_arguments(), objectives=[HiddenStateKD()], **arguments)
    with pytest.raises(TypeError, match="smaller one that you build"):
        make_student(SmallCNN(), num_layers=1)
    as_pretrained_(SmallCNN()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="take one as model="):
        load_pruned(tmp_path)
    with pytest.raises(TypeError, match="got the class SmallCNN"):
        load_pruned(tmp_path, model=SmallCNN)
    with pytest.raises(ValueError, match="has other shapes for"):
        load_pruned(tmp_path, model=SmallCNN(16))
    with pytest.raises(ValueError, match="lacks"):
        load_pruned(tmp_path, model=SmallGRU())


class Heard(nn.Module):
    """A convolution before a recurrent layer, which transposes in place."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv1d(8, 12, 3), nn.Conv1d(12, 8, 3)
        self.gru, self.head = nn.GRU(8, 16, batch_first=True), nn.Linear(16, 3)

    def forward(self, input_features):
        states = self.second(self.first(input_features.transpose(1, 2)).relu()).transpose(1, 2)
        return {"logits": self.head(self.gru(states)[0].mean(1))}


def test_channels_go_where_they_can_and_a_recurrent_layer_is_left(tmp_path):
    batch = {"input_features": torch.randn(2, 12, 8)}
    spec = PruningSpec(sparsity=0.5, structure="channel", plain_checkpoint=False)
    model = prune(Heard(), spec, example_inputs=batch)
    assert (model.first.out_channels, model.second.out_channels, model.gru.hidden_size) == (6, 8, 16)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(load_pruned(tmp_path, model=Heard()), batch), logits_of(model, batch))
    small = SmallGRU()
    with pytest.raises(ValueError, match=r"What fits this model: structure='weight'"):
        prune(small, spec, example_inputs=batch)
    with pytest.raises(
        ValueError, match=r"^SmallGRU has no neurons that could go: .* linear layers alone read\. What fits"
    ):
        prune(small, PruningSpec(sparsity=0.5, structure="neuron"), example_inputs=batch)
