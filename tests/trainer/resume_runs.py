# SPDX-License-Identifier: Apache-2.0
"""Trainings that kill themselves at a chosen moment, for test_resume to run in processes of their own."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import torch
import transformers.modeling_utils
from torch import nn
from transformers import PretrainedConfig, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerState

import hfkdq.trainer.checkpoints
from hfkdq import PruningCallback, PruningSpec, QATCallback, QuantizationSpec
from hfkdq.objectives import AttentionKD, HiddenStateKD, LogitKD, TaskLoss
from hfkdq.quantization.records import quantizer_states
from hfkdq.schedules import Linear
from hfkdq.trainer import DistillationTrainer
from tests import tiny

STEPS = 10  # of two epochs: 9 micro batches each, so that the last window of an epoch is a short one


class Moments:
    """Names of what happens in a training, in order; the process ends at the one with the number `last`."""

    def __init__(self, last=None):
        self.last, self.names = last, []

    def __call__(self, name):
        self.names.append(name)
        if len(self.names) - 1 == self.last:
            os.kill(os.getpid(), signal.SIGKILL)

    def next_is_last(self):
        return len(self.names) == self.last


def watch_files(moments):
    """Makes every file of a checkpoint, written or deleted, three or two moments; in the middle half of it is there."""

    def watched(write, place):
        def cut(*args, **kwargs):
            file = Path(args[place])
            moments(f"before {file.name}")
            result = write(*args, **kwargs)
            if moments.next_is_last():
                os.truncate(file, file.stat().st_size // 2)
            moments(f"middle of {file.name}")
            moments(f"after {file.name}")
            return result

        return cut

    def rmtree(folder, *args, **kwargs):
        for file in sorted(Path(folder).iterdir(), reverse=True):
            file.unlink()
            moments("while a checkpoint is deleted")
        Path(folder).rmdir()

    torch.save = watched(torch.save, 1)
    transformers.modeling_utils.safe_save_file = watched(transformers.modeling_utils.safe_save_file, 1)
    hfkdq.trainer.checkpoints.save_file = watched(hfkdq.trainer.checkpoints.save_file, 1)
    PretrainedConfig.to_json_file = watched(PretrainedConfig.to_json_file, 1)
    TrainerState.save_to_json = watched(TrainerState.save_to_json, 1)
    shutil.rmtree = rmtree


def watch_model(moments, model):
    model.register_forward_pre_hook(lambda *_: moments("before forward") if model.training else None)
    model.register_forward_hook(lambda *_: moments("after forward") if model.training else None)
    model.classifier.weight.register_hook(lambda _: moments("in backward"))


class Watched(DistillationTrainer):
    """A trainer whose steps are moments."""

    moments = Moments()

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.moments("after backward")
        return loss

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        optimizer.register_step_pre_hook(lambda *_: self.moments("before the optimizer step"))
        optimizer.register_step_post_hook(lambda *_: self.moments("in the optimizer step"))
        return optimizer

    def log(self, *args, **kwargs):
        self.moments("before log")
        super().log(*args, **kwargs)
        self.moments("after log")

    def prediction_step(self, *args, **kwargs):
        self.moments("in evaluate")
        return super().prediction_step(*args, **kwargs)

    def evaluate(self, *args, **kwargs):
        metrics = super().evaluate(*args, **kwargs)
        self.moments("after evaluate")
        return metrics


class Final(TrainerCallback):
    """Takes down all there is at the end of training, before pruned neurons are removed; give it first.

    Until then it makes large what the optimizer could only make small, so that masks alone tell what is pruned.
    """

    def on_step_begin(self, args, state, control, model, **kwargs):
        weights = [p for name, p in model.named_parameters() if name.endswith("intermediate.dense.weight")]
        self.pruned = [(weight, weight == 0) for weight in weights]

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, **kwargs):
        Watched.moments("after the optimizer step")
        for weight, zero in self.pruned:
            weight.masked_fill_(zero, 5.0)

    def on_train_end(self, args, state, control, model, optimizer, lr_scheduler, **kwargs):
        projections = getattr(model, "hfkdq_projections", nn.Module())
        self.seen = {
            "weights": dict(model.state_dict()),
            "projections": {} if not hasattr(projections, "maps") else dict(projections.maps.state_dict()),
            "optimizer": optimizer.state_dict(),
            "scheduler": lr_scheduler.state_dict(),
            "quantizers": quantizer_states(model),
            "random": (random.getstate(), np.random.get_state(), torch.get_rng_state()),
            "state": [state.global_step, state.epoch, state.total_flos, state.best_metric, state.max_steps],
        }
        self.seen = torch.utils._pytree.tree_map(lambda v: v.clone() if isinstance(v, torch.Tensor) else v, self.seen)


def arguments(folder, **kwargs):
    settings = dict(
        per_device_train_batch_size=2, gradient_accumulation_steps=2, num_train_epochs=2, logging_steps=2,
        save_strategy="steps", save_steps=3, save_total_limit=2, eval_strategy="steps", eval_steps=4,
        learning_rate=2e-3, warmup_steps=2, use_cpu=True, report_to=[], disable_tqdm=True, seed=3,
    )  # fmt: skip
    return TrainingArguments(str(folder), **{**settings, **kwargs})


def distance(student_out, teacher_out, batch):
    return (student_out.logits - teacher_out.logits).abs().mean()


def objectives():
    return [
        TaskLoss(weight=Linear(0.2, 0.8)),
        LogitKD(temperature=Linear(4.0, 1.0)),
        HiddenStateKD(),
        AttentionKD(weight=0.1),
        distance,
    ]


class Terminate(TrainerCallback):
    """Gets SIGTERM at an event of an optimizer step, and waits until the trainer knows."""

    def __init__(self, event, step):
        self.step = step
        setattr(self, event, self.terminate)

    def terminate(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            manager = self.trainer.callback_handler.callbacks[1].jit_manager
            manager.kill_wait = 0.0
            os.kill(os.getpid(), signal.SIGTERM)
            while not manager.is_checkpoint_requested:
                time.sleep(0.01)


def make_trainer(folder, estimator="moving_average", dropout=0.1, terminate=None, **kwargs):
    """A student that is pruned and quantized while it learns from a wider teacher."""
    # Pruning is over at step 8 of 10, so that the schedule ramps at most of the moments.
    pruning = PruningCallback(PruningSpec(sparsity=0.5, structure="neuron", begin=0.1, end=0.8))
    callbacks = [Final(), pruning, QATCallback(QuantizationSpec(range_estimator=estimator))]
    if terminate is not None:
        callbacks.append(Terminate(*terminate))
    trainer = Watched(
        tiny.bert(0, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout), arguments(folder, **kwargs),
        train_dataset=tiny.text_dataset(18), eval_dataset=tiny.text_dataset(10, seed=9),
        processing_class=tiny.tokenizer(), teacher_model=tiny.bert(1, layers=3, hidden=48), objectives=objectives(),
        callbacks=callbacks,
    )  # fmt: skip
    callbacks[-1].trainer = trainer
    return trainer


def logged(history):
    """A log history without what tells of time, and without the mean loss of the process's own part."""
    clock = ("_runtime", "_per_second")
    return [
        {key: value for key, value in row.items() if not key.endswith(clock) and key != "train_loss"}
        for row in history
    ]


def train(folder, result, environment=(), kill_at=None, resume=False, **kwargs):
    """Trains in `folder` up to the moment `kill_at`, or to the end and writes to `result` what came of it."""
    os.environ.update(environment)
    load = torch.load
    # Transformers 4 asks for "cpu:0" in each of several processes on the CPU, which torch does not know.
    torch.load = lambda *args, **kwargs: load(*args, **{**kwargs, "map_location": "cpu"})
    torch.set_num_threads(1)
    Watched.moments = moments = Moments(kill_at)
    trainer = make_trainer(folder, **kwargs)
    watch_model(moments, trainer.model)
    save = torch.save
    watch_files(moments)
    trainer.train(resume_from_checkpoint=resume)
    final = next(c for c in trainer.callback_handler.callbacks if isinstance(c, Final))
    whole = {
        **final.seen,
        "pruned": dict(trainer.model.state_dict()),
        "logs": logged(trainer.state.log_history),
        "facts": trainer.model.config.hfkdq,
    }
    save({"end": whole, "moments": moments.names}, result)
