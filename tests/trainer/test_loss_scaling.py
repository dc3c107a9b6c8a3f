# SPDX-License-Identifier: Apache-2.0
"""Terms are means over the valid positions of an optimizer step, however its rows are cut into batches."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

from hfkdq.objectives import LogitKD, TaskLoss
from hfkdq.trainer import DistillationMixin, DistillationTrainer
from tests import tiny
from tests.launch import accelerate_launch

from .common import ALL_TERMS, losses, make_trainer
from .scaling_runs import KINDS, OTHERS, PROCESSES, RUNS, arguments_for, result, train


def assert_same_update(one, other):
    np.testing.assert_allclose(one[0], other[0], rtol=2e-3, atol=1e-5)
    assert one[1].keys() == other[1].keys()
    for key, value in one[1].items():
        torch.testing.assert_close(other[1][key], value, rtol=1e-3, atol=2e-5, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("terms", ALL_TERMS)
def test_accumulated_micro_batches_give_the_update_of_one_batch(tmp_path, kind, terms):
    """Micro batches hold uneven numbers of tokens; 44 rows leave a short last window and a short last batch."""
    runs = [
        result(train(kind, terms, arguments_for(str(tmp_path), size, steps, num_train_epochs=1), rows=44))
        for size, steps in ((32, 1), (8, 4), (4, 8))
    ]
    for other in runs[1:]:
        assert_same_update(runs[0], other)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("terms", OTHERS)
def test_other_teachers_and_terms_are_accumulated_as_exactly(tmp_path, kind, terms):
    one, other = (
        result(train(kind, terms, arguments_for(str(tmp_path), size, steps, num_train_epochs=1), rows=44))
        for size, steps in ((32, 1), (8, 4))
    )
    assert_same_update(one, other)


@pytest.mark.one_line
def test_two_processes_give_the_update_of_one(tmp_path):
    """Every term and their sum, 2 x 16 rows against 1 x 32, in one launch."""
    configuration = Path(__file__).parents[2] / "examples" / "accelerate_configs" / "ddp.yaml"
    script = Path(__file__).with_name("scaling_runs.py")
    accelerate_launch(script, tmp_path / "two", options=("--config_file", str(configuration)))
    for number, (kind, terms) in enumerate([*RUNS, *PROCESSES]):
        files = [tmp_path / "two" / f"{number}-rank{rank}" for rank in (0, 1)]
        logs = [json.loads(Path(f"{file}.json").read_text()) for file in files]
        states = [load_file(f"{file}.safetensors") for file in files]
        assert logs[0] == logs[1], (kind, terms)
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0]), (kind, terms)
        assert any("projection" in key for key in states[0]) == (terms in ("hidden", "sum", "stages", "peer"))
        one = train(kind, terms, arguments_for(str(tmp_path), 32, 1, num_train_epochs=1))
        assert_same_update(result(one), (logs[0], states[0]))


def test_the_task_alone_is_the_mean_over_all_tokens_of_the_step(tmp_path):
    """Not the mean over micro batches; and a first label, which no position predicts, does not count."""
    trainer = train("next tokens", "task", arguments_for(str(tmp_path), 4, 8, max_steps=1), rows=32)
    model, total, count = tiny.llama(0), 0.0, 0
    for row in tiny.token_dataset(32):
        batch = trainer.data_collator([row])
        tokens = int(batch["labels"][:, 1:].ne(-100).sum())
        total += model(**batch).loss.item() * tokens
        count += tokens
    assert losses(trainer, "task_loss")[0][0] == pytest.approx(total / count, rel=1e-4)


def test_label_smoothing_is_part_of_the_task_loss(training_arguments):
    plain = make_trainer(training_arguments("plain", max_steps=3, label_smoothing_factor=0.2), cls=Trainer)
    ours = make_trainer(
        training_arguments("ours", max_steps=3, label_smoothing_factor=0.2), [TaskLoss(), LogitKD(weight=0.0)]
    )
    plain.train()
    ours.train()
    np.testing.assert_allclose(losses(plain, "loss", "grad_norm"), losses(ours, "loss", "grad_norm"), rtol=1e-4)


def assert_same_however_accumulated(training_arguments, **settings):
    results = []
    for size, steps in ((16, 1), (4, 4)):
        arguments = training_arguments(
            f"{size}", per_device_train_batch_size=size, gradient_accumulation_steps=steps, max_steps=2
        )
        trainer = make_trainer(arguments, [TaskLoss(), LogitKD()], **settings)
        trainer.train()
        results.append(losses(trainer, "loss", "grad_norm", "task_loss", "logit_kd"))
    np.testing.assert_allclose(*results, rtol=1e-3)


def test_compute_loss_func_normalises_by_itself(training_arguments):
    def summed(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    assert_same_however_accumulated(training_arguments, compute_loss_func=summed)


class _Scales(Trainer):
    """A trainer whose `compute_loss` divides by the labels of the whole window, and says so."""

    loss_is_scaled_for_ga = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        count = len(labels) if num_items_in_batch is None else num_items_in_batch
        loss = torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / count
        return (loss, outputs) if return_outputs else loss


@pytest.mark.skipif(not hasattr(Trainer, "loss_is_scaled_for_ga"), reason="transformers 4 has no such attribute")
def test_a_trainer_that_scales_its_loss_is_taken_at_its_word(training_arguments):
    class Scaled(DistillationMixin, _Scales):
        pass

    assert_same_however_accumulated(training_arguments, cls=Scaled)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_speech_counts_by_its_own_reduction(training_arguments, reduction):
    """CTC has a mean over the examples, or their sum, whatever the numbers of their labels."""
    noise = torch.randn(4, 4000, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1 + (3 * i + j) % 11 if j < 2 + 2 * i else -100 for j in range(8)] for i in range(4)])
    rows = [{"input_values": noise[i], "labels": labels[i]} for i in range(4)]

    def trained(size, steps, cls=DistillationTrainer):
        arguments = training_arguments(
            f"{cls.__name__}{size}", max_steps=1, per_device_train_batch_size=size, gradient_accumulation_steps=steps,
            optim="sgd", learning_rate=0.01, max_grad_norm=0.0,
        )  # fmt: skip
        more = {} if cls is Trainer else {"objectives": [TaskLoss()]}
        trainer = cls(tiny.wav2vec2_ctc(ctc_loss_reduction=reduction), arguments, train_dataset=rows, **more)
        trainer.train()
        return trainer.model.state_dict()

    expected = trained(4, 1, Trainer)
    for size, steps in ((4, 1), (2, 2), (1, 4)):
        for key, value in trained(size, steps).items():
            torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-5)
