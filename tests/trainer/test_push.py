# SPDX-License-Identifier: Apache-2.0
"""What a trainer pushes to the Hub: the student, its card and checkpoint, and nothing of the teacher."""

import json

from safetensors.torch import load

from hfkdq.trainer.checkpoints import STATE_FILE
from tests import tiny
from tests.hub_server import loopback_hub  # noqa: F401

from .common import ALL_TERMS, make_trainer


def test_student_card_and_checkpoint_are_pushed_without_the_teacher(training_arguments, hub_server, tmp_path):
    tiny.bert(1, layers=4, hidden=48).save_pretrained(tmp_path / "teacher")
    arguments = training_arguments(
        max_steps=2, save_strategy="steps", save_steps=2, push_to_hub=True, hub_model_id="me/student",
        hub_strategy="checkpoint", hub_token=hub_server.token,
    )  # fmt: skip
    trainer = make_trainer(arguments, ALL_TERMS["sum"], teacher=str(tmp_path / "teacher"))
    trainer.train()
    trainer.push_to_hub(tags="demo", dataset="words", blocking=True)
    files = hub_server.repositories["me/student"].files()
    keys = set(tiny.bert(0).state_dict())
    assert set(load(files["model.safetensors"])) == keys
    assert set(load(files["last-checkpoint/model.safetensors"])) == keys
    assert f"last-checkpoint/{STATE_FILE}" in files
    assert json.loads(files["last-checkpoint/trainer_state.json"])["global_step"] == 2
    card = files["README.md"].decode()
    assert "- distillation\n" in card
    assert "- demo\n" in card
    # Optimizer and random states are binary, and TrainingArguments hold the folder of the run by themselves.
    texts = [data.decode() for name, data in files.items() if name.endswith((".json", ".md", ".txt"))]
    assert not any(
        "teacher/" in text or str(tmp_path / "teacher") in text or hub_server.token in text for text in texts
    )
    weights = sum(len(data) for name, data in files.items() if name.endswith("model.safetensors"))
    assert weights < 2.2 * len(files["model.safetensors"])
