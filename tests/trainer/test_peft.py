# SPDX-License-Identifier: Apache-2.0
"""PEFT students: adapters alone are trained and saved, and the base model can be the teacher."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig, DataCollatorForLanguageModeling, LlamaForCausalLM, Trainer

from hfkdq.losses import forward_kl
from hfkdq.objectives import HiddenStateKD, LogitKD, TaskLoss
from hfkdq.trainer import DistillationTrainer
from hfkdq.trainer.checkpoints import STATE_FILE
from tests import tiny

from .common import ALL_TERMS, StopAt, assert_equal_weights, losses, make_trainer, teacher_of, weights

peft = pytest.importorskip("peft")


def adapted(model, **kwargs):
    settings = dict(target_modules=["query", "value"], r=4, lora_alpha=16, lora_dropout=0.0)
    return peft.get_peft_model(model, peft.LoraConfig(**{**settings, **kwargs}))


def classifier(dropout=0.0, **kwargs):
    kwargs = {"modules_to_save": ["classifier"], "task_type": "SEQ_CLS", "lora_dropout": dropout, **kwargs}
    return adapted(tiny.bert(0, hidden_dropout_prob=dropout), **kwargs)


def language_model(**kwargs):
    return adapted(tiny.llama(0), **{"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **kwargs})


def for_language_models():
    tokenizer = tiny.tokenizer()
    return dict(
        train_dataset=tiny.text_dataset().remove_columns("labels"),
        eval_dataset=tiny.text_dataset(10, seed=9).remove_columns("labels"),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )


STUDENTS = {
    "bert": lambda: (classifier(), teacher_of(), {}),
    "llama": lambda: (language_model(), tiny.llama(1, layers=4, hidden=48), for_language_models()),
}


def trainer_of(kind, arguments, objectives=None, **kwargs):
    student, teacher, data = STUDENTS[kind]()
    return make_trainer(arguments, objectives or ALL_TERMS["sum"], student, teacher, **{**data, **kwargs})


# ---------------------------------------------------------------------- what is trained and saved


@pytest.mark.parametrize("kind", STUDENTS)
def test_checkpoints_hold_the_adapters_alone_as_those_of_trainer(training_arguments, tmp_path, kind):
    files, keys = [], []
    for cls in ("ours", "plain"):
        arguments = training_arguments(cls, max_steps=2, save_strategy="steps", save_steps=1)
        trainer = trainer_of(kind, arguments) if cls == "ours" else trainer_of(kind, arguments, cls=Trainer)
        before = weights(trainer.model)
        trainer.train()
        checkpoint = tmp_path / cls / "checkpoint-2"
        files.append({path.name for path in checkpoint.iterdir()})
        keys.append({key: value.shape for key, value in load_file(checkpoint / "adapter_model.safetensors").items()})
        if cls == "plain":
            break
        for name, parameter in trainer.model.named_parameters():
            assert parameter.requires_grad == (not torch.equal(parameter, before[name])), name
        maps = trainer._distillation.projections.maps.state_dict()
        optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
        trained = [
            *(p for p in trainer.model.parameters() if p.requires_grad),
            *trainer._distillation.projections.parameters(),
        ]
        assert optimized == {id(p) for p in trained}
        assert maps.keys() <= load_file(checkpoint / STATE_FILE).keys()
        first = load_file(tmp_path / cls / "checkpoint-1" / STATE_FILE)
        assert all(not torch.equal(first[key], value) for key, value in maps.items())
    assert files[0] - {STATE_FILE} == files[1]
    assert keys[0] == keys[1]
    json.loads((tmp_path / "ours" / "checkpoint-2" / "adapter_config.json").read_text())


def test_saved_adapters_give_the_trained_student_again(training_arguments, tmp_path):
    trainer = trainer_of("bert", training_arguments(max_steps=3))
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    assert not (tmp_path / "final" / STATE_FILE).exists()
    again = peft.PeftModel.from_pretrained(tiny.bert(0), tmp_path / "final").eval()
    batch = tiny.batch(tiny.bert(0))
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, trainer.model.eval()(**batch).logits)
        assert not torch.allclose(again(**batch).logits, tiny.bert(0)(**batch).logits, atol=1e-3)
    assert trainer.model.merge_and_unload().config.hfkdq["distillation"]["steps"] == 3


@pytest.mark.parametrize("kind", STUDENTS)
def test_resuming_adapters_equals_never_stopping(training_arguments, kind):
    def run(folder, stop=None, resume=None):
        arguments = training_arguments(folder, max_steps=5, save_strategy="steps", save_steps=2, logging_steps=2)
        trainer = trainer_of(kind, arguments, callbacks=[StopAt(stop)] if stop else None)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run("whole")
    run("cut", stop=2)
    again = run("cut", resume=True)
    assert_equal_weights(whole.model, again.model)
    assert_equal_weights(whole._distillation.projections.maps, again._distillation.projections.maps)
    names = ("loss", "grad_norm", "logit_kd", "hidden_state_kd")
    assert losses(whole, *names)[-1] == losses(again, *names)[-1]


def test_the_best_adapters_are_loaded_at_the_end(training_arguments, tmp_path):
    scores = iter([2.0, 3.0, 1.0])
    arguments = training_arguments(
        max_steps=3, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
        load_best_model_at_end=True, metric_for_best_model="score", greater_is_better=True,
    )  # fmt: skip
    trainer = trainer_of("bert", arguments, compute_metrics=lambda prediction: {"score": next(scores)})
    trainer.train()
    saved = [load_file(tmp_path / "out" / f"checkpoint-{i}" / "adapter_model.safetensors") for i in (2, 3)]
    now = peft.get_peft_model_state_dict(trainer.model)
    assert all(torch.equal(saved[0][key], value) for key, value in now.items())
    assert any(not torch.equal(saved[1][key], value) for key, value in now.items())


# ---------------------------------------------------------------------- the base model as teacher


def test_the_base_model_teaches_as_a_copy_of_it_would_without_being_one(training_arguments):
    """A copy of the base made before adapters were added answers the same; nothing of the student is frozen for it."""
    runs = []
    for copied in (False, True):
        student = classifier(dropout=0.0)
        before = {id(p) for p in student.parameters()}
        trainable = {n for n, p in student.named_parameters() if p.requires_grad}
        teacher = tiny.bert(0) if copied else student.get_base_model()
        arguments = training_arguments(f"{copied}", max_steps=4, learning_rate=3e-2)
        trainer = make_trainer(arguments, ALL_TERMS["sum"], student, teacher)
        trainer.train()
        assert {id(p) for p in student.parameters()} == before
        assert {n for n, p in student.named_parameters() if p.requires_grad} == trainable
        runs.append(trainer)
    names = ("loss", "grad_norm", "logit_kd", "hidden_state_kd", "attention_kd")
    np.testing.assert_allclose(losses(runs[0], *names), losses(runs[1], *names), rtol=1e-3, atol=1e-5)
    assert losses(runs[0], "logit_kd")[-1][0] > 1e-3
    assert_equal_weights(runs[0].model, runs[1].model, rtol=1e-3, atol=1e-4)


def test_the_teacher_within_the_student_answers_without_adapters_and_in_eval_mode(training_arguments):
    student, seen = classifier(dropout=0.3), []

    def watch(student_out, teacher_out, batch):
        seen.append((batch, teacher_out.logits, student.training))
        assert not teacher_out.logits.requires_grad
        return (student_out.logits - teacher_out.logits).square().mean()

    trainer = make_trainer(
        training_arguments(max_steps=3, learning_rate=0.1), [watch], student, student.get_base_model()
    )
    trainer.train()
    untouched = tiny.bert(0)
    for batch, logits, training in seen:
        with torch.no_grad():
            expected = untouched(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        torch.testing.assert_close(logits, expected)
        assert training
    assert len({id(m.weight) for m in student.modules() if isinstance(m, torch.nn.Embedding)}) == 3


def test_the_teacher_within_the_student_does_not_disturb_its_dropout(training_arguments):
    runs = []
    for cls in ("plain", "ours"):
        student, arguments = classifier(dropout=0.2), training_arguments(cls, max_steps=4)
        kwargs = dict(cls=Trainer) if cls == "plain" else dict(teacher=student.get_base_model())
        trainer = make_trainer(arguments, [TaskLoss(), LogitKD(weight=0.0)], student, **kwargs)
        trainer.train()
        runs.append(losses(trainer, "loss", "grad_norm"))
    np.testing.assert_allclose(*runs, rtol=1e-3)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "autocast"])
def test_all_adapters_learn_from_the_base_model(training_arguments, bf16):
    """Weights that the teacher's pass casts under autocast must not stay cached without gradient for the student's."""
    student = classifier(modules_to_save=["classifier", "pooler"])
    before = weights(student)
    trainer = make_trainer(
        training_arguments(max_steps=3, bf16=bf16), [TaskLoss(), LogitKD()], student, student.get_base_model()
    )
    trainer.train()
    for name, parameter in student.named_parameters():
        assert parameter.requires_grad == (not torch.equal(parameter, before[name])), name


def test_adapters_frozen_by_the_user_stay_frozen(training_arguments):
    student = classifier()
    for name, parameter in student.named_parameters():
        if "layer.0" in name:
            parameter.requires_grad_(False)
    trainable = {n for n, p in student.named_parameters() if p.requires_grad}
    trainer = make_trainer(training_arguments(max_steps=2), [TaskLoss(), LogitKD()], student, student.get_base_model())
    trainer.train()
    assert {n for n, p in student.named_parameters() if p.requires_grad} == trainable
    assert all(p.grad is None for n, p in student.named_parameters() if n not in trainable)


def test_of_several_adapters_the_active_one_learns(training_arguments, tmp_path):
    student = language_model()
    student.add_adapter("other", peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, task_type="CAUSAL_LM"))
    student.set_adapter("other")
    before = weights(student)
    trainer = make_trainer(
        training_arguments(max_steps=2, save_strategy="steps", save_steps=2), [TaskLoss(), LogitKD()], student,
        student.get_base_model(), **for_language_models(),
    )  # fmt: skip
    trainer.train()
    assert student.active_adapter == "other"
    changed = {name for name, value in weights(student).items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if ".lora_" in name and ".other." in name}
    files = {
        p.relative_to(tmp_path / "out" / "checkpoint-2").as_posix() for p in Path(tmp_path).rglob("*.safetensors")
    }
    assert files == {"adapter_model.safetensors", "other/adapter_model.safetensors", STATE_FILE}


# ---------------------------------------------------------------------- quantized base


@pytest.mark.parametrize("bits", ["8-bit", "nf4"])
@pytest.mark.parametrize("itself", [True, False], ids=["base as teacher", "float teacher"])
def test_a_student_with_a_quantized_base_learns(training_arguments, tmp_path, bits, itself):
    pytest.importorskip("bitsandbytes")
    settings = dict(load_in_8bit=True) if bits == "8-bit" else dict(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    torch.manual_seed(0)
    config = {**tiny.llama().config.to_dict(), "hidden_size": 128, "head_dim": 32, "intermediate_size": 256}
    LlamaForCausalLM(type(tiny.llama().config).from_dict(config)).save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=BitsAndBytesConfig(**settings), dtype=torch.float32
    )
    base = peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    student = adapted(base, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    teacher = base if itself else tiny.llama(1, layers=4)
    seen = []

    def watch(student_out, teacher_out, batch):
        seen.append((batch, student_out.logits.detach(), teacher_out.logits))
        return student_out.logits.sum() * 0

    before = weights(student)
    trainer = make_trainer(
        training_arguments(max_steps=3, per_device_train_batch_size=24, learning_rate=1e-2),
        [LogitKD(temperature=1.0), watch, *([] if itself else [HiddenStateKD()])], student, teacher,
        **for_language_models(),
    )  # fmt: skip
    trainer.train()
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            assert not torch.equal(parameter, before[name]), name
    first, *_, last = losses(trainer, "logit_kd")
    assert last < first
    batch, ours, theirs = seen[-1]
    mask = batch["labels"][:, 1:].ne(-100)
    assert forward_kl(ours, theirs)[:, :-1][mask].mean().item() == pytest.approx(last[0], rel=1e-3)
    if itself:
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
        with torch.no_grad(), student.disable_adapter():
            torch.testing.assert_close(theirs, student.eval()(**inputs).logits, rtol=1e-2, atol=1e-2)


# ---------------------------------------------------------------------- refused, or right all the same


def test_the_student_as_its_own_teacher_is_refused_with_the_way_to_do_it(training_arguments):
    student = classifier()
    trainable = {n for n, p in student.named_parameters() if p.requires_grad}
    with pytest.raises(ValueError, match=r"teacher_model=model\.get_base_model\(\)"):
        make_trainer(training_arguments(), [LogitKD()], student, student)
    assert {n for n, p in student.named_parameters() if p.requires_grad} == trainable


def test_the_base_of_what_model_init_makes_is_refused_as_teacher(training_arguments):
    student = classifier()
    with pytest.raises(ValueError, match="model_init makes a new student"):
        DistillationTrainer(
            args=training_arguments(), model_init=lambda: student, train_dataset=tiny.text_dataset(),
            teacher_model=student.get_base_model(), objectives=[LogitKD()],
        )  # fmt: skip


def prompted(kind):
    if kind == "causal":
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        return peft.get_peft_model(tiny.llama(0), config)
    config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    return peft.get_peft_model(tiny.bert(0), config)


@pytest.mark.parametrize("objective", [LogitKD(), HiddenStateKD()], ids=["logits", "hidden"])
def test_virtual_tokens_that_shift_positions_are_refused(training_arguments, objective):
    with pytest.raises(ValueError, match=r"(?i)virtual tokens"):
        make_trainer(
            training_arguments(), [objective], prompted("causal"), tiny.llama(1, layers=4), **for_language_models()
        )


@pytest.mark.parametrize("kind", ["causal", "classifier"])
def test_the_base_of_a_student_with_virtual_tokens_is_refused_as_teacher(training_arguments, kind):
    """PEFT leaves the trained head in place when it takes virtual tokens out, and fails for models without generate."""
    student = prompted(kind)
    with pytest.raises(ValueError, match="Load the base model a second time"):
        make_trainer(training_arguments(), [LogitKD()], student, student.get_base_model())


def test_a_classifier_with_virtual_tokens_learns_from_a_teacher_without(training_arguments):
    student = prompted("classifier")
    before = weights(student)
    trainer = make_trainer(training_arguments(max_steps=3, learning_rate=0.02), [LogitKD()], student, tiny.bert(1))
    trainer.train()
    for name, parameter in student.named_parameters():
        assert parameter.requires_grad == (not torch.equal(parameter, before[name])), name
    assert losses(trainer, "logit_kd")[-1] < losses(trainer, "logit_kd")[0]
