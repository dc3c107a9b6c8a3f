# SPDX-License-Identifier: Apache-2.0
"""torch.compile and fake quantizers: the same training, in one graph."""

from __future__ import annotations

import os

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn
from torch._dynamo.utils import counters
from transformers import BertConfig, DataCollatorWithPadding, PreTrainedModel, Trainer

from hfkdq import QATCallback, QuantizationSpec
from hfkdq.quantization.records import quantizer_states, weight_states
from tests import tiny

# Every kind of quantizer, in one model because compiling is slow.
MIXED = dict(
    attention=True,
    overrides={
        "query": {"range_estimator": "learned", "weight_estimator": "learned"},
        "key": {"range_estimator": "pact", "weight_bits": 4, "group_size": 32, "symmetric": False},
        "value": {"weight_bits": 3, "weight_mapping": "kmeans"},
        "intermediate.dense": {"weight_bits": 2, "activation_bits": 4, "activation_symmetric": True},
        "pooler.dense": {"weight_bits": 1, "activation_bits": None},
        "attention.output.dense": {"weight_mapping": "power_law", "activation_mapping": "power_law"},
    },
)
# Model, spec, arguments of the callback, number of graphs: one before there are ranges and one after, and one a phase.
SETTINGS = {
    "mixed": (lambda: tiny.bert(layers=1), MIXED, {}, 2),
    "phases": (
        lambda: words(),
        dict(weight_bits=4),
        dict(begin=0.25, lower_bits={0.25: 8, 0.75: 4}),
        4,
    ),
}


@pytest.fixture(autouse=True)
def _nothing_compiled():
    yield
    torch._dynamo.reset()


class Words(PreTrainedModel):
    """As little of a model as there can be."""

    config_class = BertConfig

    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.middle = nn.Linear(config.hidden_size, config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.classifier(self.middle(self.words(input_ids)).relu().mean(dim=1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def words():
    torch.manual_seed(0)
    return Words(tiny.bert_config())


def train(arguments, make, spec, callback):
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]  # where TrainingArguments leave torch_compile for the next Trainer
    AcceleratorState._reset_state(reset_partial_state=True)
    torch._dynamo.reset()
    counters.clear()
    trainer = Trainer(
        make(), arguments(), train_dataset=tiny.text_dataset(40),
        data_collator=DataCollatorWithPadding(tiny.tokenizer(), padding="max_length", max_length=12),
        callbacks=[QATCallback(QuantizationSpec(**spec), **callback)],
    )  # fmt: skip
    trainer.train()
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def flat(states):
    return [value for state in states.values() for value in state.values()]


@pytest.mark.one_line
@pytest.mark.parametrize("kind", SETTINGS)
def test_compiled_training_is_the_same_in_one_graph(training_arguments, kind):
    make, spec, callback, graphs = SETTINGS[kind]
    settings = dict(max_steps=4, learning_rate=1e-2)
    eager = train(lambda: training_arguments(**settings), make, spec, callback)
    compiled = train(
        lambda: training_arguments(torch_compile=True, torch_compile_backend="aot_eager", **settings),
        make,
        spec,
        callback,
    )
    assert losses(compiled) == pytest.approx(losses(eager), abs=1e-4)
    ours, theirs = quantizer_states(compiled.model), quantizer_states(eager.model)
    assert ours.keys() == theirs.keys()
    assert flat(ours) == pytest.approx(flat(theirs), rel=1e-4, abs=1e-6)
    assert weight_states(compiled.model).keys() == weight_states(eager.model).keys()
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
