# SPDX-License-Identifier: Apache-2.0
"""The mixin and trainers of others: whose `compute_loss` is called, and that what they log is still logged."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from transformers import Trainer, TrainerCallback

from hfkdq.losses import forward_kl, masked_mean
from hfkdq.objectives import LogitKD, TaskLoss
from hfkdq.trainer import DistillationMixin, DistillationTrainer
from tests import tiny

from .common import losses, make_trainer

BOTH = [TaskLoss(weight=0.5), LogitKD()]


class DoubledTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        return (2 * loss, outputs) if return_outputs else 2 * loss


class MixinBefore(DistillationMixin, DoubledTrainer):
    pass


class MixinBehind(DoubledTrainer, DistillationTrainer):
    pass


@pytest.mark.parametrize("steps", [1, 2])
def test_the_order_of_bases_says_which_loss_a_compute_loss_of_the_user_gets(training_arguments, steps):
    """Before a trainer the mixin takes its loss for the task loss; behind it hands it the sum of all objectives."""
    rows, evaluated = {}, {}
    for cls in (DistillationTrainer, MixinBefore, MixinBehind):
        arguments = training_arguments(
            cls.__name__, max_steps=1, gradient_accumulation_steps=steps, per_device_train_batch_size=12 // steps
        )
        trainer = make_trainer(arguments, BOTH, cls=cls)
        evaluated[cls] = trainer.evaluate()["eval_loss"]
        trainer.train()
        rows[cls] = losses(trainer, "loss", "task_loss", "logit_kd")[0]
    loss, task, kd = rows[DistillationTrainer]
    assert rows[MixinBefore] == pytest.approx([task + kd, 2 * task, kd], rel=1e-3)
    assert rows[MixinBehind] == pytest.approx([2 * loss, task, kd], rel=1e-3)
    plain = evaluated.pop(DistillationTrainer)
    assert list(evaluated.values()) == pytest.approx([2 * plain] * 2, rel=1e-5)


def test_a_subclass_can_add_a_loss_of_its_own_to_all_objectives(training_arguments):
    class WithPenalty(DistillationTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            loss = loss + 0.1 * outputs.logits.square().mean()
            return (loss, outputs) if return_outputs else loss

    with_penalty, without = (
        make_trainer(training_arguments(cls.__name__, max_steps=1, per_device_train_batch_size=24), BOTH, cls=cls)
        for cls in (WithPenalty, DistillationTrainer)
    )
    batch = with_penalty.data_collator([dict(row) for row in with_penalty.train_dataset])
    with torch.no_grad():
        penalty = with_penalty.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    for trainer in (with_penalty, without):
        trainer.train()
    one, two = (losses(trainer, "loss", "logit_kd")[0] for trainer in (with_penalty, without))
    assert one[0] - two[0] == pytest.approx(0.1 * penalty.square().mean().item(), rel=2e-2)
    assert one[1] == pytest.approx(two[1], rel=1e-5)


def test_the_model_card_has_the_tag_and_what_trainer_writes(training_arguments, tmp_path):
    trainer = make_trainer(training_arguments(max_steps=1), BOTH)
    trainer.train()
    for tags in (None, "mine", ["mine", "yours"]):
        trainer.create_model_card(
            language=["en"], license="mit", tags=tags, model_name="Tiny", finetuned_from="me/base"
        )
        card = ModelCard.load(tmp_path / "out" / "README.md")
        assert {"distillation", *([tags] if isinstance(tags, str) else tags or [])} <= set(card.data.tags)
        assert (card.data.language, card.data.license, card.data.base_model) == (["en"], "mit", "me/base")
        assert "# Tiny" in card.content
    plain = make_trainer(training_arguments("plain"), teacher=None)
    plain.create_model_card()
    assert "distillation" not in (ModelCard.load(tmp_path / "plain" / "README.md").data.tags or [])


# ---------------------------------------------------------------------- TRL


def conversations(rows=12):
    return Dataset.from_dict({"input_ids": tiny.text_dataset(rows)["input_ids"]})


class KeepGradients(TrainerCallback):
    def __init__(self):
        self.found = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "adapters"])
@pytest.mark.parametrize("steps", [1, 3])
def test_the_mixin_distils_with_the_sft_trainer_of_trl(training_arguments, adapters, steps):
    trl = pytest.importorskip("trl")
    peft = pytest.importorskip("peft") if adapters else None

    class SFTDistillationTrainer(DistillationMixin, trl.SFTTrainer):
        pass

    config = None
    if adapters:
        config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", lora_dropout=0.0)
    arguments = training_arguments(
        cls=trl.SFTConfig, max_steps=1, per_device_train_batch_size=12 // steps, gradient_accumulation_steps=steps,
        max_grad_norm=0.0, bf16=False, gradient_checkpointing=False, learning_rate=0.0, loss_type="nll",
    )  # fmt: skip
    keep, teacher = KeepGradients(), tiny.llama(1, layers=4)
    trainer = SFTDistillationTrainer(
        tiny.llama(0), arguments, train_dataset=conversations(), eval_dataset=conversations(4), callbacks=[keep],
        processing_class=tiny.tokenizer(), peft_config=config, teacher_model=teacher, objectives=BOTH,
    )  # fmt: skip
    trainer.train()
    row = next(row for row in trainer.state.log_history if "loss" in row)
    assert {"entropy", "mean_token_accuracy", "num_tokens"} <= row.keys()

    student = trainer.model.train()
    assert isinstance(student, peft.PeftModel) == adapters if adapters else True
    batch = trainer.data_collator([dict(row) for row in trainer.train_dataset])
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask") if key in batch}
    ours, theirs = student(**inputs).logits[:, :-1], teacher(**inputs).logits[:, :-1].detach()
    labels = batch["labels"][:, 1:]
    task = torch.nn.functional.cross_entropy(ours.flatten(0, 1), labels.flatten())
    divergence = masked_mean(forward_kl(ours, theirs, 2.0), labels.ne(-100))
    total = 0.5 * task + divergence
    assert row["task_loss"] == pytest.approx(task.item(), rel=1e-3)
    assert row["logit_kd"] == pytest.approx(divergence.item(), rel=1e-3)
    assert row["loss"] == pytest.approx(total.item(), rel=1e-3)
    student.zero_grad()
    total.backward()
    expected = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    assert keep.found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(keep.found[name], gradient, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert np.isfinite(trainer.evaluate()["eval_loss"])


def test_the_base_of_the_adapters_that_sft_adds_can_be_the_teacher(training_arguments):
    trl, peft = pytest.importorskip("trl"), pytest.importorskip("peft")

    class SFTDistillationTrainer(DistillationMixin, trl.SFTTrainer):
        pass

    base = tiny.llama(0)
    arguments = training_arguments(cls=trl.SFTConfig, max_steps=4, bf16=False, learning_rate=0.05, loss_type="nll")
    trainer = SFTDistillationTrainer(
        base, arguments, train_dataset=conversations(), processing_class=tiny.tokenizer(), teacher_model=base,
        peft_config=peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"), objectives=BOTH,
    )  # fmt: skip
    trainer.train()
    rows = losses(trainer, "logit_kd")
    assert rows[0][0] == pytest.approx(0, abs=1e-5)
    assert rows[-1][0] > 1e-4
    assert any(p.requires_grad for p in trainer.model.parameters())
