# SPDX-License-Identifier: Apache-2.0
"""`export_onnx`: from a model in memory to a folder that is proven, loads anywhere and can be pushed."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import EvalPrediction, PreTrainedModel

from ..bars import progress_bar
from ..files import check_new, staged
from ..measuring.evaluation import Evaluation
from ..metrics.tasks import metrics_for
from ..modeling import is_convolutional
from ..modeling.batches import make_batches
from ..modeling.forwards import base_of
from ..modeling.masks import Batch
from ..quantization import merge_adapters, quantized_spec
from .backends import load_backend
from .checks import check_arguments, check_openvino, check_spec, resolve_task
from .choices import FLAT, HUB, LAYOUTS, OPENVINO
from .embeddings import find_pooling, pool_
from .inputs import Tensors, brought_names, completed, generates, made_up, usual_names
from .job import ExportJob, plain_copy
from .layout import assemble, file_suffixes
from .precisions import AUTO, FLOAT, Precision, precision_of, recorded_precision
from .protocol import Backend
from .record import EXPORT_FACTS, MADE_UP
from .rope import beyond_original
from .selection import MAX_DROP, write_best
from .validation import BATCH_SIZE, Quality, Timing
from .verify import COMPARE_BATCH_SIZE, Collator, sample_batches

if TYPE_CHECKING:
    from datasets import Dataset

    from ..specs import QuantizationSpec

_IN_INTEGERS = " Its convolutions compute in floats; integer_convolutions=True writes them in integers."


def export_onnx(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    quantization: QuantizationSpec | str | Sequence[QuantizationSpec | str] | None = None,
    processing_class: Any = None,
    calibration: Dataset | Iterable[Batch] | None = None,
    data_collator: Collator | None = None,
    task: str | None = None,
    tolerance: float | None = None,
    target: str = "onnxruntime",
    weight_type: str = "auto",
    eval_dataset: Dataset | None = None,
    compute_metrics: Callable[[EvalPrediction], Mapping[str, Any]] | None = None,
    preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None = None,
    concat_batches: bool = True,
    metric: str | None = None,
    greater_is_better: bool = True,
    max_drop: float | None = None,
    allow_drop: bool = False,
    latency_rounds: int = 3,
    threads: int | None = None,
    inputs: Batch | None = None,
    integer_convolutions: bool = False,
    pooling: str | Sequence[str] | None = None,
    normalize: bool | None = None,
    layout: str = FLAT,
) -> Path:
    """Writes a model as ONNX files that were run, compared with it and timed, next to its checkpoint.

    The new folder has `model.onnx` (a model that generates may have several files), the checkpoint (`config.json` and
    `model.safetensors`, float weights under their ordinary names), the files of `processing_class`, and
    `export_facts.json` with what was written and measured. It loads with Optimum's `ORTModelFor...` and with plain Transformers. The model
    is not changed. When anything fails, nothing is left behind.

    Args:
        model (`PreTrainedModel` or `PeftModel`): the model, on any device, in any floating-point precision; exported in
            float32. LoRA adapters are merged first, see [`merge_adapters`].
        folder (`str` or `Path`): where to; must not exist yet.
        quantization (`QuantizationSpec` or `str`, *optional*): by default the integers that the model was trained with,
            or else float32. `"float32"` writes the float weights of any model, `"float16"` stores them in half precision.
            `"dynamic"` quantizes them to int8; ranges of activations are then found at each call. A
            [`QuantizationSpec`] writes the integers and the ranges of a model trained with it, or with `calibration`
            quantizes a model that was not; `"int8"`, `"int8_weights"` and `"int4_weights"` stand for usual ones. `"auto"`
            writes and measures all of them (instead of `"int8"` the spec that the model was trained with, if it was) and
            keeps the fastest file whose metric drops by at most `max_drop`, the smallest of those that are as fast
            within 5 %; it needs `eval_dataset`.
        processing_class (tokenizer or processor, *optional*): saved beside the model, and pads the data.
        calibration (`datasets.Dataset` or iterable of `dict`, *optional*): examples, or batches of tensors, as the
            model takes them. The file has their columns as inputs, and is compared on the first 8 batches; by default on
            those of `eval_dataset`, else on `inputs`, else on made-up inputs of two sizes.
        data_collator (`DataCollator`, *optional*): makes batches of `calibration` and `eval_dataset`. As the Trainer
            does by default.
        task (`str`, *optional*): Optimum's name of the task. Read off the model's class by default.
        tolerance (`float`, *optional*): largest difference of any output from torch, as a share of the largest logit.
            By default 0.0001 where activations are in floating point, 0.1 for quantized activations (compared with the
            fake-quantized model), 0.02 for `"float16"` and 0.3 for `"dynamic"` (compared with the float model).
        target (`str`, defaults to `"onnxruntime"`): or `"standard"`, which keeps to ONNX's own operators, or `"openvino"`, which
            writes `openvino_model.xml` and `.bin` in place of `model.onnx`, and compares, measures and times them in OpenVINO
            (`pip install "hfkdq[openvino]"`). It is for models that do not generate.
        weight_type (`str`, defaults to `"auto"`): how weights of 8 bits that are multiplied by 8-bit activations are
            stored. `"int8"` is fastest where the processor has VNNI or is an ARM, and wrong on other x86 processors, on
            which ONNX Runtime's product of uint8 and int8 saturates (unless the session option
            `session.x64quantprecision` is `"1"`). `"uint8"`, the same weights plus 128, is exact everywhere.
            `"auto"` tries whether int8 is exact on this processor, and takes uint8 if it is not.
        eval_dataset (`datasets.Dataset`, *optional*): labelled examples to measure the file and the model on, by the
            Trainer, as [`CompressionReport.measure`] does.
        compute_metrics (`Callable`, *optional*): as for `Trainer`. By default the usual metrics of the model's task, which
            [`metrics_for`] lists.
        preprocess_logits_for_metrics (`Callable`, *optional*): as for `Trainer`: from the logits and labels of a batch to what
            is kept for `compute_metrics`, such as the likeliest tokens. The logits of a language model for 500 texts of
            128 tokens take 13 GB.
        concat_batches (`bool`, defaults to `True`): whether `compute_metrics` gets one array of all batches, or a list with
            what each gave, as `TrainingArguments(eval_do_concat_batches=False)` hands over for detectors.
        metric (`str`, *optional*): the key of its result that is bounded; needed if there are several, and `compute_metrics` is
            not what [`metrics_for`] gives.
        greater_is_better (`bool`, defaults to `True`): whether a higher metric is better. Known of the usual metrics.
        max_drop (`float`, *optional*): how much worse the metric of the file may be than that of the model as it is
            given (with fake quantizers if it has them; in torch, in float32), in the unit of the metric. Without it
            nothing is refused; `"auto"` takes 0.01 (1 for BLEU).
        allow_drop (`bool`, defaults to `False`): keep a file that drops more, with `"accepted": false` and the reason
            in its report, rather than refuse it.
        latency_rounds (`int`, defaults to 3): how often the file and the float32 file of the same model have their
            turn of about half a second, each in a process of its own; 0 leaves latency out. A float32 file is not timed.
            A model that generates is timed part by part, for 32 tokens in all.
        threads (`int`, *optional*): threads of each file while it is timed. As many as PyTorch uses by default.
        inputs (`dict`, *optional*): a batch of what the model takes, for a class of one's own that takes what cannot be made
            up, where there are no data. The file has the inputs of this batch, by name.
        integer_convolutions (`bool`, defaults to `False`): compute convolutions of 8-bit weights and inputs in integers, as
            fast as what ONNX Runtime's own `quantize_static` makes, with BatchNorm moved into scale and bias. Each bias is
            then an integer too, off by half a step of the products (input scale times weight scale) at most. Where the
            data are real, what a convolution gives to a sum or to a mean over the image is rounded to 256 values between
            its ends on `calibration` (or `eval_dataset`), and a sum adds what the next convolution reads. Torch imitates
            none of this; `tolerance` and `max_drop` bound it. By default weights become floats when the file is loaded,
            which is exact, and no faster than float32.
        pooling (`str` or list of `str`, *optional*): how an encoder of texts makes one embedding of the states of a text:
            `"mean"`, `"cls"` (the first token), `"max"`, `"lasttoken"`, `"weightedmean"` or `"mean_sqrt_len_tokens"`, several of which
            are joined. The file then has an output `sentence_embedding`, `(batch, width)`, beside `last_hidden_state`, and the folder
            the files that sentence-transformers loads. By default as the files of sentence-transformers say in the folder that the
            model was loaded from, if there are some; `"none"` leaves it out.
        normalize (`bool`, *optional*): whether the embedding is scaled to length 1. By default as those files say, else not.
        layout (`str`, defaults to `"flat"`): `"flat"` has the ONNX files beside the checkpoint. `"hub"` has them in `onnx/`, as
            transformers.js and the Hub expect them: `model.onnx` in float32, `model_fp16.onnx`, `model_quantized.onnx` (8 bits),
            `model_q4.onnx`, and so on. `quantization` may then be a list of several, of which the first is the one that the
            checkpoint, `export.json` and reports are about.

    Returns:
        `Path`: the folder. It has another number at its end if somebody has made `folder` while this was at work.

    Raises:
        FileExistsError: `folder` exists, or another export into it is at work.
        OSError: it cannot be made or written.
        TypeError: `model`, `quantization` or the data are something else.
        ValueError: the model cannot be exported so, the spec is not the one it was trained with, bad `calibration`, or
            arguments that need one another.
        RuntimeError: the exporter is missing, the file differs from the model by more than the tolerance or gives NaN,
            or its metric drops by more than `max_drop`.

    Example:
        ```python
        from hfkdq import QuantizationSpec, export_onnx
        from optimum.onnxruntime import ORTModelForSequenceClassification

        folder = export_onnx(
            trainer.model, "out/onnx", quantization=QuantizationSpec(), processing_class=tokenizer,
            eval_dataset=validation, compute_metrics=trainer.compute_metrics, metric="accuracy", max_drop=0.005,
        )
        onnx_model = ORTModelForSequenceClassification.from_pretrained(folder)
        ```
    """
    folder, is_auto = Path(folder), isinstance(quantization, str) and quantization == AUTO
    check_arguments(model, tolerance, target, weight_type, layout)
    trained = quantized_spec(model)
    precisions = [] if is_auto else _precisions(quantization, FLOAT if trained is None else trained, layout)
    if integer_convolutions:
        _check_inputs_have_integers(precisions)
    check_new(folder)
    for wanted in [trained] if is_auto else [precision.spec for precision in precisions]:
        if wanted is not None:
            check_spec(model, wanted, calibration)
    _check_metric_arguments(eval_dataset, compute_metrics, metric, max_drop, allow_drop, is_auto)
    if eval_dataset is not None and compute_metrics is None:
        compute_metrics = metrics_for(base_of(model), processing_class, eval_dataset)
    timing, quality = Timing(latency_rounds, threads), None
    with ExitStack() as stack:
        staging = stack.enter_context(staged(folder))
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, enabled=False))
        if compute_metrics is not None:
            scratch = stack.enter_context(tempfile.TemporaryDirectory())
            evaluation = Evaluation(
                eval_dataset, compute_metrics, processing_class, data_collator, BATCH_SIZE, scratch,
                preprocess_logits_for_metrics, concat_batches,
            )  # fmt: skip
            quality = Quality(evaluation, metric, greater_is_better, max_drop)
            if is_auto and max_drop is None:
                quality.max_drop = MAX_DROP * quality.evaluation.task.scale
        backend = load_backend()
        if base_of(model) is not model:
            model = merge_adapters(model)
            # Merging names the layers that bitsandbytes had quantized in the spec.
            merged = None if trained is None else precision_of(quantized_spec(model) or trained)
            precisions = [merged if merged is not None and one.has_integers else one for one in precisions]
        task = resolve_task(backend, model, task)
        if target == OPENVINO:
            check_openvino(model, task)
        embeds = find_pooling(model, task, pooling, normalize)
        evaluated = None if quality is None else quality.evaluation
        given = (calibration, evaluated, inputs, processing_class, data_collator)
        batches, source, rest = _batches(backend, model, task, *given)
        plain = plain_copy(model) if embeds is None else pool_(plain_copy(model), embeds)
        job = ExportJob(
            plain, backend, task, target, tolerance, processing_class, batches, source, rest, quality,
            Path(stack.enter_context(tempfile.TemporaryDirectory(dir=staging.files))), weight_type, integer_convolutions,
            embeds, layout == HUB,
        )  # fmt: skip
        if quality is not None:
            quality.begin(job.model, job.float_model)
        facts = _write_all(job, precisions, timing, staging.files, allow_drop, layout, calibration is not None)
        (staging.files / EXPORT_FACTS).write_text(json.dumps(facts, indent=2) + "\n")
    return staging.folder


def _check_inputs_have_integers(precisions: Sequence[Precision]) -> None:
    floats = [p.name for p in precisions if not p.needs_calibration and (p.has_integers or len(precisions) == 1)]
    if floats:
        raise ValueError(
            f"integer_convolutions=True needs 8-bit inputs of convolutions; {floats[0]} has floats. Pass "
            "quantization=QuantizationSpec(), or leave integer_convolutions out."
        )


def _check_metric_arguments(
    eval_dataset: Any, compute_metrics: Any, metric: str | None, max_drop: float | None, allow_drop: bool,
    is_auto: bool,
) -> None:  # fmt: skip
    if eval_dataset is None and compute_metrics is not None:
        raise ValueError(
            "compute_metrics= was given without eval_dataset=; a metric needs both. Pass what the Trainer has."
        )
    if eval_dataset is None:
        needy = {'quantization="auto"': is_auto, "max_drop=": max_drop is not None, "metric=": metric is not None}
        for name in (name for name, is_given in needy.items() if is_given):
            raise ValueError(f"{name} needs eval_dataset=: there is nothing to measure on.")
    if allow_drop and max_drop is None and not is_auto:
        raise ValueError("allow_drop=True needs max_drop=: without a bound every drop is allowed.")


def _batches(
    backend: Backend, model: PreTrainedModel, task: str, calibration: Any, evaluated: Evaluation | None, inputs: Any,
    processing_class: Any, collator: Collator | None,
) -> tuple[Sequence[Tensors], str, Iterator[Batch]]:  # fmt: skip
    """The batches that files are traced with and compared on, where they come from, and those of `calibration` after them."""
    brought = [] if generates(model, task) else brought_names(model, processing_class)
    rest: Iterator[Batch] = iter(())
    found: dict[str, list[Tensors]] = {}
    if calibration is not None:
        how = (COMPARE_BATCH_SIZE, collator, processing_class)
        rest = iter(make_batches(model, calibration, *how, labels=False))
        found["calibration"] = sample_batches(rest, model)
    if evaluated is not None:
        found["eval_dataset"] = sample_batches(evaluated.batches(model, COMPARE_BATCH_SIZE), model, "eval_dataset")
    if inputs is not None:
        found["inputs"] = sample_batches(iter([inputs]), model, "inputs")
    if not found:
        random = made_up(model, backend.dummy_batches(model, task), brought)
        return beyond_original(model, random), MADE_UP, rest
    given = {name for batches in found.values() for name in batches[0]}
    source, batches = next(iter(found.items()))
    batches = [completed(batch, [*usual_names(model), *given]) for batch in batches]
    lost = sorted(given - set(batches[0]))
    if lost:
        raise ValueError(
            f"eval_dataset or inputs bring {', '.join(lost)}, which the model takes and {source} lacks. Files have one set of "
            "inputs: give both the same columns."
        )
    return beyond_original(model, batches), source, rest


def _precisions(
    quantization: QuantizationSpec | str | Sequence[QuantizationSpec | str] | None,
    default: QuantizationSpec | str,
    layout: str,
) -> list[Precision]:
    """The precisions that are asked for; refuses several where there is room for one."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} does not exist. Use one of {', '.join(LAYOUTS)}.")
    if isinstance(quantization, str) or not isinstance(quantization, Sequence):
        return [precision_of(default if quantization is None else quantization)]
    if layout != HUB or not quantization:
        raise ValueError(
            f"quantization is a list of {len(quantization)}; several precisions in one folder are for layout='hub', and a list "
            "names one at the least. Pass layout='hub', or one precision."
        )
    if AUTO in [one for one in quantization if isinstance(one, str)]:
        raise ValueError(
            "'auto' chooses one precision, so it is no entry of a list. Pass it alone, or name the others."
        )
    precisions = [precision_of(one) for one in quantization]
    file_suffixes(precisions)
    return precisions


def _write_all(
    job: ExportJob, precisions: Sequence[Precision], timing: Timing, folder: Path, allow_drop: bool, layout: str,
    calibrated: bool,
) -> dict[str, Any]:  # fmt: skip
    """Writes and measures the files of all precisions, of the best one if there are none; the record."""
    if layout == FLAT:
        return _write_into(job, next(iter(precisions), None), timing, folder, allow_drop, calibrated)
    places: list[Path] = []
    facts: list[dict[str, Any]] = []
    for precision in progress_bar(precisions or [None], desc="Precisions", disable=len(precisions) < 2 or None):
        places.append(job.scratch / f"precision-{len(places)}")
        places[-1].mkdir()
        facts.append(_write_into(job, precision, timing, places[-1], allow_drop, calibrated))
    kinds = [recorded_precision(one) for one in facts]
    suffixes = file_suffixes([precision for precision in precisions or kinds if precision is not None])
    return assemble(dict(zip(suffixes, places, strict=True)), facts, folder)


def _write_into(
    job: ExportJob, precision: Precision | None, timing: Timing, folder: Path, allow_drop: bool, calibrated: bool
) -> dict[str, Any]:
    if precision is not None:
        return _write_one(job, precision, timing, folder, allow_drop)
    return write_best(job, cast(Quality, job.quality), timing, folder, calibrated, allow_drop)


def _write_one(job: ExportJob, precision: Precision, timing: Timing, folder: Path, allow_drop: bool) -> dict[str, Any]:
    """Writes and measures the files of one precision; their facts."""
    facts = job.write(precision, folder)
    reason = None if job.quality is None else job.quality.rejection_reason(facts["metrics"])
    if reason is not None and not allow_drop:
        raise RuntimeError(
            f"{reason} Nothing was written. Pass a larger max_drop=, or allow_drop=True to keep the file all the same."
        )
    skip_reason = "it is the float32 file itself" if precision.name == FLOAT else timing.skip_reason
    latency: dict[str, Any] = {"left_out": skip_reason}
    if skip_reason is None:
        beside, inputs = job.scratch / FLOAT, job.example()
        if not beside.exists():
            beside.mkdir()
            job.write_files(precision_of(FLOAT), beside)
        found = timing.time({precision.name: folder, FLOAT: beside}, job.task, inputs)
        in_floats = precision.needs_calibration and not job.integer_convolutions and is_convolutional(job.model)
        latency = timing.facts(precision.name, found, inputs, _IN_INTEGERS if in_floats else "")
    return {**facts, "latency": latency, "accepted": reason is None, "reason": reason}
