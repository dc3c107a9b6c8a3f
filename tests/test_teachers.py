# SPDX-License-Identifier: Apache-2.0
"""Teachers: loaded by name, kept as they are, placed anywhere, and asked for no more than objectives read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from accelerate import Accelerator
from transformers import BitsAndBytesConfig

from hfkdq.losses import forward_kl
from hfkdq.objectives import AttentionKD, HiddenStateKD, LogitKD, TaskLoss
from hfkdq.teachers import FrozenTeacher, fingerprint, load_teacher
from hfkdq.trainer import DistillationTrainer

from . import tiny
from .hub_server import loopback_hub  # noqa: F401
from .launch import python_path
from .trainer.common import ALL_TERMS, losses, make_trainer, teacher_of, weights

FIVE = int(transformers.__version__.split(".")[0]) >= 5
NONE = {"hidden_states": None, "attentions": None}


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "teacher"
    teacher_of().save_pretrained(folder)
    return folder


def trained(arguments, teacher, objectives=None, **kwargs):
    trainer = make_trainer(arguments, objectives or [TaskLoss(), LogitKD()], teacher=teacher, **kwargs)
    trainer.train()
    return losses(trainer, "loss", "grad_norm", "logit_kd")


# ---------------------------------------------------------------------- by name


@pytest.mark.parametrize("kind", [str, Path])
def test_a_teacher_named_by_its_folder_teaches_as_the_loaded_one(training_arguments, folder, kind):
    arguments = training_arguments(max_steps=2)
    trainer = make_trainer(arguments, ALL_TERMS["sum"], teacher=kind(folder))
    trainer.train()
    expected = trained(training_arguments(max_steps=2), teacher_of(), ALL_TERMS["sum"])
    assert losses(trainer, "loss", "grad_norm", "logit_kd") == expected
    assert type(trainer.teacher_model) is type(teacher_of())
    assert not any(p.requires_grad for p in trainer.teacher_model.parameters())


def test_arguments_to_load_a_teacher_reach_from_pretrained(training_arguments, folder):
    kwargs = {"dtype": torch.bfloat16, "attn_implementation": "eager"}
    trainer = make_trainer(training_arguments(max_steps=1), [LogitKD()], teacher=folder, teacher_init_kwargs=kwargs)
    assert {p.dtype for p in trainer.teacher_model.parameters()} == {torch.bfloat16}
    assert trainer.teacher_model.config._attn_implementation == "eager"
    trainer.train()
    assert trainer.model.dtype == torch.float32
    loaded = teacher_of(attn_implementation="eager").to(torch.bfloat16)
    expected = trained(training_arguments(max_steps=1), loaded, [LogitKD()])
    assert losses(trainer, "loss", "grad_norm", "logit_kd") == expected


@pytest.mark.parametrize("teacher", [None, "loaded"])
def test_arguments_to_load_a_loaded_teacher_are_refused(training_arguments, teacher):
    objectives = [TaskLoss()] if teacher is None else [LogitKD()]
    with pytest.raises(ValueError, match=r"teacher_init_kwargs says how to load.*None|loaded already"):
        make_trainer(
            training_arguments(), objectives, teacher=teacher and teacher_of(), teacher_init_kwargs={"dtype": "auto"}
        )


def test_pickled_weights_are_refused(training_arguments, folder):
    torch.save(teacher_of().state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        make_trainer(training_arguments(), [LogitKD()], teacher=folder)


CODE = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import BertConfig, BertForSequenceClassification
class Config(BertConfig):
    model_type = {model_type!r}
class Model(BertForSequenceClassification):
    config_class = Config
"""


@pytest.mark.parametrize("model_type", ["bert", "foreign"])
def test_code_of_a_repository_is_never_run(folder, tmp_path, monkeypatch, model_type):
    """A known architecture is loaded without it, an unknown one is refused; nobody is asked whether to run it."""
    marker = tmp_path / "ran"
    monkeypatch.setattr("builtins.input", lambda *args: "y")
    (folder / "code.py").write_text(CODE.format(marker=str(marker), model_type=model_type))
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "code.Config", "AutoModelForSequenceClassification": "code.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": model_type, "auto_map": names}))
    if model_type == "bert":
        assert type(load_teacher(str(folder))) is type(teacher_of())
    else:
        with pytest.raises(ValueError, match="code"):
            load_teacher(str(folder))
    with pytest.raises(ValueError, match=r"trust_remote_code is set.*Load it yourself"):
        load_teacher(str(folder), {"trust_remote_code": True})
    assert not marker.exists()


FROM_HUB = """
import json, sys, torch
from transformers import TrainingArguments
from hfkdq import DistillationTrainer, LogitKD
from hfkdq.teachers import fingerprint
from tests import tiny

trainer = DistillationTrainer(
    tiny.bert(0), TrainingArguments(sys.argv[1], use_cpu=True, max_steps=1, logging_steps=1, report_to=[], seed=0,
    per_device_train_batch_size=8, save_strategy="no", disable_tqdm=True, learning_rate=1e-3),
    train_dataset=tiny.text_dataset(), processing_class=tiny.tokenizer(), objectives=[LogitKD()],
    teacher_model="me/teacher", teacher_init_kwargs={"revision": "second", "dtype": torch.bfloat16})
trainer.train()
print(json.dumps([trainer.state.log_history[0]["logit_kd"], fingerprint(trainer.teacher_model)]))
"""


@pytest.mark.one_line
def test_a_teacher_named_by_its_hub_id_is_downloaded_at_the_revision_asked_for(
    training_arguments, hub_server, folder, tmp_path
):
    """Its fingerprint there is the one it has in this process, as resuming needs."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=hub_server.url, token=hub_server.token)
    api.create_repo("me/teacher")
    tiny.bert(5).save_pretrained(tmp_path / "other")
    api.upload_folder(repo_id="me/teacher", folder_path=tmp_path / "other")
    api.create_branch("me/teacher", branch="second")
    api.upload_folder(repo_id="me/teacher", folder_path=folder, revision="second")
    script = [sys.executable, "-c", FROM_HUB, str(tmp_path / "out")]
    environment = {**hub_server.environment(tmp_path / "home"), "PYTHONPATH": python_path()}
    threads = str(torch.get_num_threads())  # as here, where the same numbers are computed
    result = subprocess.run(
        script, env={**environment, "OMP_NUM_THREADS": threads}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    teaching, known_as = json.loads(result.stdout.splitlines()[-1])
    same = teacher_of().to(torch.bfloat16)
    assert known_as == fingerprint(same)
    expected = trained(training_arguments(max_steps=1), same, [LogitKD()])
    assert teaching == pytest.approx(expected[0][2], rel=1e-4)


# ---------------------------------------------------------------------- untouched


def test_a_trainer_leaves_class_and_forward_of_its_teacher_alone(training_arguments, folder):
    """`Accelerator.prepare_model` would put a forward of its own on it, and another trainer a second around that."""
    teacher = teacher_of()
    before, kind = set(vars(teacher)), type(teacher)
    configuration, state = teacher.config.to_dict(), weights(teacher)
    for number in range(2):
        arguments = training_arguments(f"{number}", max_steps=1, bf16=True)
        make_trainer(arguments, ALL_TERMS["sum"], teacher=teacher).train()
    assert type(teacher) is kind
    assert "forward" not in vars(teacher)
    assert not teacher._forward_hooks
    assert not teacher._forward_pre_hooks
    assert set(vars(teacher)) - before <= {"_output_capturing_hooks_installed"}
    assert teacher.config.to_dict() == configuration
    assert all(torch.equal(value, state[key]) for key, value in teacher.state_dict().items())


def test_the_teacher_answers_in_eval_mode_though_the_user_trains_it_meanwhile(training_arguments):
    teacher = teacher_of(hidden_dropout_prob=0.5)
    trainer = make_trainer(training_arguments(max_steps=2), [LogitKD()], teacher=teacher)
    modes = []
    teacher.register_forward_pre_hook(lambda module, args: modes.append(module.training))
    teacher.train()
    trainer.train()
    assert modes == [False, False]


def test_the_teacher_runs_before_the_student(training_arguments):
    """Its activations are then freed before those of the student come, which are kept for the backward pass."""
    teacher, student, order = teacher_of(), tiny.bert(0), []
    trainer = make_trainer(training_arguments(max_steps=2), ALL_TERMS["sum"], student, teacher)
    for name, model in (("teacher", teacher), ("student", student)):
        model.register_forward_pre_hook(lambda module, args, n=name: order.append(n))
    trainer.train()
    assert order == ["teacher", "student"] * 2


# ---------------------------------------------------------------------- fingerprint


def test_the_fingerprint_tells_weights_types_and_classes_apart():
    teacher = tiny.bert(1)
    found = [fingerprint(teacher), fingerprint(tiny.bert(2)), fingerprint(tiny.bert_tokens(1))]
    found.append(fingerprint(tiny.bert(1).to(torch.bfloat16)))
    for name, parameter in teacher.named_parameters():
        kept = parameter.detach().clone()
        parameter.data = torch.randn_like(parameter)
        found.append(fingerprint(teacher))
        parameter.data = kept
        assert fingerprint(teacher) == found[0], name
    assert len(set(found)) == len(found)


# ---------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "autocast"])
def test_a_half_precision_teacher_teaches_a_float32_student_nearly_as_itself(training_arguments, dtype, bf16):
    half, whole = teacher_of().to(dtype), teacher_of()
    objectives = [TaskLoss(weight=0.5), LogitKD(), HiddenStateKD()]
    rows = []
    for name, teacher in (("half", half), ("whole", whole)):
        trainer = make_trainer(training_arguments(name, max_steps=2, bf16=bf16), objectives, teacher=teacher)
        trainer.train()
        assert trainer.model.dtype == torch.float32
        rows.append(losses(trainer, "loss", "logit_kd", "hidden_state_kd"))
    assert half.dtype == dtype
    np.testing.assert_allclose(*rows, rtol=0.05)
    assert rows[0] != rows[1]


def test_pixels_reach_a_half_precision_teacher_in_its_type(training_arguments):
    trainer = make_trainer(
        training_arguments(max_steps=1), [LogitKD()], tiny.vit(0), tiny.vit(1, layers=4).to(torch.bfloat16),
        train_dataset=tiny.image_dataset(8), processing_class=None,
    )  # fmt: skip
    trainer.train()
    assert np.isfinite(losses(trainer, "loss")).all()


# ---------------------------------------------------------------------- where it lies

LAYER = "bert.encoder.layer"
MAPS = {
    "one device": {"": "cpu"},
    "disk": {"": "disk"},
    "layers on disk": {
        "bert.embeddings": "cpu", f"{LAYER}.0": "cpu", f"{LAYER}.1": "disk", f"{LAYER}.2": "disk", f"{LAYER}.3": "cpu",
        "bert.pooler": "cpu", "classifier": "cpu",
    },
}  # fmt: skip


@pytest.mark.parametrize("device_map", MAPS)
def test_a_teacher_with_a_device_map_teaches_as_one_in_memory(training_arguments, folder, tmp_path, device_map):
    kwargs = {"device_map": MAPS[device_map]}
    if device_map == "disk" and not FIVE:
        pytest.skip("from_pretrained of transformers 4 itself fails for a model that lies on disk as a whole")
    if "disk" in MAPS[device_map].values():
        kwargs["offload_folder"] = str(tmp_path / "offload")
    objectives = [TaskLoss(), LogitKD(), HiddenStateKD(), AttentionKD(weight=0.1)]
    trainer = make_trainer(
        training_arguments(max_steps=3), objectives, teacher=str(folder), teacher_init_kwargs=kwargs
    )
    trainer.train()
    on_disk = {n.split(".")[3] for n, p in trainer.teacher_model.named_parameters() if p.is_meta and LAYER in n}
    assert on_disk == {"one device": set(), "disk": set("0123"), "layers on disk": set("12")}[device_map]
    expected = trained(training_arguments(max_steps=3), teacher_of(), objectives)
    assert losses(trainer, "loss", "grad_norm", "logit_kd") == expected


BITS = {"8-bit": dict(load_in_8bit=True), "nf4": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4")}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "autocast"])
def test_a_bitsandbytes_teacher_teaches_what_it_answers(training_arguments, tmp_path, bits, bf16):
    pytest.importorskip("bitsandbytes")
    tiny.bert(1, layers=2, hidden=128).save_pretrained(tmp_path / "teacher")
    # On CPUs with AVX512-BF16 bitsandbytes needs a multiple of 32 output features; the head has 3.
    settings = BitsAndBytesConfig(**BITS[bits], llm_int8_skip_modules=["classifier"])
    dataset = tiny.text_dataset(8)
    trainer = make_trainer(
        training_arguments(max_steps=1, bf16=bf16), [LogitKD(temperature=1.0), HiddenStateKD()],
        teacher=tmp_path / "teacher", teacher_init_kwargs={"quantization_config": settings}, train_dataset=dataset,
    )  # fmt: skip
    teacher, student = trainer.teacher_model, trainer.model
    assert sum(type(m).__name__ in ("Linear8bitLt", "Linear4bit") for m in teacher.modules()) >= 12
    batch = trainer.data_collator([dict(row) for row in dataset])
    with torch.no_grad():
        logits = [
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
            for model in (student.eval(), teacher)
        ]
    expected = forward_kl(*logits).mean().item()
    trainer.train()
    assert losses(trainer, "logit_kd")[0][0] == pytest.approx(expected, rel=0.05 if bf16 else 1e-3)
    whole = load_teacher(str(tmp_path / "teacher"))
    with torch.no_grad():
        exact = whole(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert 0 < (logits[1] - exact).abs().max() < exact.abs().max()


@pytest.mark.parametrize("bits", BITS)
def test_a_bitsandbytes_teacher_is_known_again_after_it_ran(tmp_path, bits):
    """Its kernels repack weights in place when they are first used."""
    pytest.importorskip("bitsandbytes")
    tiny.bert(1, layers=2, hidden=128).save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(**BITS[bits], llm_int8_skip_modules=["classifier"])
    fresh, used = (load_teacher(str(tmp_path), {"quantization_config": settings}) for _ in range(2))
    with torch.no_grad():
        used(**tiny.batch(used))
    assert fingerprint(used) == fingerprint(fresh)


# ---------------------------------------------------------------------- what it is asked for


def test_states_that_no_objective_reads_are_not_kept():
    teacher = FrozenTeacher(teacher_of(attn_implementation="eager"), Accelerator(cpu=True), ["labels"])
    batch = {**tiny.batch(teacher_of()), "labels": torch.zeros(4, dtype=torch.long)}
    needs = frozenset({"logits", "hidden_states", "attentions"})
    out = teacher(batch, needs, {"hidden_states": frozenset({2, 4}), "attentions": frozenset({1})}, step=1)
    assert [i for i, state in enumerate(out.hidden_states) if state is not None] == [2, 4]
    assert [i for i, state in enumerate(out.attentions) if state is not None] == [1]
    assert "loss" not in out
    everything = teacher(batch, needs, NONE, step=1)
    assert all(state is not None for state in (*everything.hidden_states, *everything.attentions))
    torch.testing.assert_close(out.hidden_states[2], everything.hidden_states[2], rtol=0, atol=0)
    plain = teacher(batch, frozenset({"logits"}), NONE, step=1)
    assert plain.keys() == {"logits"}


def test_objectives_get_the_mapped_layers_and_no_others(training_arguments):
    seen = []

    def watch(student_out, teacher_out, batch):
        of = [getattr(out, n) for out in (student_out, teacher_out) for n in ("hidden_states", "attentions")]
        seen.append([[i for i, state in enumerate(states) if state is not None] for states in of])
        return student_out.logits.sum() * 0

    student = tiny.bert(0, layers=3)
    objectives = [HiddenStateKD(layers={1: 2, 3: 4}), AttentionKD(layers={2: 3}), watch]
    make_trainer(training_arguments(max_steps=1), objectives, student).train()
    # Transformers 5 can be asked for some hidden states; the last ones are the projections.
    own = [1, 3] if FIVE else [0, 1, 2, 3]
    assert seen == [[[*own, 4, 5], [0, 1, 2], [2, 4], [2]]]


@pytest.mark.skipif(not FIVE, reason="transformers 4 has no way to select hidden states")
def test_the_models_are_asked_for_the_mapped_layers_alone(training_arguments):
    student, teacher, asked = tiny.bert(0, layers=3), teacher_of(), []
    trainer = make_trainer(training_arguments(max_steps=1), [HiddenStateKD(layers={1: 2, 3: 4})], student, teacher)
    for model in (teacher, student):
        model.register_forward_pre_hook(
            lambda module, args, kwargs: asked.append(kwargs["output_hidden_states"]), with_kwargs=True
        )
    trainer.train()
    assert asked == [[2, 4], [1, 3]]


def test_a_teacher_that_is_a_peft_model_teaches_with_its_adapters(training_arguments):
    peft = pytest.importorskip("peft")

    def adapted():
        config = peft.LoraConfig(target_modules=["query", "value"], r=4, lora_alpha=64, init_lora_weights=False)
        torch.manual_seed(0)
        return peft.get_peft_model(teacher_of(), config)

    teacher = adapted()
    one = trained(training_arguments("adapted", max_steps=2), teacher)
    merged = trained(training_arguments("merged", max_steps=2), adapted().merge_and_unload())
    np.testing.assert_allclose(one, merged, rtol=1e-3)
    bare = trained(training_arguments("bare", max_steps=2), teacher_of())
    assert abs(one[0][2] - bare[0][2]) > 0.01 * bare[0][2]
    assert not any(p.requires_grad for p in teacher.parameters())


def test_trainers_can_share_a_teacher(training_arguments):
    teacher = teacher_of()
    pair = [
        DistillationTrainer(
            tiny.bert(0), training_arguments(f"{i}", max_steps=2), train_dataset=tiny.text_dataset(),
            processing_class=tiny.tokenizer(), teacher_model=teacher, objectives=ALL_TERMS["sum"],
        )
        for i in range(2)
    ]  # fmt: skip
    for trainer in pair:
        trainer.train()
    assert losses(pair[0], "loss", "grad_norm") == losses(pair[1], "loss", "grad_norm")
