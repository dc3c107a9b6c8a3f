# SPDX-License-Identifier: Apache-2.0
"""Whatever stands in a recipe: it is read and made into parts, or one clear error says why not."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from hfkdq.recipes import dump, load, override, read
from hfkdq.recipes.parts import parts_of, training_arguments
from tests.fuzz.common import answers, bounded, mutated, mutations

RECIPE = {
    "model": "org/name", "teacher": "org/teacher",
    "data": {"train": "rows.csv", "eval": "more.csv", "text_columns": ["text"], "train_samples": 100, "max_length": 32},
    "student": {"num_layers": 2},
    "objectives": [
        {"TaskLoss": {"weight": {"Linear": {"start": 1.0, "end": 0.0}}}},
        {"LogitKD": {"temperature": {"Piecewise": {"points": [[0.0, 4.0], [1.0, 1.0]]}}, "divergence": {"JSD": {"beta": 0.1}}}},
        {"HiddenStateKD": {"layers": {1: 2}, "active": "BottomUp"}},
        {"NoisyKD": {"objective": {"LogitKD": {"temperature": 2.0}}, "std": 0.1}},
    ],
    "training": {
        "num_train_epochs": 1, "learning_rate": 1e-4, "lr_scheduler_type": "cosine", "eval_strategy": "no", "use_cpu": True,
        "lr_scheduler_kwargs": {"a": 1}, "seed": 3, "per_device_train_batch_size": 8, "label_smoothing_factor": 0.0,
    },
    "pruning": {"structure": "neuron", "sparsity": 0.5, "rounds": 2, "at_least": 0.8, "target_modules": ["query"]},
    "quantization": {"weight_bits": 4, "overrides": {"classifier": {"weight_bits": 8}}, "lower_bits": {0.0: 8, 0.5: 4}, "begin": 0.1},
    "export": {"quantization": "int8", "max_drop": 0.01, "latency_rounds": 0},
    "report": {"license": "mit", "language": ["en"]},
    "push": {"repo_id": "me/it", "private": True},
}  # fmt: skip


def take(data):
    """All that becomes of a recipe before a model is loaded."""
    recipe = read(data, "r.yaml")
    parts = parts_of(recipe, "r.yaml")
    training_arguments(parts, "out")
    return recipe


def take_file(path):
    recipe = take(load(path))
    path.write_text(dump(recipe), encoding="utf-8")
    assert read(load(path)) == recipe


@bounded
@given(steps=mutations)
def test_mutated_recipes(steps):
    answers(lambda: take(mutated(RECIPE, steps)))


@bounded
@given(place=st.integers(0, 10**6), data=st.binary(min_size=0, max_size=20))
def test_damaged_files(place, data, tmp_path_factory):
    whole = dump(read(RECIPE)).encode()
    place %= len(whole)
    path = tmp_path_factory.getbasetemp() / "damaged.yaml"
    path.write_bytes(whole[:place] + data + whole[place + len(data) :])
    answers(lambda: take_file(path))


@bounded
@given(text=st.text(max_size=60), value=st.text(max_size=60))
def test_changes(text, value):
    answers(
        lambda: take(override(json.loads(json.dumps({"model": "a", "data": {"train": "b"}})), [f"{text}={value}"]))
    )


@bounded
@given(path=st.sampled_from(["training.seed", "objectives.1.LogitKD", "quantization.overrides", "student", "model"]), value=st.text(max_size=60))  # fmt: skip
def test_values_of_known_keys(path, value):
    answers(lambda: take(override(mutated(RECIPE, []), [f"{path}={value}"])))


def test_the_whole_one_is_taken(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(dump(read(RECIPE)), encoding="utf-8")
    assert answers(lambda: take_file(path))
