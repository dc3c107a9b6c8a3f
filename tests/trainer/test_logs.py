# SPDX-License-Identifier: Apache-2.0
"""Loss terms in the logs, in progress bars and in notebooks, and what they cost."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.trainer_callback import ProgressCallback

from hfkdq.objectives import HiddenStateKD, LogitKD, TaskLoss
from tests import tiny

from .common import losses, make_trainer

TERMS = [TaskLoss(weight=0.5), LogitKD(), HiddenStateKD()]


def test_the_console_shows_every_term(training_arguments, capsys):
    trainer = make_trainer(training_arguments(max_steps=2, disable_tqdm=False), TERMS)
    assert any(isinstance(callback, ProgressCallback) for callback in trainer.callback_handler.callbacks)
    trainer.train()
    lines = [line for line in capsys.readouterr().out.splitlines() if "'loss'" in line]
    assert len(lines) == 2
    assert all("'task_loss'" in line and "'logit_kd'" in line and "'hidden_state_kd'" in line for line in lines)


@pytest.mark.parametrize("evaluates", [True, False])
def test_a_notebook_shows_every_term_in_its_table(training_arguments, monkeypatch, evaluates):
    pytest.importorskip("IPython")
    from transformers.utils import notebook

    shown = []
    monkeypatch.setattr(notebook.NotebookTrainingTracker, "display", lambda self: shown.append(self.inner_table))
    monkeypatch.setattr("transformers.trainer.DEFAULT_PROGRESS_CALLBACK", notebook.NotebookProgressCallback)
    arguments = dict(eval_strategy="steps", eval_steps=1) if evaluates else {}
    trainer = make_trainer(training_arguments(max_steps=2, disable_tqdm=False, **arguments), TERMS)
    trainer.train()
    header, *rows = shown[-1]
    logged = losses(trainer, "loss", "task_loss", "logit_kd", "hidden_state_kd")
    columns = [header.index(name) for name in ("Training Loss", "task_loss", "logit_kd", "hidden_state_kd")]
    assert [[row[column] for column in columns] for row in rows] == logged
    assert ("Validation Loss" in header) == evaluates


def test_without_objectives_a_notebook_shows_what_it_shows_for_trainer(training_arguments, monkeypatch):
    pytest.importorskip("IPython")
    from transformers.utils.notebook import NotebookProgressCallback

    monkeypatch.setattr("transformers.trainer.DEFAULT_PROGRESS_CALLBACK", NotebookProgressCallback)
    trainer = make_trainer(training_arguments(disable_tqdm=False), teacher=None)
    assert [type(c) for c in trainer.callback_handler.callbacks].count(NotebookProgressCallback) == 1


class ReadsOfTheHost(TorchDispatchMode):
    """Counts how often a tensor's value is asked for, which makes the host wait for an accelerator."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_logging_step_gathers_and_waits_once(training_arguments):
    # Text models look at their attention mask on the host; image models have none.
    trainer = make_trainer(
        training_arguments(max_steps=6, logging_steps=3, gradient_accumulation_steps=2), TERMS, tiny.vit(0),
        tiny.vit(1, layers=4, hidden=48), train_dataset=tiny.image_dataset(), processing_class=None,
    )  # fmt: skip
    gathered, gather = [], trainer.accelerator.gather
    trainer.accelerator.gather = lambda tensor: gathered.append(tensor) or gather(tensor)
    reads, compute_loss = [], trainer.compute_loss

    def counted(*args, **kwargs):
        with ReadsOfTheHost() as mode:
            result = compute_loss(*args, **kwargs)
        reads.append(mode.count)
        return result

    trainer.compute_loss = counted
    trainer.train()
    # Three terms and whether a logit was NaN; Trainer itself gathers a number of items, without axes, per step.
    assert [tuple(tensor.shape) for tensor in gathered if tensor.dim()] == [(1, 4)] * 2
    # On the CPU a teacher that is not finite is found at once, and that is the one read of a micro batch.
    assert reads == [1] * len(reads)
    assert len(reads) == 9  # 24 rows in batches of 8 are 3 micro batches an epoch


@pytest.mark.gpu
def test_computing_the_loss_does_not_wait_for_the_accelerator(training_arguments):
    trainer = make_trainer(training_arguments(max_steps=3, logging_steps=3, use_cpu=False), TERMS)
    compute_loss = trainer.compute_loss

    def strict(*args, **kwargs):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return compute_loss(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    trainer.compute_loss = strict
    trainer.train()
    assert np.isfinite(losses(trainer, "loss", "logit_kd")).all()


@pytest.mark.gpu
def test_a_nan_of_the_teacher_is_found_at_the_next_log(training_arguments):
    trainer = make_trainer(training_arguments(max_steps=6, logging_steps=3, use_cpu=False), TERMS)
    trainer.teacher_model.classifier.bias.data[0] = float("nan")
    with pytest.raises(RuntimeError, match="at step 1"):
        trainer.train()
    assert trainer.state.global_step == 3
