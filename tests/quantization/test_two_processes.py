# SPDX-License-Identifier: Apache-2.0
"""Two processes that see different data end with the same weights and ranges; this file is also what they run."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

from hfkdq import QATCallback, QuantizationSpec
from hfkdq.quantization.records import quantizer_states
from tests import tiny
from tests.launch import accelerate_launch


def test_ranges_are_equal_on_all_processes(tmp_path):
    accelerate_launch(Path(__file__), tmp_path)
    first, second = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert set(first) == {"moving_average", "learned"}
    assert all(len(results["ranges"]) == 8 for results in first.values())
    assert first == second


def train(folder: str, estimator: str) -> dict[str, object]:
    arguments = TrainingArguments(
        folder, use_cpu=True, report_to=[], save_strategy="no", max_steps=3, per_device_train_batch_size=4,
        gradient_accumulation_steps=2, disable_tqdm=True, seed=0, ddp_broadcast_buffers=False,
    )  # fmt: skip
    trainer = Trainer(
        tiny.bert(layers=1), arguments, train_dataset=tiny.text_dataset(64),
        data_collator=DataCollatorWithPadding(tiny.tokenizer()),
        callbacks=[QATCallback(QuantizationSpec(range_estimator=estimator))],
    )  # fmt: skip
    trainer.train()
    weights = {name: value.double().sum().item() for name, value in trainer.model.state_dict().items()}
    return {"ranges": quantizer_states(trainer.model), "weights": weights}


def main(folder: str) -> None:
    results = {estimator: train(folder, estimator) for estimator in ("moving_average", "learned")}
    Path(folder, f"rank{os.environ['RANK']}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
