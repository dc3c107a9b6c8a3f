# SPDX-License-Identifier: Apache-2.0
"""What is tried on every family: each cell is a function that comes back where the thing works, and raises where not."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Trainer, TrainingArguments

from hfkdq import (
    DistillationTrainer,
    PruningSpec,
    QATCallback,
    QuantizationSpec,
    TaskLoss,
    export_onnx,
    load_pruned,
    load_quantized,
    make_student,
    prune,
)
from hfkdq.modeling.forwards import forward_columns, return_dict_kwargs
from hfkdq.modeling.layers import find_layer_stacks

from .batches import collate, rows
from .entries import Entry

RECORDED = "load_pruned"
"""What a cell returns that works, where the file needs `load_pruned`."""
PARTLY = "part of the weights"
"""What a cell returns that works for a part of the weights, and says so."""
NEAR = 1e-5
"""What a model that is loaded again may differ by, as a share of the largest number: 160 roundings to float32."""
_SPARSITY = {"n:m": None, "vocab": None, "hidden": 0.25}


class Wrong(AssertionError):
    """Work that ended without an error, and is wrong."""


def _expect(holds: bool, message: str) -> None:
    if not holds:
        raise Wrong(message)


@torch.no_grad()
def outputs(model: PreTrainedModel, entry: Entry) -> list[torch.Tensor]:
    """The numbers that a model predicts for the batch of its entry, without its labels."""
    batch = {k: v for k, v in entry.batch().items() if k in forward_columns(model) and k != "return_loss"}
    kept = ("labels",) if "decoder_input_ids" in forward_columns(model) else ()
    batch = {k: v for k, v in batch.items() if "label" not in k or k in kept}
    torch.manual_seed(0)
    found = model.eval()(**batch, **return_dict_kwargs(model))
    return [v for k, v in found.items() if torch.is_tensor(v) and v.is_floating_point() and k != "loss"]


def _same(found: list[torch.Tensor], expected: list[torch.Tensor], what: str) -> None:
    _expect(len(found) == len(expected) > 0, f"{what}: {len(found)} outputs where {len(expected)} are expected")
    for one, other in zip(found, expected, strict=True):
        _expect(one.shape == other.shape, f"{what}: shape {tuple(one.shape)}, expected {tuple(other.shape)}")
        finite = other.isfinite()
        _expect(bool(torch.equal(one.isfinite(), finite)), f"{what}: numbers that are not finite")
        largest = max(1.0, float(other[finite].abs().max())) if bool(finite.any()) else 1.0
        difference = float((one - other)[finite].abs().max()) if bool(finite.any()) else 0.0
        _expect(difference <= NEAR * largest, f"{what}: differs by {difference:.2g}")


def _train(entry: Entry, model: PreTrainedModel, folder: Path, **kwargs: Any) -> Trainer:
    args = TrainingArguments(
        str(folder / "train"), max_steps=1, per_device_train_batch_size=4, per_device_eval_batch_size=4, use_cpu=True,
        report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True, learning_rate=1e-3, seed=0,
    )  # fmt: skip
    if not entry.counts:
        model.accepts_loss_kwargs = False
    examples = rows(entry.batch())
    before = copy.deepcopy(model.state_dict())
    kind = DistillationTrainer if "teacher_model" in kwargs else Trainer
    trainer = kind(
        model=model, args=args, train_dataset=examples, eval_dataset=examples, data_collator=collate, **kwargs
    )
    result = trainer.train()
    _expect(math.isfinite(result.training_loss), f"the loss is {result.training_loss}")
    after = trainer.model.state_dict()
    moved = any(not torch.equal(after[name], value) for name, value in before.items() if name in after)
    _expect(moved, "no weight has changed")
    return trainer


def _objectives(entry: Entry) -> list[Any]:
    return [TaskLoss(weight=0.5), entry.objective()] if entry.labelled else [entry.objective()]


def student(entry: Entry, model: PreTrainedModel, folder: Path) -> str | None:
    """A student of half of the layers, one step of distillation, saved and loaded."""
    sizes = [max(1, len(stack) // 2) for stack in find_layer_stacks(model, with_heads=True)]
    made = make_student(model, *sizes[:1], **({"num_decoder_layers": sizes[1]} if len(sizes) > 1 else {}))
    _expect(made.num_parameters() < model.num_parameters(), "the student is not smaller")
    trainer = _train(entry, made, folder, teacher_model=model, objectives=_objectives(entry))
    trainer.save_model(str(folder / "student"))
    loaded = type(model).from_pretrained(folder / "student")
    _same(outputs(loaded, entry), outputs(trainer.model, entry), "loaded again")
    return None


def distil(entry: Entry, model: PreTrainedModel, folder: Path) -> None:
    """A model of other weights distilled for one step with the predictions of the first, and evaluated."""
    trainer = _train(entry, entry.make(1), folder, teacher_model=model, objectives=_objectives(entry))
    loss = trainer.evaluate().get("eval_loss", 0.0)
    _expect(math.isfinite(loss), f"eval_loss is {loss}")


def _pruned(structure: str) -> Callable[[Entry, PreTrainedModel, Path], str | None]:
    def cell(entry: Entry, model: PreTrainedModel, folder: Path) -> str | None:
        # Of a copy: some classes change themselves when they run on short texts (BigBird).
        parameters, expected = model.num_parameters(), [value.shape for value in outputs(copy.deepcopy(model), entry)]
        settings = dict(structure=structure, sparsity=_SPARSITY.get(structure, 0.5))
        kwargs: dict[str, Any] = {}
        if structure == "vocab":
            kwargs = dict(calibration=["w5 w6 w7", "w8 w9"], processing_class=_tokenizer())
        plain, partly = True, False
        try:
            prune(model, PruningSpec(**settings), **kwargs)
        except ValueError as error:
            if "plain_checkpoint" not in str(error):
                raise
            plain = False
            prune(model, PruningSpec(**settings, plain_checkpoint=False), **kwargs)
        if PruningSpec(**settings).removes:
            _expect(model.num_parameters() < parameters, "no parameter has gone")
        else:
            recorded = model.config.hfkdq["pruning"]
            achieved, left = recorded["achieved_sparsity"], recorded.get("left_unpruned", {}).get("share", 0.0)
            partly = left > 0.05
            _expect(
                achieved > 0.3 * (1 - left), f"{achieved:.0%} of the weights are zero, and {left:.0%} are left out"
            )
        if structure != "vocab":  # whose tokens have other numbers, of which there are fewer
            found = outputs(model, entry)
            _expect([value.shape for value in found] == expected or structure == "hidden", "outputs of other shapes")
            model.save_pretrained(folder / "pruned")
            loaded = (type(model).from_pretrained if plain else load_pruned)(folder / "pruned")
            _same(outputs(loaded, entry), found, "loaded again")
            return PARTLY if partly else None if plain else RECORDED
        model.save_pretrained(folder / "pruned")
        loaded = type(model).from_pretrained(folder / "pruned")
        state, again = model.state_dict(), loaded.state_dict()
        _expect(all(torch.equal(again[name], value) for name, value in state.items()), "other weights loaded again")
        return None

    cell.__doc__ = f"Pruned by structure {structure!r}, saved and loaded."
    return cell


def _tokenizer() -> PreTrainedTokenizerFast:
    """One of 60 words, the first four special."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words = {word: i for i, word in enumerate([*special, *(f"w{i}" for i in range(4, 60))])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    names = ("pad_token", "bos_token", "eos_token", "unk_token")
    return PreTrainedTokenizerFast(tokenizer_object=backend, **dict(zip(names, special, strict=True)))


def qat(entry: Entry, model: PreTrainedModel, folder: Path) -> None:
    """One step with fake quantizers, evaluated, saved and loaded."""
    teacher = {} if entry.labelled else dict(teacher_model=copy.deepcopy(model), objectives=_objectives(entry))
    trainer = _train(entry, model, folder, callbacks=[QATCallback(QuantizationSpec())], **teacher)
    loss = trainer.evaluate().get("eval_loss", 0.0)
    _expect(math.isfinite(loss), f"eval_loss is {loss}")
    expected = outputs(trainer.model, entry)
    trainer.save_model(str(folder / "quantized"))
    loaded = load_quantized(str(folder / "quantized"), type(model))
    _same(outputs(loaded, entry), expected, "loaded again")


def _exported(precision: str) -> Callable[[Entry, PreTrainedModel, Path], None]:
    def cell(entry: Entry, model: PreTrainedModel, folder: Path) -> None:
        batch = {k: v for k, v in entry.batch().items() if k != "return_loss"}
        made = export_onnx(model, folder / "onnx", quantization=precision, calibration=[batch], latency_rounds=0)
        _expect(any(made.rglob("*.onnx")), "there is no file")

    cell.__doc__ = f"Exported as {precision}, and compared with the model by the export itself."
    return cell


CELLS: dict[str, Callable[[Entry, PreTrainedModel, Path], str | None]] = {
    "student": student,
    "distillation": distil,
    **{structure: _pruned(structure) for structure in PruningSpec.STRUCTURES},
    "QAT": qat,
    **{f"ONNX {precision}": _exported(precision) for precision in ("float32", "int8", "int4_weights")},
}
