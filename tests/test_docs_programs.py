# SPDX-License-Identifier: Apache-2.0
"""The programs of the guides run as they stand, on tiny models and data under the names that the guides use."""

import re
import statistics
import tempfile
import timeit
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnxruntime
import peft
import pytest
import torch
import transformers
import trl
from datasets import Dataset

import hfkdq
from hfkdq.export.graph import multiplies_exactly
from hfkdq.metrics import classification_metrics

from . import tiny

DOCS = Path(__file__).parents[1] / "docs"
PROGRAM = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = sorted(page.name for page in DOCS.glob("*.md") if PROGRAM.search(page.read_text(encoding="utf-8")))
CORPUS = [f"w{i} w{i + 1} w{2 * i % 7}" for i in range(64)]


class AnyTrainer(transformers.Trainer):
    """A trainer of the user's own."""


def _stacked(rows):
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": [row["labels"] for row in rows],
    }


def fresh(folder):
    """What a program may count on, made anew, so that none changes the models of another."""
    tokenizer, train = tiny.tokenizer(), tiny.text_dataset(256)
    dev = train.select(range(32))
    teacher = tiny.bert(layers=6)
    student = hfkdq.make_student(teacher, num_layers=2)
    args = transformers.TrainingArguments(folder / "args", max_steps=2, report_to="none", save_strategy="no")
    given = dict(
        model=student, args=args, train_dataset=train, eval_dataset=dev, processing_class=tokenizer,
        compute_metrics=classification_metrics, teacher_model=teacher, objectives=[hfkdq.TaskLoss(), hfkdq.LogitKD()],
    )  # fmt: skip
    quantized = hfkdq.quantize(
        tiny.bert(), hfkdq.QuantizationSpec(), train.select(range(16)), processing_class=tokenizer
    )

    class GivenTrainer(hfkdq.DistillationTrainer):
        """`DistillationTrainer(..., name=value)`: the dots stand for what every trainer is given."""

        def __init__(self, *rest, **settings):
            if ... in rest:
                settings, rest = {**given, **settings}, ()
            super().__init__(*rest, **settings)

    # So wide that time and parameters are those of its neurons.
    config = tiny.bert_config(layers=3)
    config.intermediate_size = 8192
    wide = transformers.BertForSequenceClassification(config)
    lora = peft.get_peft_model(tiny.bert(), peft.LoraConfig(target_modules=["query", "value"]))
    batch = dict(transformers.DataCollatorWithPadding(tokenizer)([{k: row[k] for k in ("input_ids", "attention_mask")} for row in dev.select(range(4))]))  # fmt: skip
    size = {"height": 16, "width": 16}
    box = {"image_id": 0, "annotations": [{"bbox": [2, 2, 6, 6], "category_id": 1, "area": 36, "iscrowd": 0}]}
    image_processor = transformers.YolosImageProcessor(size=size, do_pad=False)
    pixels = [np.full((16, 16, 3), shade, np.uint8) for shade in range(4)]
    encoded = image_processor(pixels, annotations=[box] * 4, return_tensors="pt")
    pictures = [
        {"pixel_values": p, "labels": b} for p, b in zip(encoded["pixel_values"], encoded["labels"], strict=True)
    ]
    said = {"question": ["w1"], "context": ["w2 w3 w4"], "answers": [{"text": ["w3"], "answer_start": [3]}]}
    return {
        "detector": tiny.yolos(), "image_processor": image_processor, "pictures": pictures, "collate": _stacked,
        "translator": tiny.t5(), "sentences": train.remove_columns("labels").select(range(4)),
        "questions": Dataset.from_dict(said),
        **{name: getattr(hfkdq, name) for name in hfkdq.__all__},
        "DistillationTrainer": GivenTrainer, "MyTrainer": AnyTrainer, "SFTTrainer": trl.SFTTrainer,
          "torch": torch, "tempfile": tempfile, "timeit": timeit,
        "statistics": statistics, "onnxruntime": onnxruntime, "BitsAndBytesConfig": transformers.BitsAndBytesConfig,
        "AutoModelForSequenceClassification": transformers.AutoModelForSequenceClassification,
        "model": wide, "teacher": teacher, "student": student, "a": tiny.bert(), "b": tiny.bert(1), "peer": tiny.bert(2),
        "lora": lora, "args": args, "tokenizer": tokenizer, "train": train, "dev": dev, "validation": dev, "batch": batch,
        "data": {"train": train, "test": dev}, "corpus": Dataset.from_dict({"text": CORPUS}), "teacher_accuracy": 0.5,
        "metrics": classification_metrics, "classification_metrics": classification_metrics, "calibration": train,
        "trainer": hfkdq.DistillationTrainer(**{**given, "model": quantized}),
    }  # fmt: skip


# What is shortened so that it takes seconds, and what stands for the Hub.
SHORTER = {"latency=0.6": "latency=0.95", "n_trials=20": "n_trials=1", "number=1, repeat=50": "number=1, repeat=2", "max_length=384, stride=128": "max_length=16, stride=4", "cost=cost": "cost=lambda pruned: min(cost(pruned), 0.9)"}  # fmt: skip


@pytest.mark.one_line
@pytest.mark.parametrize("page", PAGES)
def test_the_programs_of_a_guide_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pushed = []
    monkeypatch.setattr("hfkdq.hub.push_to_hub", lambda *args, **kwargs: pushed.append((args, kwargs)))
    tiny.bert(layers=4).save_pretrained(tmp_path / "org" / "name")
    carried = {}
    for number, program in enumerate(PROGRAM.findall((DOCS / page).read_text(encoding="utf-8"))):
        names = {**carried, **fresh(tmp_path)}
        for long, short in SHORTER.items():
            program = program.replace(long, short)
        program = re.sub(
            r"^(\w+DistillationTrainer\(|DistillationTrainer\()(.*), \.\.\.\)", r"\1..., \2)", program, flags=re.M
        )
        if page == "publish.md" and number == 0:
            hfkdq.export_onnx(
                names["trainer"].model, "out/onnx", quantization=hfkdq.QuantizationSpec(), latency_rounds=0
            )
        if "openvino" in program and not (find_spec("openvino") and multiplies_exactly()):
            continue  # not installed, or products of its integers saturate on this processor
        if "onnxruntime" in program or "openvino" in program:
            ids = names["batch"]["input_ids"]
            names["batch"] = {k: v.numpy() for k, v in {**names["batch"], "token_type_ids": ids * 0}.items()}
        exec(compile(program, f"{page}, program {number}", "exec"), names)
        carried |= names
    assert bool(pushed) == (page == "publish.md")
