# SPDX-License-Identifier: Apache-2.0
"""`auto_find_batch_size`: a training that ran out of memory begins again as if nothing had been."""

import numpy as np
import torch
from transformers import TrainerCallback

from hfkdq import PruningCallback, PruningSpec, QATCallback, QuantizationSpec

from .common import ALL_TERMS, losses, make_trainer, teacher_of


def test_running_out_of_memory_in_the_teacher_begins_again_with_smaller_batches(training_arguments):
    teacher, sizes = teacher_of(), []

    def run_out(module, args, kwargs):
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > 7 and len(sizes) > 1:  # in the second micro batch, when the first is summed up already
            raise RuntimeError("CUDA out of memory.")

    arguments = training_arguments(max_steps=4, auto_find_batch_size=True, gradient_accumulation_steps=2)
    pruning = PruningCallback(PruningSpec(sparsity=0.5, structure="neuron"))
    trainer = make_trainer(
        arguments, ALL_TERMS["sum"], teacher=teacher, callbacks=[pruning, QATCallback(QuantizationSpec())]
    )
    accepts, begun = trainer.model_accepts_loss_kwargs, []

    class Begin(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            in_step, window = trainer._running_step is not None, trainer._loss_log.sums
            begun.append((trainer.model_accepts_loss_kwargs, in_step, window))

    trainer.add_callback(Begin())
    hook = teacher.register_forward_pre_hook(run_out, with_kwargs=True)
    trainer.train()
    hook.remove()
    assert sizes[:2] == [8, 8]
    assert max(sizes[2:]) <= 7
    assert begun == [(accepts, False, None)] * 2
    assert trainer.model.config.intermediate_size == 32  # of 64: masks began anew
    for loss, task, logits, hidden, attention in losses(
        trainer, "loss", "task_loss", "logit_kd", "hidden_state_kd", "attention_kd"
    ):
        np.testing.assert_allclose(loss, 0.5 * task + logits + hidden + 0.1 * attention, rtol=1e-3)
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
