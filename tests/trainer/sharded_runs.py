# SPDX-License-Identifier: Apache-2.0
"""Run by `accelerate launch` with FSDP2 or DeepSpeed: a few steps, a checkpoint, and the steps after it once more."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification, TrainingArguments

from hfkdq import PruningCallback, PruningSpec, QATCallback, QuantizationSpec, export_onnx
from hfkdq.trainer import DistillationTrainer
from tests import tiny
from tests.trainer.common import ALL_TERMS, losses


def arguments_for(folder: str, processes: int = 1, **kwargs) -> TrainingArguments:
    return TrainingArguments(
        folder, report_to=[], save_strategy="steps", save_steps=2, logging_steps=1, disable_tqdm=True, seed=0,
        max_steps=3, learning_rate=0.05, lr_scheduler_type="constant",
        per_device_train_batch_size=8 // processes, gradient_accumulation_steps=2, **kwargs,
    )  # fmt: skip


def make(arguments: TrainingArguments, models) -> DistillationTrainer:
    student, teacher = models
    # Adam would make large what is small: the gradient of a key's bias is 0 up to rounding.
    optimizer = torch.optim.SGD, {"lr": arguments.learning_rate, "momentum": 0.9}
    return DistillationTrainer(
        student, arguments, train_dataset=tiny.text_dataset(64), processing_class=tiny.tokenizer(),
        teacher_model=teacher, objectives=ALL_TERMS["sum"],
        callbacks=[QATCallback(QuantizationSpec(activation_bits=None))],  # ranges are those of one process's batches
        optimizer_cls_and_kwargs=optimizer,
    )  # fmt: skip


def loaded(folder: Path):
    """Student and teacher as `from_pretrained` gives them, as users have them."""
    return [AutoModelForSequenceClassification.from_pretrained(folder / name) for name in ("student", "teacher")]


def whole_weights(trainer: DistillationTrainer) -> dict[str, torch.Tensor]:
    named = list(trainer.model.named_parameters())
    named += [(f"projection.{name}", p) for name, p in trainer._distillation.projections.maps.named_parameters()]

    def gathered(parameter):
        if not trainer.is_deepspeed_enabled:
            return contextlib.nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters([parameter])

    weights = {}
    for name, parameter in named:
        with gathered(parameter):
            whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            weights[name] = whole.detach().clone().contiguous()
    return weights


def main(folder: str) -> None:
    """The second launch into the same folder goes on from the checkpoint of the first."""
    # accelerate shards on GPUs only, unless it takes the CPU for one.
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    out = Path(folder)
    models = loaded(out)  # before the TrainingArguments: DeepSpeed splits what is loaded after them
    arguments = arguments_for(str(out / "run"), processes=2)
    rank = arguments.process_index
    trainer = make(arguments, models)
    teacher = [p.to_local() if hasattr(p, "to_local") else p for p in trainer.teacher_model.parameters()]
    facts = {
        "type": str(trainer.accelerator.distributed_type),
        "teacher": sum(p.numel() for p in teacher),
        "prepared": len(trainer.accelerator._models),
    }
    checkpoint = out / "run" / "checkpoint-2"
    name = "resumed" if checkpoint.is_dir() else "whole"
    trainer.train(resume_from_checkpoint=str(checkpoint) if name == "resumed" else None)
    facts["logs"] = losses(trainer, "loss", "grad_norm", "task_loss", "logit_kd", "hidden_state_kd", "attention_kd")
    facts["recorded"] = trainer.model.config.hfkdq["distillation"]["teacher"]
    save_file(whole_weights(trainer), out / f"{name}{rank}.safetensors")
    trainer.save_model(str(out / "final"))
    facts["refused"] = refused(trainer, out / f"{name}{rank}")
    (out / f"{name}{rank}.json").write_text(json.dumps(facts))


def refused(trainer: DistillationTrainer, folder: Path) -> dict[str, str]:
    """What cannot be done with the sharded model, and what is said."""

    def attach(callback) -> None:
        callback.on_init_end(trainer.args, trainer.state, trainer.control, model=tiny.bert(0))

    told = {}
    for what, action in {
        "pruning": lambda: attach(PruningCallback(PruningSpec(sparsity=0.5, structure="neuron"))),
        "learned": lambda: attach(QATCallback(QuantizationSpec(range_estimator="learned"))),
        "export": lambda: export_onnx(trainer.model, folder),
    }.items():
        try:
            action()
        except (ValueError, NotImplementedError) as error:
            told[what] = str(error)
    return told


if __name__ == "__main__":
    main(sys.argv[1])
