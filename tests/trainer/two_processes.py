# SPDX-License-Identifier: Apache-2.0
"""Run by `accelerate launch` in test_trainer: a few steps under DDP, and what every process ends with."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from safetensors.torch import save_file
from transformers import TrainingArguments

from hfkdq.objectives import AttentionKD, HiddenStateKD, LogitKD, TaskLoss
from hfkdq.trainer import DistillationTrainer
from tests import tiny


def run(arguments):
    """Trains and returns the trainer and its projections' weights."""
    arguments.max_steps, arguments.optim, arguments.learning_rate = 3, "sgd", 0.05
    trainer = DistillationTrainer(
        tiny.bert(0), arguments, train_dataset=tiny.text_dataset(64), processing_class=tiny.tokenizer(),
        teacher_model=tiny.bert(1, layers=4, hidden=48),
        objectives=[TaskLoss(weight=0.5), LogitKD(), HiddenStateKD(), AttentionKD(weight=0.1)],
    )  # fmt: skip
    trainer.train()
    return trainer, {f"projection.{key}": value for key, value in trainer._projections.maps.state_dict().items()}


def main(folder: str) -> None:
    arguments = TrainingArguments(
        folder, use_cpu=True, report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True, seed=0,
        per_device_train_batch_size=4, gradient_accumulation_steps=2,
    )  # fmt: skip
    trainer, projections = run(arguments)
    names = ("loss", "grad_norm", "logit_kd", "hidden_state_kd")
    # Only the first process keeps a log history of grad_norm and loss; the terms are reduced on all.
    logs = [[row[name] for name in names] for row in trainer.state.log_history if "loss" in row]
    rank = arguments.process_index
    Path(folder).mkdir(exist_ok=True)
    state = {key: value.clone().contiguous() for key, value in trainer.model.state_dict().items()}
    save_file({**state, **projections}, Path(folder, f"rank{rank}.safetensors"))
    Path(folder, f"rank{rank}.json").write_text(json.dumps({"logs": logs}))


if __name__ == "__main__":
    main(sys.argv[1])
