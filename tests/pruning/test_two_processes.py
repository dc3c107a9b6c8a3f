# SPDX-License-Identifier: Apache-2.0
"""Two processes that see different data prune the same units; this file is also what they run."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

from hfkdq import PruningCallback, PruningSpec
from hfkdq.facts import read_facts
from tests import tiny
from tests.launch import accelerate_launch

SETTINGS: dict[str, dict[str, Any]] = {
    "taylor": dict(structure="neuron", criterion="taylor"),
    "movement": dict(structure="weight", criterion="movement", ranking="global"),
    "activation": dict(structure="neuron", criterion="activation"),
    "mean": dict(structure="neuron", criterion="fisher", cut="mean"),
    "layers": dict(structure="layer", criterion="taylor", rounds=1),
    "hidden": dict(structure="hidden", plain_checkpoint=False),
}


@pytest.mark.one_line
def test_the_same_units_are_pruned_on_all_processes(tmp_path):
    accelerate_launch(Path(__file__), tmp_path)
    first, second = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    for name in SETTINGS:
        assert first[name].pop("batches") != second[name].pop("batches")
        assert first[name] == second[name], name
        assert first[name]["achieved"] == 0.5


def train(folder: str, setting: dict[str, Any]) -> dict[str, object]:
    arguments = TrainingArguments(
        folder, use_cpu=True, report_to=[], save_strategy="no", max_steps=4, per_device_train_batch_size=4,
        disable_tqdm=True, seed=0, learning_rate=1e-3,
    )  # fmt: skip
    seen: list[int] = []
    pad = DataCollatorWithPadding(tiny.tokenizer())

    def collate(rows: list[dict[str, Any]]) -> Any:
        batch = pad(rows)
        seen.append(int(batch["input_ids"].sum()))
        return batch

    trainer = Trainer(
        tiny.bert(), arguments, train_dataset=tiny.text_dataset(64), data_collator=collate,
        callbacks=[PruningCallback(PruningSpec(sparsity=0.5, **setting))],
    )  # fmt: skip
    trainer.train()
    digest = hashlib.sha256()
    for name, tensor in trainer.model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    achieved = read_facts(trainer.model)["pruning"]["achieved_sparsity"]
    return {"batches": seen, "weights": digest.hexdigest(), "achieved": achieved}


if __name__ == "__main__":
    found = {name: train(os.path.join(sys.argv[1], name), setting) for name, setting in SETTINGS.items()}
    Path(sys.argv[1], f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))
