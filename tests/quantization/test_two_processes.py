# SPDX-License-Identifier: Apache-2.0
"""Two processes that see different data end with the same weights and quantizers; this file is also what they run."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

from hfkdq import QATCallback, QuantizationSpec
from hfkdq.quantization import activation_quantizers, quantized_modules, weight_quantizers
from hfkdq.quantization.records import quantizer_states, weight_states
from tests import tiny
from tests.launch import accelerate_launch

SETTINGS: dict[str, dict[str, Any]] = {
    "moving average": dict(spec=dict()),
    "attention": dict(spec=dict(attention=True)),
    "learned": dict(spec=dict(range_estimator="learned", weight_estimator="learned")),
    "learned, bf16, checkpointing": dict(
        spec=dict(range_estimator="learned", weight_estimator="learned", weight_bits=4),
        training=dict(bf16=True, gradient_checkpointing=True),
    ),
    "moving average, bf16, checkpointing": dict(spec=dict(), training=dict(bf16=True, gradient_checkpointing=True)),
    "pact": dict(spec=dict(range_estimator="pact")),
    "kmeans": dict(spec=dict(weight_bits=4, weight_mapping="kmeans")),
    "adapters": dict(spec=dict(range_estimator="learned"), adapters=True),
    "phases": dict(
        spec=dict(weight_bits=2), callback=dict(begin=0.2, lower_bits={0.2: 8, 0.5: 4, 0.8: 2}, freeze_ranges=0.6)
    ),
}
# Seven linear layers, and where the spec does not narrow them alone, three tables and the classifier.
LEARNED = {
    "learned": ("scale", 11), "learned, bf16, checkpointing": ("scale", 7), "kmeans": ("codebook", 7),
}  # fmt: skip


@pytest.mark.one_line
def test_quantizers_are_equal_on_all_processes(tmp_path):
    accelerate_launch(Path(__file__), tmp_path)
    first, second = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    for name in SETTINGS:
        assert first[name]["batches"] != second[name]["batches"]
        del first[name]["batches"], second[name]["batches"]
        assert first[name] == second[name], name
        assert len(first[name]["ranges"]) == (12 if name == "attention" else 8), name
    for name, (kind, count) in LEARNED.items():
        assert [list(state) for state in first[name]["quantizers"].values()] == [[kind]] * count
    assert first["phases"]["bits"] == {"classifier": 8, "dense": 2, "word_embeddings": 8}
    assert first["phases"]["frozen"] == [True]


def train(folder: str, setting: dict[str, Any]) -> dict[str, object]:
    arguments = TrainingArguments(
        folder, use_cpu=True, report_to=[], save_strategy="no", max_steps=3, per_device_train_batch_size=4,
        gradient_accumulation_steps=2, disable_tqdm=True, seed=0, ddp_broadcast_buffers=False,
        **setting.get("training", {}),
    )  # fmt: skip
    seen: list[int] = []
    pad = DataCollatorWithPadding(tiny.tokenizer())

    def collate(rows: list[dict[str, Any]]) -> Any:
        batch = pad(rows)
        seen.append(int(batch["input_ids"].sum()))
        return batch

    spec, model = QuantizationSpec(**setting["spec"]), tiny.bert(layers=1)
    if "adapters" in setting:
        config = peft.LoraConfig(
            target_modules=["query", "dense"], modules_to_save=["classifier"], task_type="SEQ_CLS"
        )
        model = peft.get_peft_model(model, config)
    trainer = Trainer(
        model, arguments, train_dataset=tiny.text_dataset(64), data_collator=collate,
        callbacks=[QATCallback(spec, **setting.get("callback", {}))],
    )  # fmt: skip
    trainer.train()
    model, modules = trainer.model, quantized_modules(trainer.model)
    quantizers = [*activation_quantizers(model).values(), *weight_quantizers(model).values()]
    return {
        "batches": seen,
        "ranges": quantizer_states(model),
        "quantizers": weight_states(model),
        "weights": {name: value.double().sum().item() for name, value in model.state_dict().items()},
        "frozen": sorted({quantizer.frozen for quantizer in quantizers}),
        "bits": {
            name.rpartition(".")[-1]: modules[name].weight_quantizer.bits
            for name in ("classifier", "bert.pooler.dense", "bert.embeddings.word_embeddings")
        },
    }


def main(folder: str) -> None:
    results = {name: train(folder, setting) for name, setting in SETTINGS.items()}
    Path(folder, f"rank{os.environ['RANK']}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
