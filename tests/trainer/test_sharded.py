# SPDX-License-Identifier: Apache-2.0
"""FSDP2 and DeepSpeed give the updates of one process, with the configurations in `examples/accelerate_configs`."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from hfkdq import load_quantized
from hfkdq.trainer.arguments import refuse_unsupported
from tests import tiny
from tests.launch import accelerate_launch

from .common import ALL_TERMS, losses, make_trainer, teacher_of
from .sharded_runs import arguments_for, loaded, make, whole_weights

CONFIGURATIONS = Path(__file__).parents[2] / "examples" / "accelerate_configs"
NEEDS_DEEPSPEED = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed; no extra of hfkdq needs it"
)


@pytest.mark.one_line
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("fsdp2", "DistributedType.FSDP"),
        pytest.param("deepspeed_zero2", "DistributedType.DEEPSPEED", marks=NEEDS_DEEPSPEED),
        pytest.param("deepspeed_zero3", "DistributedType.DEEPSPEED", marks=NEEDS_DEEPSPEED),
    ],
)
def test_a_sharded_training_gives_the_updates_of_one_process_and_resumes(tmp_path, name, kind):
    tiny.bert(0).save_pretrained(tmp_path / "student")
    tiny.bert(1, layers=4, hidden=48).save_pretrained(tmp_path / "teacher")
    for _ in range(2):
        accelerate_launch(
            Path(__file__).with_name("sharded_runs.py"), tmp_path,
            options=("--config_file", str(CONFIGURATIONS / f"{name}.yaml")), device="cpu",
        )  # fmt: skip
    runs = [(run, rank) for run in ("whole", "resumed") for rank in (0, 1)]
    facts = [json.loads((tmp_path / f"{run}{rank}.json").read_text()) for run, rank in runs]
    states = [load_file(tmp_path / f"{run}{rank}.safetensors") for run, rank in runs]
    one = make(arguments_for(str(tmp_path / "one"), use_cpu=True), loaded(tmp_path))
    one.train()
    expected = losses(one, "loss", "grad_norm", "task_loss", "logit_kd", "hidden_state_kd", "attention_kd")
    weights = whole_weights(one)
    parameters = sum(p.numel() for p in one.teacher_model.parameters())
    for fact, state in zip(facts, states, strict=True):
        assert fact["type"] == kind
        assert fact["prepared"] == 0  # else Trainer.evaluate() would not prepare the student
        assert fact["recorded"] == "BertForSequenceClassification"
        np.testing.assert_allclose(fact["logs"], expected, rtol=1e-3)
        assert state.keys() == weights.keys()
        for key, value in weights.items():
            torch.testing.assert_close(state[key], value, rtol=1e-4, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")
            assert torch.equal(state[key], states[0][key]), key
    if name == "deepspeed_zero2":
        assert [fact["teacher"] for fact in facts] == [parameters] * 4
    else:
        assert all(fact["teacher"] < 0.6 * parameters for fact in facts)
        assert all("trainer.save_model" in fact["refused"]["export"] for fact in facts)
    assert all("prune(model, spec)" in fact["refused"]["pruning"] for fact in facts)
    assert all(("learned" in fact["refused"]) == (name == "fsdp2") for fact in facts)
    quantized, batch = load_quantized(tmp_path / "final"), tiny.batch(one.model)
    with torch.no_grad():
        torch.testing.assert_close(quantized(**batch).logits, one.model(**batch).logits, rtol=1e-4, atol=1e-5)
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "final")
    assert saved.state_dict().keys() == tiny.bert(0).state_dict().keys()
    for key, value in saved.named_parameters():
        torch.testing.assert_close(value, states[0][key], rtol=0, atol=0)


def test_fsdp1_is_refused(training_arguments):
    trainer = make_trainer(training_arguments(), teacher=None)
    trainer.is_fsdp_enabled = True  # as where accelerate was configured with fsdp_version 1
    with pytest.raises(NotImplementedError, match="fsdp_version: 2"):
        refuse_unsupported(trainer, [], [])


def test_what_deepspeed_split_while_it_was_loaded_is_refused(training_arguments):
    teacher = teacher_of()
    next(teacher.parameters()).ds_id = 0  # as DeepSpeed marks it
    with pytest.raises(NotImplementedError, match="before the TrainingArguments"):
        make_trainer(training_arguments(), ALL_TERMS["sum"], teacher=teacher)
