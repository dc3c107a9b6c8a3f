# SPDX-License-Identifier: Apache-2.0
"""`export_onnx`: from a model in memory to a folder that is proven, loads anywhere and can be pushed.

Knows the order of things and the folder; how a file is traced, tidied and compared is done by its neighbours.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import extract_model_from_parallel
from transformers import PreTrainedModel

from .. import __version__
from ..forwards import base_of
from ..quantization import activation_ranges, merge_adapters, quantize, quantized_spec, strip_quantizers_
from ..specs import QuantizationSpec
from .backends import load_backend
from .kinds import Kind, kind_of
from .lowering import check_lowerable, lower_quantizers_
from .verify import Batch, Collator, Parity, compare, iterate_batches, run_torch, sample_batches

if TYPE_CHECKING:
    from datasets import Dataset

REPORT = "report.json"
TARGETS = ("onnxruntime", "standard")


def export_onnx(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    quantization: QuantizationSpec | str | None = None,
    processing_class: Any = None,
    calibration: Dataset | Iterable[Batch] | None = None,
    data_collator: Collator | None = None,
    task: str | None = None,
    tolerance: float | None = None,
    target: str = "onnxruntime",
) -> Path:
    """Writes a model as an ONNX file that was run and compared with it, next to its checkpoint.

    The new folder has `model.onnx`, the checkpoint (`config.json` and `model.safetensors`, float weights under their
    ordinary names), the files of `processing_class`, and `report.json` with what was written and measured. It loads
    with Optimum's `ORTModelFor...` and with plain Transformers. The model is not changed. When anything fails, nothing
    is left behind.

    Args:
        model (`PreTrainedModel` or `PeftModel`): the model, on any device, in any floating-point precision; exported in
            float32. LoRA adapters are merged first, see [`merge_adapters`].
        folder (`str` or `Path`): where to; must not exist yet.
        quantization (`QuantizationSpec` or `str`, *optional*): `None` writes float32. `"dynamic"` has Optimum quantize
            the float weights to int8; ranges of activations are then found at each call. A [`QuantizationSpec`] writes
            the int8 codes and the ranges of a model trained with it, or with `calibration` quantizes a model that was
            not.
        processing_class (tokenizer or processor, *optional*): saved beside the model, and pads `calibration`.
        calibration (`datasets.Dataset` or iterable of `dict`, *optional*): examples, or batches of tensors, as the
            model takes them. The file is compared on the first 8 batches; random inputs serve by default.
        data_collator (`DataCollator`, *optional*): makes batches of `calibration`. As the Trainer does by default.
        task (`str`, *optional*): Optimum's name of the task. Read off the model's class by default.
        tolerance (`float`, *optional*): largest difference of any output from torch, as a share of the largest logit.
            By default 0.0001 where activations are in floating point, 0.1 for uint8 activations (compared with the
            fake-quantized model) and 0.3 for `"dynamic"` (compared with the float model).

    Returns:
        `Path`: the folder.

    Raises:
        FileExistsError: `folder` exists.
        TypeError: `model` or `quantization` is something else.
        ValueError: the model cannot be exported so, the spec is not the one it was trained with, or bad `calibration`.
        RuntimeError: Optimum is missing, or the file differs from the model by more than the tolerance, or gives NaN.

    Example:
        ```python
        from hfkdq import QuantizationSpec, export_onnx
        from optimum.onnxruntime import ORTModelForSequenceClassification

        folder = export_onnx(trainer.model, "out/onnx", quantization=QuantizationSpec(), processing_class=tokenizer)
        onnx_model = ORTModelForSequenceClassification.from_pretrained(folder)
        ```
    """
    folder, kind = Path(folder), kind_of(quantization)
    _check_arguments(model, folder, kind, calibration, tolerance, target)
    backend = load_backend()
    if base_of(model) is not model:
        trained = quantized_spec(model)
        model = merge_adapters(model)
        # Merging names the layers that bitsandbytes had quantized in the spec.
        kind = kind_of(quantized_spec(model)) if trained is not None and kind.spec == trained else kind
    task = backend.resolve_task(model, task)
    if calibration is None:
        batches: list[Batch] = backend.dummy_batches(model, task)
        rest: Iterator[Batch] = iter(())
    else:
        rest = iterate_batches(calibration, model, processing_class, data_collator)
        batches = sample_batches(rest)
    reference = _reference_model(model, kind, chain(batches, rest))
    check_lowerable(reference)
    # Before there is a session: its waiting threads slow torch down many times over.
    expected = run_torch(reference, batches)
    with _staged(folder) as staging:
        reference.save_pretrained(staging)
        if processing_class is not None:
            processing_class.save_pretrained(staging)
        written = _write_files(backend, reference, staging, kind, task, target)
        runner = backend.open_files(staging, task)
        parity = compare(runner, batches, expected)
        tolerance = kind.tolerance if tolerance is None else tolerance
        _check_parity(parity, tolerance, kind.name)
        facts = {
            "kind": kind.name,
            "task": task,
            "target": target,
            "opset": backend.OPSET,
            "bytes": sum(file.stat().st_size for file in staging.glob("*.onnx*")),
            "inputs": runner.input_names,
            "outputs": runner.output_names,
            **asdict(parity),
            "tolerance": tolerance,
            **written,
            "spec": None if kind.spec is None else kind.spec.to_dict(),
            "versions": {"hfkdq": __version__, **{name: version(name) for name in backend.PACKAGES}},
        }
        (staging / REPORT).write_text(json.dumps(facts, indent=2) + "\n")
    return folder


def _check_arguments(
    model: Any, folder: Path, kind: Kind, calibration: Any, tolerance: float | None, target: str
) -> None:
    if not isinstance(base_of(model), PreTrainedModel):
        raise TypeError(
            f"model must be a PreTrainedModel, got {type(model).__name__}. Unwrap it first: trainer.model."
        )
    if folder.exists():
        raise FileExistsError(f"{folder} exists. Export to a new folder, or remove this one first.")
    if getattr(model, "is_quantized", False) and base_of(model) is model:
        raise ValueError(
            "The model was loaded with integer weights (quantization_config). Load it in floating point to export it."
        )
    if tolerance is not None and not (tolerance > 0 and math.isfinite(tolerance)):
        raise ValueError(f"tolerance must be a positive number (a share of the largest logit), got {tolerance!r}.")
    if target not in TARGETS:
        raise ValueError(f"target={target!r} does not exist. Use one of {', '.join(TARGETS)}.")
    if kind.spec is not None:
        _check_spec(model, kind.spec, calibration)


def _check_spec(model: PreTrainedModel, spec: QuantizationSpec, calibration: Any) -> None:
    trained = quantized_spec(model)
    if trained is None and calibration is None and spec.activation_bits is not None:
        raise ValueError(
            "The model was not trained with a QuantizationSpec, so there are no ranges to export. Train it with "
            "QATCallback(spec), or pass calibration= to have the ranges observed on your data."
        )
    if trained is not None and trained != spec:
        raise ValueError(
            f"The model was trained with {trained}; asked for is {spec}. Export it with the spec it was trained with."
        )
    if trained is not None and spec.activation_bits is not None and not activation_ranges(model):
        raise ValueError(
            "The fake quantizers of the model have seen no data, so there are no ranges to export. Train the model."
        )


def _reference_model(model: PreTrainedModel, kind: Kind, batches: Iterable[Batch]) -> PreTrainedModel:
    """A copy on the CPU in float32 and eval mode, with fake quantizers if the file is to have their integers."""
    # Mixed precision leaves an autocast wrapper around `forward`, which is no part of the model.
    reference = extract_model_from_parallel(copy.deepcopy(model), keep_fp32_wrapper=False).cpu().float().eval()
    if kind.spec is None:
        reference = strip_quantizers_(reference)
    elif quantized_spec(reference) is None:
        reference = quantize(reference, kind.spec, batches).eval()
    return reference


def _write_files(
    backend: Any, reference: PreTrainedModel, staging: Path, kind: Kind, task: str, target: str
) -> dict[str, Any]:
    """Writes the ONNX files into `staging`; counts the linear layers with integer weights, and those fused here."""
    from .graph import count_fused_linears, improve, quantize_dynamically, to_float16

    traced = copy.deepcopy(reference)
    quantized = lower_quantizers_(traced, target=target) if kind.has_integers else 0
    files = backend.trace(traced, staging, task, fold_constants=not kind.has_integers)
    for file in files:
        if kind.name == "dynamic":
            quantize_dynamically(file)
        improve(file, target=target)
        if kind.name == "float16":
            to_float16(file)
    if kind.has_integers:
        # A decoder with a past has the layers of the one without.
        fused = sum(count_fused_linears(file) for file in files if "with_past" not in file.name)
    backend.finish(staging, reference.config, task)
    return {"quantized_linears": quantized, "fused_linears": fused} if kind.has_integers else {}


def _check_parity(parity: Parity, tolerance: float, kind: str) -> None:
    bound = tolerance * parity.max_abs_logit
    if not parity.max_abs_diff <= bound:
        raise RuntimeError(
            f"The {kind} ONNX file differs from the torch model by up to {parity.max_abs_diff:.4g} (mean "
            f"{parity.mean_abs_diff:.4g}, {parity.samples} samples, largest logit {parity.max_abs_logit:.4g}); allowed is "
            f"{bound:.4g} ({tolerance:g} of the largest logit). Nothing was written. Pass calibration= with real data if "
            "this was measured on random inputs, or tolerance= if the difference is acceptable."
        )


@contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` that becomes it at the end, or disappears with the parents made for it."""
    missing = [parent for parent in folder.parents if not parent.exists()]
    staging = folder.parent / f".{folder.name}-{uuid.uuid4().hex[:8]}"
    try:
        staging.mkdir(parents=True)
        yield staging
        staging.rename(folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        for parent in missing:
            with suppress(OSError):
                parent.rmdir()
        raise
