# SPDX-License-Identifier: Apache-2.0
"""What runs exported files, on either line: whole texts, token by token, and what is timed of them."""

from __future__ import annotations

import copy
import functools

import pytest
import torch

from hfkdq.export.backends import load_backend
from hfkdq.export.runner import TOKENS, GeneratingFiles, SingleFile, open_files
from hfkdq.export.verify import beginning, compare, run_torch

from ..families import FAMILIES
from .tasks import make

TASK = {
    "bert": "text-classification",
    "gpt2": "text-generation-with-past",
    "llama": "text-generation-with-past",
    "t5": "text2text-generation-with-past",
    "bart": "text2text-generation-with-past",
    "whisper": "automatic-speech-recognition-with-past",
}
GENERATING = [family for family in TASK if family != "bert"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model of one layer and the folder of its files, by family."""

    @functools.cache
    def export(family):
        backend, task = load_backend(), TASK[family]
        model, folder = make(family, task), tmp_path_factory.mktemp(family)
        model.save_pretrained(folder)
        backend.trace(copy.deepcopy(model), folder, task, fold_constants=True)
        backend.finish(folder, model.config, task)
        return model, folder

    return export


def share(model, run, batch, reference=None):
    """The largest difference to the model, or to other outputs, as a share of the largest output."""
    parity = compare(run, [batch], reference or run_torch(model, [batch]))
    return parity.max_abs_diff / parity.max_abs_logit


@pytest.mark.parametrize("family", GENERATING)
def test_decoding_step_by_step_equals_the_full_forward(family, exported):
    model, folder = exported(family)
    runner = open_files(folder, TASK[family])
    assert isinstance(runner, GeneratingFiles)
    assert runner.has_cache
    exact = copy.deepcopy(model).double()
    for batch in (*load_backend().dummy_batches(model, TASK[family]), FAMILIES[family].batch(5)):
        doubles = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
        with torch.no_grad():
            reference = [{name: value for name, value in exact(**doubles).items() if torch.is_tensor(value)}]
        # Float32 of torch is as far from float64 as a sum of the hidden width allows, or as the weights amplify that;
        # a file rounds as often in an order of its own.
        rounding = share(model, lambda inputs: run_torch(model, [inputs])[0], batch, reference)
        allowed = 8 * max(rounding, model.config.hidden_size * torch.finfo().eps)
        assert allowed < 2e-4
        assert share(model, runner, batch, reference) < allowed
        assert share(model, runner.incremental_decode, batch, reference) < allowed


def test_decoding_step_by_step_uses_the_cache(exported):
    _, folder = exported("llama")
    runner = open_files(folder, TASK["llama"])
    arrays = {name: value.numpy() for name, value in FAMILIES["llama"].batch().items()}
    steps = [inputs for _, inputs, _ in runner._steps(arrays, 5)]
    assert [inputs["input_ids"].shape[1] for inputs in steps] == [5, 1, 1, 1, 1, 1]
    assert [inputs["past_key_values.0.key"].shape[2] for inputs in steps] == [0, 5, 6, 7, 8, 9]
    begun, take = [], runner._steps
    runner._steps = lambda arrays, begin: begun.append(begin) or take(arrays, begin)
    runner(arrays)
    runner.incremental_decode(arrays)
    assert begun == [None, 5]


def test_files_of_an_encoder_and_a_decoder_are_timed_as_they_are_called(exported):
    _, folder = exported("t5")
    example = {"input_ids": FAMILIES["t5"].batch(1)["input_ids"].numpy()}
    encoder, prompt, token = open_files(folder, TASK["t5"]).calls(example)
    assert [call.part for call in (encoder, prompt, token)] == ["encoder", "prompt", "next token"]
    assert [call.times for call in (encoder, prompt, token)] == [1, 1, TOKENS - 1]
    assert encoder.path.name == "encoder_model.onnx"
    assert prompt.inputs["input_ids"].shape == token.inputs["input_ids"].shape == (1, 1)
    assert token.inputs["past_key_values.0.decoder.key"].shape[2] == 1
    assert token.inputs["past_key_values.0.encoder.key"].shape[2] == example["input_ids"].shape[1]


def test_a_decoder_is_timed_on_its_prompt_and_on_a_token_after_it(exported):
    _, folder = exported("gpt2")
    batch = FAMILIES["gpt2"].batch(1)
    example = {name: batch[name].numpy() for name in ("input_ids", "attention_mask")}
    length = example["input_ids"].shape[1]
    prompt, token = open_files(folder, TASK["gpt2"]).calls(example)
    assert prompt.path == token.path == folder / "model.onnx"
    assert (prompt.times, token.times) == (1, TOKENS - 1)
    assert prompt.inputs["input_ids"].shape == (1, length)
    assert prompt.inputs["past_key_values.0.key"].shape[2] == 0
    assert token.inputs["input_ids"].shape == (1, 1)
    assert token.inputs["attention_mask"].shape == (1, length + 1)
    assert token.inputs["past_key_values.0.key"].shape[2] == length


def test_a_single_file_is_timed_on_the_example(exported):
    _, folder = exported("bert")
    example = {name: value.numpy() for name, value in FAMILIES["bert"].batch(1).items()}
    runner = open_files(folder, TASK["bert"])
    assert isinstance(runner, SingleFile)
    (call,) = runner.calls(example)
    assert (call.path, call.times) == (folder / "model.onnx", 1)
    assert call.inputs is example


def test_the_beginning_of_a_batch_is_of_few_texts_and_tokens():
    ids = torch.arange(3 * 50).reshape(3, 50)
    start = beginning({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
    assert {name: tuple(value.shape) for name, value in start.items()} == {
        "input_ids": (2, 32),
        "attention_mask": (2, 32),
    }
    start = beginning({"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids[:, :40]})
    assert start["input_ids"].shape == start["attention_mask"].shape == (2, 50)
    assert torch.equal(start["decoder_input_ids"], ids[:2, :32])
    sound = beginning({"input_features": torch.zeros(3, 80, 50), "decoder_input_ids": ids})
    assert sound["input_features"].shape == (2, 80, 50)
