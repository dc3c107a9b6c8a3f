# SPDX-License-Identifier: Apache-2.0
"""A student that writes its own lessons: what is logged, what runs, and that it goes on, in every way of training."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import DataCollatorForSeq2Seq, LlamaConfig, LlamaForCausalLM, Seq2SeqTrainingArguments, set_seed

from hfkdq.objectives import LogitKD, TaskLoss
from hfkdq.objectives.on_policy import OnPolicyKD
from hfkdq.schedules import Step
from hfkdq.trainer import DistillationTrainer, Seq2SeqDistillationTrainer
from tests import tiny
from tests.launch import accelerate_launch
from tests.trainer.common import assert_equal_weights, losses, weights

VOCABULARY = 16


def llama(seed=0, dropout=0.0, layers=1):
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2,
        max_position_embeddings=32, initializer_range=0.3, attention_dropout=dropout, pad_token_id=0, bos_token_id=2,
        eos_token_id=3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def questions(rows=24, seed=0):
    """Prompts of 1 to 4 tokens with answers of 1 to 3."""
    rng = np.random.default_rng(seed)
    data = {"input_ids": [], "attention_mask": [], "labels": []}
    for _ in range(rows):
        prompt, answer = (rng.integers(4, VOCABULARY, size=rng.integers(1, n)).tolist() for n in (5, 4))
        data["input_ids"].append(prompt + answer)
        data["attention_mask"].append([1] * len(prompt + answer))
        data["labels"].append([-100] * len(prompt) + answer)
    return Dataset.from_dict(data)


def pad(rows):
    return DataCollatorForSeq2Seq(tiny.tokenizer())([dict(row) for row in rows])


def make(arguments, objectives, student=None, teacher=None, cls=DistillationTrainer, **kwargs):
    settings = dict(train_dataset=questions(), data_collator=pad)
    return cls(
        student or llama(0), arguments, teacher_model=teacher or llama(1, layers=2), objectives=objectives,
        **{**settings, **kwargs},
    )  # fmt: skip


class Recording(OnPolicyKD):
    """Keeps what the student wrote and the value of it, per micro batch."""

    name = "on_policy_kd"

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "record", [])

    def run_forward(self, passes, step):
        found = super().run_forward(passes, step)
        wrote = found.student is not None
        self.record.append([{k: v.clone() for k, v in found.batch.items()} if wrote else None])
        return found

    def loss(self, step):
        found = super().loss(step)
        self.record[-1] += [found.item(), int(self.positions(step.batch))]
        return found


def reverse_kl(student, teacher, written):
    """The mean over rows of the mean over what was written of them, row by row and without padding."""
    values = []
    for i in range(len(written["labels"])):
        row = {name: tensor[i : i + 1] for name, tensor in written.items()}
        labels = row.pop("labels")[0]
        if "decoder_input_ids" in row:
            keep = labels != -100
        else:
            row = {"input_ids": row["input_ids"][:, row["attention_mask"][0] == 1]}
            keep = F.pad(labels, (0, 1), value=-100)[1:][: row["input_ids"].shape[1]] != -100
        log_q, log_p = (m(**row).logits[0][keep].float().log_softmax(-1) for m in (student, teacher))
        values.append((log_q.exp() * (log_q - log_p)).sum(-1).mean())
    return torch.stack(values).mean()


def test_the_log_has_the_divergence_on_what_the_student_wrote(training_arguments):
    """Over micro batches and a last one that is smaller, every answer counts the same."""
    objective = Recording(max_new_tokens=5)
    trainer = make(
        training_arguments(max_steps=1, per_device_train_batch_size=8, gradient_accumulation_steps=3, learning_rate=0.0),
        [objective], train_dataset=questions(20),
    )  # fmt: skip
    trainer.train()
    record = objective.record
    assert [count for _, _, count in record] == [8, 8, 4]
    with torch.no_grad():
        for written, value, _ in record:
            by_hand = reverse_kl(trainer.model.eval(), trainer.teacher_model, written)
            assert value == pytest.approx(by_hand.item(), rel=1e-4)
    expected = sum(value * count for _, value, count in record) / 20
    assert losses(trainer, "on_policy_kd", "loss")[0] == pytest.approx([expected, expected], rel=1e-4)
    assert len({tuple(row) for written, *_ in record for row in written["labels"].tolist()}) > 10


def calls(model):
    """The modes of every call of a model from now on: with gradient, or without."""
    seen = []
    model.register_forward_pre_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    return seen


@pytest.mark.parametrize(
    ("objectives", "student_passes", "teacher_passes"),
    [
        ([OnPolicyKD(max_new_tokens=2)], 1, 1),
        ([OnPolicyKD(max_new_tokens=2), TaskLoss()], 2, 1),
        ([OnPolicyKD(max_new_tokens=2), LogitKD()], 2, 2),
        ([OnPolicyKD(fraction=0.0)], 1, 1),
        ([OnPolicyKD(fraction=0.0), TaskLoss(), LogitKD()], 1, 1),
    ],
)
def test_nothing_runs_that_no_term_reads(training_arguments, objectives, student_passes, teacher_passes):
    student, teacher = llama(0), llama(1)
    trainer = make(training_arguments(max_steps=3), objectives, student, teacher)
    seen = calls(student), calls(teacher)
    trainer.train()
    assert sum(seen[0]) == 3 * student_passes
    assert len(seen[1]) == 3 * teacher_passes
    generated = len(seen[0]) - sum(seen[0])
    assert generated == 0 if objectives[0].fraction == 0.0 else 3 <= generated <= 6


def test_with_fraction_0_it_is_plain_distillation_per_sample(training_arguments):
    trainers = []
    for objective in (
        OnPolicyKD(fraction=0.0),
        LogitKD(divergence="reverse_kl", temperature=1.0, per="sample"),
    ):
        trainers.append(make(training_arguments(max_steps=4), [TaskLoss(), objective], llama(0, dropout=0.1)))
        trainers[-1].train()
    assert losses(trainers[0], "loss", "on_policy_kd") == losses(trainers[1], "loss", "logit_kd")
    assert_equal_weights(trainers[0].model, trainers[1].model)


def test_a_schedule_says_when_the_student_writes(training_arguments):
    objective = Recording(fraction=Step(0.0, 1.0, at=0.5), max_new_tokens=3)
    trainer = make(training_arguments(max_steps=6), [objective])
    trainer.train()
    assert [written is not None for written, *_ in objective.record] == [False] * 3 + [True] * 3


@pytest.mark.parametrize("kind", ["divergence falls", "by the mean of both"])
def test_training_on_its_own_answers_brings_the_student_to_the_teacher(training_arguments, kind):
    inner = LogitKD(divergence="reverse_kl" if kind == "divergence falls" else "jsd", temperature=1.0)
    trainer = make(
        training_arguments(max_steps=40, learning_rate=2e-2),
        [OnPolicyKD(objective=inner, fraction=0.7, max_new_tokens=6)],
    )
    trainer.train()
    found = [row[0] for row in losses(trainer, "on_policy_kd")]
    assert np.mean(found[-5:]) < 0.6 * np.mean(found[:2])


def test_a_cut_training_goes_on_bit_for_bit(training_arguments):
    def start(folder, **kwargs):
        arguments = training_arguments(
            folder, max_steps=6, save_strategy="steps", save_steps=2, gradient_accumulation_steps=2, learning_rate=1e-2,
            per_device_train_batch_size=4,
        )  # fmt: skip
        objectives = [TaskLoss(weight=0.3), Recording(fraction=0.5, max_new_tokens=4)]
        return make(arguments, objectives, llama(0, dropout=0.2), **kwargs)

    whole = start("out")
    whole.train()
    assert {written is None for written, *_ in whole.objectives[1].record} == {True, False}
    torch.manual_seed(99)
    again = start("out")
    again.train(resume_from_checkpoint=str(Path(whole.args.output_dir, "checkpoint-2")))
    assert losses(again, "loss", "on_policy_kd", "grad_norm") == losses(whole, "loss", "on_policy_kd", "grad_norm")
    assert_equal_weights(again.model, whole.model)
    for ours, theirs in zip(again.objectives[1].record, whole.objectives[1].record[4:], strict=True):
        assert ours[1:] == theirs[1:]
        assert (ours[0] is None) == (theirs[0] is None)
        assert ours[0] is None or all(torch.equal(ours[0][k], theirs[0][k]) for k in ours[0])


def test_mixed_precision_and_checkpointing_leave_the_gradient(training_arguments):
    """What was cast for sampling, without gradient, is not what the student is trained through."""
    found = {}
    for name, settings in (
        ("plain", {}),
        ("checkpointed", dict(gradient_checkpointing=True)),
        ("bf16", dict(bf16=True)),  # last, as it stays in the environment
    ):
        objective = Recording(max_new_tokens=4)
        trainer = make(training_arguments(name, max_steps=1, optim="sgd", learning_rate=0.1, **settings), [objective])
        before = weights(trainer.model)
        trainer.train()
        moved = [float((value - before[key]).norm()) for key, value in weights(trainer.model).items()]
        assert min(moved) > 0
        found[name] = objective.record[0], moved
    written = [record[0]["labels"] for record, _ in found.values()]
    assert torch.equal(written[0], written[1])
    np.testing.assert_allclose(found["plain"][1], found["checkpointed"][1], rtol=1e-4)
    if torch.equal(written[0], written[2]):
        np.testing.assert_allclose(found["plain"][1], found["bf16"][1], rtol=0.1)
    assert found["bf16"][0][1] == pytest.approx(found["plain"][0][1], rel=0.2)


@pytest.mark.parametrize("itself", [False, True], ids=["another model", "its own base model"])
def test_an_adapter_learns_from_its_own_answers(training_arguments, itself):
    peft = pytest.importorskip("peft")
    student = peft.get_peft_model(
        llama(0), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    )
    for name, parameter in student.named_parameters():
        if "lora_B" in name:  # else it is its base model
            torch.nn.init.normal_(parameter, std=0.3)
    objective = Recording(max_new_tokens=4)
    teacher = student.get_base_model() if itself else llama(1)
    settings = student.generation_config
    trainer = make(training_arguments(max_steps=1, learning_rate=0.0), [objective], student, teacher)
    trainer.train()
    assert student.generation_config is settings
    written, value, _ = objective.record[0]
    student.eval()
    with torch.no_grad():
        if itself:
            ours, row = student(**{k: v for k, v in written.items() if k != "labels"}).logits, dict(written)
            with student.disable_adapter():
                theirs = student(**{k: v for k, v in row.items() if k != "labels"}).logits
            mask = F.pad(written["labels"], (0, 1), value=-100)[:, 1:] != -100
            log_q, log_p = ours.log_softmax(-1), theirs.log_softmax(-1)
            rows = (log_q.exp() * (log_q - log_p)).sum(-1) * mask
            expected = (rows.sum(1) / mask.sum(1)).mean()
        else:
            expected = reverse_kl(student, teacher, written)
    assert value == pytest.approx(expected.item(), rel=1e-4)
    assert value > 1e-3


def test_an_encoder_decoder_answers_what_its_encoder_reads(training_arguments):
    rows = tiny.text_dataset(16)
    data = Dataset.from_dict(
        {
            "input_ids": list(rows["input_ids"]),
            "attention_mask": list(rows["attention_mask"]),
            "labels": [[*ids[1:-1][::-1], 3] for ids in rows["input_ids"]],
        }
    )
    student, objective = tiny.t5(0), Recording(max_new_tokens=5)
    student.generation_config.eos_token_id = [3, *range(40, 70)]
    trainer = make(
        training_arguments(cls=Seq2SeqTrainingArguments, max_steps=2, learning_rate=0.0), [TaskLoss(), objective], student,
        tiny.t5(1, layers=3), cls=Seq2SeqDistillationTrainer, train_dataset=data,
        data_collator=DataCollatorForSeq2Seq(tiny.tokenizer(), model=student),
    )  # fmt: skip
    trainer.train()
    for (written, value, count), (logged,) in zip(objective.record, losses(trainer, "on_policy_kd"), strict=True):
        with torch.no_grad():
            expected = reverse_kl(student.eval(), trainer.teacher_model, written)
        assert value == pytest.approx(expected.item(), rel=1e-4)
        assert logged == pytest.approx(value, rel=1e-4)
        assert count == 8
        assert (written["labels"] == -100).any()


FOUND = {"found": True, "not found": False}


@pytest.mark.one_line
def test_two_processes_take_the_mean_of_what_both_wrote(tmp_path):
    accelerate_launch(Path(__file__), tmp_path)
    for name in FOUND:
        runs = [torch.load(tmp_path / f"{name}-{rank}.pt") for rank in range(2)]
        student, teacher = llama(0), llama(1, layers=2)
        value = sum(reverse_kl(student, teacher, run["written"]) for run in runs) / 2
        value.backward()
        for key, parameter in student.named_parameters():
            expected = parameter.detach() - 0.5 * parameter.grad
            torch.testing.assert_close(runs[0]["weights"][key], expected, rtol=1e-3, atol=1e-5)
            assert torch.equal(runs[0]["weights"][key], runs[1]["weights"][key])
        assert runs[0]["logged"] == pytest.approx(value.item(), rel=1e-4)


def main(folder):
    """One step of gradient descent under `accelerate launch`, for either way in which processes find what to exchange."""
    from transformers import TrainingArguments

    for name, find in FOUND.items():
        arguments = TrainingArguments(
            f"{folder}/{name}", report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True, use_cpu=True,
            max_steps=1, per_device_train_batch_size=4, optim="sgd", learning_rate=0.5, lr_scheduler_type="constant",
            max_grad_norm=0.0, ddp_find_unused_parameters=find,
        )  # fmt: skip
        objective = Recording(max_new_tokens=4)
        trainer = make(arguments, [objective])
        trainer.train()
        done = {
            "written": objective.record[0][0],
            "weights": weights(trainer.model),
            "logged": losses(trainer, "on_policy_kd")[0][0],
        }
        torch.save(done, f"{folder}/{name}-{arguments.process_index}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
