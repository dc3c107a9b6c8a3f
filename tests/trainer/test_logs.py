# SPDX-License-Identifier: Apache-2.0
"""Loss terms in the logs, in progress bars and in notebooks, and what they cost."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from hfkdq import PruningCallback, PruningSpec, QATCallback, QuantizationSpec
from hfkdq.objectives import HiddenStateKD, LogitKD, TaskLoss
from hfkdq.quantization import activation_quantizers
from hfkdq.report.curves import curves_of
from tests import tiny

from .common import losses, make_trainer

NO_CURVES = {"step", "epoch", "learning_rate", "grad_norm"}
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


def logging_callbacks():
    """Callbacks that add all that they can to the logs."""
    qat = QATCallback(QuantizationSpec(weight_bits=4), lower_bits={0.0: 8, 0.5: 4}, log_ranges=True)
    return [PruningCallback(PruningSpec(sparsity=0.5)), qat]


@pytest.mark.parametrize("objectives", [TERMS, None])
def test_reporters_get_all_that_is_logged(training_arguments, monkeypatch, objectives):
    reported = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            reported.append({**logs, "step": state.global_step})

    for module in ("transformers.trainer", "hfkdq.trainer.arguments"):
        monkeypatch.setattr(f"{module}.get_reporting_integration_callbacks", lambda names: [Reporter])
    trainer = make_trainer(
        training_arguments(max_steps=4),
        objectives,
        teacher="default" if objectives else None,
        callbacks=logging_callbacks(),
    )
    trainer.train()
    rows, logged = ([row for row in rows if "loss" in row] for rows in (reported, trainer.state.log_history))
    assert rows == logged
    assert [row["weight_bits"] for row in rows] == [8, 4, 4, 4]
    assert [row["sparsity"] for row in rows] == sorted(row["sparsity"] for row in rows)
    assert rows[0]["sparsity"] < rows[-1]["sparsity"] == 0.5
    for name, quantizer in activation_quantizers(trainer.model).items():
        low, high = rows[-1][f"activation_min/{name}"], rows[-1][f"activation_max/{name}"]
        scale, zero_point = (float(value) for value in quantizer.qparams())
        assert low == pytest.approx(-zero_point * scale, abs=1e-6)  # of float32 numbers below 8
        assert high - low == pytest.approx(255 * scale, rel=1e-6)
        assert low <= 0 <= high
    assert curves_of(trainer.state.log_history).keys() == rows[0].keys() - NO_CURVES - {
        name for name in rows[0] if name.startswith("activation_")
    }


def test_ranges_and_bits_that_stay_are_not_logged(training_arguments):
    trainer = make_trainer(training_arguments(max_steps=2), TERMS, callbacks=[QATCallback(QuantizationSpec())])
    trainer.train()
    assert not any(
        name.startswith(("activation_", "weight_bits")) for row in trainer.state.log_history for name in row
    )


def test_tensorboard_shows_terms_sparsity_bits_and_ranges(training_arguments, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed here")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    arguments = training_arguments(max_steps=4, report_to=["tensorboard"])
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))  # of Transformers 5
    arguments.logging_dir = str(tmp_path / "board")
    trainer = make_trainer(arguments, TERMS, callbacks=logging_callbacks())
    trainer.train()
    files = EventAccumulator(str(tmp_path / "board"))
    files.Reload()
    for name in ("loss", "task_loss", "logit_kd", "hidden_state_kd", "sparsity", "weight_bits"):
        shown = [event.value for event in files.Scalars(f"train/{name}")]
        logged = [row[0] for row in losses(trainer, name)]
        assert shown[: len(logged)] == pytest.approx(logged)
    assert sum(tag.startswith("train/activation_max/") for tag in files.Tags()["scalars"]) == len(
        activation_quantizers(trainer.model)
    )


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
