# SPDX-License-Identifier: Apache-2.0
"""What a file declares to vary was run in another size, or is declared fixed."""

from __future__ import annotations

import json

import onnx
import pytest
import torch
import transformers as tf
from packaging.version import Version
from torch import nn

from hfkdq import export_onnx
from hfkdq.export.axes import open_axes, prove_sizes, trials

from .. import tiny
from ..families import FAMILIES

ON_V5 = Version(tf.__version__).major >= 5


class Frames(tf.PreTrainedModel):
    """A model of one's own over (batch, time, 8), which may take only some sizes."""

    config_class, main_input_name = tf.PretrainedConfig, "input_values"

    def __init__(self, only=None):
        super().__init__(tf.PretrainedConfig())
        self.only, self.layer = only, nn.Linear(8, 3)

    def forward(self, input_values):
        if self.only is not None and input_values.shape[1] != self.only:
            raise ValueError("other frames than it has positions for")
        return {"logits": self.layer(input_values).mean(1)}


def file_of(path, axes):
    """A file with an input that leaves these axes open."""
    value = onnx.helper.make_tensor_value_info("input_values", onnx.TensorProto.FLOAT, axes)
    graph = onnx.helper.make_graph([], "graph", [value], [value])
    onnx.save(onnx.helper.make_model(graph, ir_version=8), path / "model.onnx")
    return path


def no_check(parity):
    assert parity.max_abs_diff == 0


def run(model, working=lambda batch: True):
    def call(batch):
        if not working(batch):
            raise RuntimeError("a constant of another size")
        with torch.no_grad():
            return model(**batch)

    return call


OPEN = ["batch_size", "sequence_length", 8]
BATCHES = [{"input_values": torch.randn(3, 6, 8)}]


def test_every_open_axis_is_run_in_another_size(tmp_path):
    axes, model = open_axes(file_of(tmp_path, OPEN), BATCHES[0]), Frames()
    assert axes == {"input_values": {0: "batch_size", 1: "sequence_length"}}
    ran = list(trials(model, BATCHES, axes))
    assert [(one.axis, one.traced, one.size) for one in ran] == [("batch_size", 3, 1), ("sequence_length", 6, 9)]
    found = prove_sizes(tmp_path, run(model), ran, axes, no_check)
    assert found == {"other_sizes": {"batch_size": 1, "sequence_length": 9}}
    both = [*BATCHES, {"input_values": torch.randn(1, 4, 8)}]  # of two sizes along both axes
    assert list(trials(model, both, axes)) == []


def test_an_axis_is_fixed_where_the_file_or_the_model_takes_one_size(tmp_path):
    axes = open_axes(file_of(tmp_path, OPEN), BATCHES[0])
    for model, working in (
        (Frames(), lambda batch: batch["input_values"].shape[1] == 6),
        (Frames(only=6), lambda batch: True),
    ):
        file_of(tmp_path, OPEN)
        ran = list(trials(model, BATCHES, axes))
        found = prove_sizes(tmp_path, run(model, working), ran, axes, no_check)
        assert found == {"other_sizes": {"batch_size": 1}, "fixed_axes": {"sequence_length": 6}}
        assert open_axes(tmp_path, BATCHES[0]) == {"input_values": {0: "batch_size"}}


def test_a_file_for_one_number_of_examples_is_refused(tmp_path):
    axes = open_axes(file_of(tmp_path, OPEN), BATCHES[0])
    ran = list(trials(Frames(), BATCHES, axes))
    with pytest.raises(RuntimeError, match=r"no other size of batch_size than the traced one, 3: a constant"):
        prove_sizes(tmp_path, run(Frames(), lambda batch: len(batch["input_values"]) > 1), ran, axes, no_check)


def test_other_lengths_keep_the_end_of_every_text():
    """BART reads its answer off the end token, of which every text must have one."""
    model = FAMILIES["bart"].make()
    ids = torch.full((2, 8), 5)
    ids[0, 7] = ids[1, 4] = model.config.eos_token_id
    mask = (torch.arange(8) < torch.tensor([[8], [5]])).long()
    batch = {"input_ids": ids * mask, "attention_mask": mask}
    axes = {key: {1: "sequence_length"} for key in batch}
    (trial,) = trials(model, [batch], axes)
    assert trial.size == 11
    assert (trial.batch["input_ids"] == model.config.eos_token_id).sum(1).tolist() == [1, 1]


def test_pictures_of_one_size_and_the_facts_that_say_so(tmp_path):
    """Tables of positions fit one size, which Optimum declares to vary."""
    model = tiny.vit()
    folder = export_onnx(model, tmp_path / "onnx", latency_rounds=0)
    facts = json.loads((folder / "export_facts.json").read_text())
    assert facts["other_sizes"] == {"batch_size": 1}
    size = model.config.image_size
    assert facts.get("fixed_axes", {}) == (
        {} if ON_V5 else {"num_channels": model.config.num_channels, "height": size, "width": size}
    )
    dims = onnx.load(folder / "model.onnx").graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_value for dim in dims[2:]] == [size, size]


class Pairs(tf.PreTrainedModel):
    """How well each text, of which a mask says what counts, fits each image."""

    config_class = tf.PretrainedConfig

    def __init__(self):
        super().__init__(tf.PretrainedConfig())
        self.texts, self.images = nn.Embedding(10, 8), nn.Linear(12, 8)

    def forward(self, input_ids, attention_mask, pixel_values):
        if input_ids.shape != attention_mask.shape:
            raise ValueError("a mask of other texts")
        mask = attention_mask[..., None]
        return {"logits": (self.texts(input_ids) * mask).mean(1) @ self.images(pixel_values.flatten(1)).T}


def test_a_mask_is_cut_with_the_texts_that_it_is_of():
    """An exporter may give texts and images axes of their own, and forget the mask of the texts (SigLIP)."""
    batch = {
        "input_ids": torch.randint(10, (4, 5)),
        "attention_mask": torch.ones(4, 5).long(),
        "pixel_values": torch.randn(4, 3, 2, 2),
    }
    axes = {
        "input_ids": {0: "text_batch_size"},
        "attention_mask": {0: "batch_size"},
        "pixel_values": {0: "image_batch_size"},
    }
    ran = {trial.axis: trial for trial in trials(Pairs(), [batch], axes)}
    assert all(trial.counts and trial.size == 1 for trial in ran.values())
    shapes = {name: tuple(trial.expected["logits"].shape) for name, trial in ran.items()}
    assert shapes == {"batch_size": (1, 1), "image_batch_size": (4, 1), "text_batch_size": (1, 1)}
