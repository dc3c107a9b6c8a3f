# SPDX-License-Identifier: Apache-2.0
"""An export job: one model, written in any precision and compared with it."""

from __future__ import annotations

import copy
import shutil
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ..facts import read_facts
from ..modeling.masks import Batch
from ..provenance import describe_files, describe_model
from ..quantization import means_the_same, quantize, quantized_modules, quantized_spec, strip_quantizers_
from ..quantization.convert import leave_in_float_
from ..quantization.records import warn_of_other_weights
from ..schema import brief
from ..specs import QuantizationSpec
from ..specs.quantization import expert_weights
from ..version import __version__
from .checks import require_ranges
from .choices import OPENVINO, WITHOUT_FILE
from .embeddings import Pooling
from .images import images_together
from .inputs import Tensors, generates, model_inputs, with_inputs
from .lowering import check_lowerable, leave_read_weights_, lower_quantizers_
from .precisions import Precision
from .protocol import PAST, Backend
from .record import MADE_UP, MANIFEST
from .rope import rope_by_length
from .validation import Quality
from .verify import Parity, beginning, compare, run_torch

if TYPE_CHECKING:
    from .axes import Trial
    from .top_k import Choices

logger = logging.get_logger(__name__)
# How many modules are taken out of integers for the sake of a choice.
_MOST_LEFT = 8
# Outputs smaller than this differ by the rounding of what they are differences of.
_ROUNDING = 1e-6


def plain_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy on the CPU in float32 and eval mode."""
    # Mixed precision leaves an autocast wrapper around `forward`, which is no part of the model.
    plain: PreTrainedModel = extract_model_from_parallel(copy.deepcopy(model), keep_fp32_wrapper=False)
    return plain.cpu().float().eval()


def _to_trace(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that returns its outputs by name, whatever its configuration says."""
    traced = copy.deepcopy(model)
    traced.requires_grad_(False)  # the tracer takes what is no parameter of the module for a constant, which has none
    for config in {id(c): c for c in (getattr(m, "config", None) for m in traced.modules()) if c is not None}.values():
        config.return_dict, config.torchscript = True, False
    return traced


@dataclass
class ExportJob:
    """A model to export, and the data that its files are compared on."""

    model: PreTrainedModel  # as `plain_copy` made it
    backend: Backend
    task: str  # as the backend resolved it
    target: str  # "onnxruntime", "standard" or "openvino"
    tolerance: float | None  # the largest difference from torch; `None` for that of the precision
    processing_class: Any  # saved beside the model
    batches: Sequence[Tensors]  # which files are traced with and compared on
    source: str  # where the batches come from
    rest: Iterator[Batch]  # more of them, to find ranges on; read once
    quality: Quality | None  # measures a metric
    scratch: Path  # an existing folder for intermediate files
    weight_type: str = "auto"  # "int8", "uint8" or "auto", the one that is exact on this processor
    integer_convolutions: bool = False  # whether convolutions compute with integers
    pooling: Pooling | None = None  # what `model` makes an embedding with
    merges: bool = False  # whether two decoders become one file where the backend leaves two

    @cached_property
    def float_model(self) -> PreTrainedModel:
        """The model without fake quantizers."""
        if quantized_spec(self.model) is None:
            return self.model
        return strip_quantizers_(copy.deepcopy(self.model))

    def example(self) -> dict[str, np.ndarray[Any, Any]]:
        """A batch of one to time with, without labels: of the evaluation, if there is one."""
        if self.quality is not None:
            return self.quality.evaluation.first_example(self.model)
        return {name: value[:1].numpy() for name, value in self.batches[0].items()}

    def write(self, precision: Precision, folder: Path) -> dict[str, Any]:
        """Writes checkpoint, processor and ONNX files into an existing folder, compares them, and returns the facts.

        Where the rounding of integers decides which of many a model keeps as the best, the modules that compute the scores stay in
        floating point: first those right before the choice, then those before them.

        `ValueError` if the model cannot be written so; `RuntimeError` if the files differ by more than the tolerance.
        """
        from .top_k import OtherChoice, scored_by

        reference, left = self._reference(precision), list[str]()
        while True:
            try:
                return self._written(precision, folder, reference, left)
            except OtherChoice as error:
                names = scored_by(reference, self.batches[0]) if len(left) < _MOST_LEFT else []
                if not names or not quantized_modules(reference).keys() - {*names}:
                    more = " With floats in convolutions, without integer_convolutions, scores are closer."
                    raise RuntimeError(f"{error}{more * self.integer_convolutions}") from error
                logger.warning(
                    f"{str(error).partition(' Nothing was written')[0]} Left in floating point: {', '.join(names)}."
                )
            left += names
            reference = leave_in_float_(copy.deepcopy(reference), names)
            for path in {*folder.iterdir()} - {self.scratch}:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _written(
        self, precision: Precision, folder: Path, reference: PreTrainedModel, left: list[str]
    ) -> dict[str, Any]:
        """What `write` writes, of a model that computes what the files are to compute; `left` are modules that it leaves in floating point."""
        from .axes import open_axes, prove_sizes, trials
        from .runner import GeneratingFiles, open_files

        check_lowerable(reference)
        start = beginning(self.batches[0])
        # Before there is a session: its waiting threads slow torch down many times over.
        with require_ranges(reference):
            expected = run_torch(reference, self.batches)
            expected_start = run_torch(reference, [start]) if self.task.endswith(PAST) else []
        scores = None if self.quality is None else self.quality.of_torch(precision.name, reference)
        reference.save_pretrained(folder)
        if self.processing_class is not None:
            with_inputs(self.processing_class, self.batches[0]).save_pretrained(folder)
        if self.pooling is not None:
            self.pooling.write(folder, reference, self.processing_class)
        written = self.write_files(precision, folder, reference)
        axes = open_axes(folder, self.batches[0])
        tried = list(trials(reference, self.batches, axes))
        tolerance = precision.tolerance if self.tolerance is None else self.tolerance
        choices = None
        if not generates(reference, self.task):
            expected, tried, choices = self._followed(folder, reference, expected, tried, tolerance)
        if choices is not None:
            written["top_k"] = {**asdict(choices), "left_in_float": left}
        runner = open_files(folder, self.task)
        self._check_inputs(reference, runner.input_names)
        kind = "OpenVINO" if self.target == OPENVINO else "ONNX"
        check = partial(_check_parity, tolerance=tolerance, name=precision.name, kind=kind)
        parity = compare(runner, self.batches, expected)
        check(parity, choices=choices)
        if isinstance(runner, GeneratingFiles) and runner.has_cache:
            steps = compare(runner.incremental_decode, [start], expected_start)
            _check_parity(steps, tolerance, precision.name, " where it adds token by token to its cache")
            written["incremental_decode"] = asdict(steps)
        written.update(prove_sizes(folder, runner, tried, axes, check))
        if "fixed_axes" in written:
            self._convert(folder)
            runner = open_files(folder, self.task)
        if self.target == OPENVINO:  # what its files were made of
            for file in (*folder.glob("*.onnx*"), folder / MANIFEST):
                file.unlink(missing_ok=True)
        spec, files, packages = quantized_spec(reference), describe_files(folder), [*self.backend.PACKAGES]
        packages += ["openvino"] if self.target == OPENVINO else []
        facts = {
            "kind": precision.name, "task": self.task, "target": self.target, "opset": self.backend.OPSET,
            "bytes": sum(file["bytes"] for name, file in files.items() if not name.endswith(".safetensors")),
            "inputs": runner.input_names, "outputs": runner.output_names, **asdict(parity), "compared_on": self.source,
            "tolerance": tolerance, **({} if self.pooling is None else {"pooling": self.pooling.describe()}), **written,
            "spec": None if spec is None else spec.to_dict(), "files": files, "model": describe_model(reference),
            "versions": {"hfkdq": __version__, **{name: version(name) for name in packages}},
        }  # fmt: skip
        if self.quality is not None and scores is not None:
            facts["metrics"] = self.quality.of_file(reference, scores, runner)
        return facts

    def _followed(
        self, folder: Path, model: PreTrainedModel, expected: list[Tensors], tried: list[Trial], tolerance: float
    ) -> tuple[list[Tensors], list[Trial], Choices | None]:
        """What is expected of files, of batches and of trials, where torch keeps of the best what they keep."""
        from .openvino_runtime import OpenVinoSession
        from .runtime import OnnxSession
        from .top_k import follow_choices

        known = [(trial.batch, trial.expected) for trial in tried if trial.expected is not None]
        batches, wanted = [*self.batches, *(b for b, _ in known)], [*expected, *(outputs for _, outputs in known)]
        load = OpenVinoSession if self.target == OPENVINO else OnnxSession
        found, choices = follow_choices(folder, model, batches, wanted, tolerance, load)
        rest = iter(found[len(expected) :])
        tried = [trial if trial.expected is None else replace(trial, expected=next(rest)) for trial in tried]
        return found[: len(expected)], tried, choices

    def _check_inputs(self, model: PreTrainedModel, taken: Sequence[str]) -> None:
        """Refuses files that do not take what the data bring and the model reads."""
        lost = sorted(set(self.batches[0]) - {*taken, "position_ids", "decoder_attention_mask"})
        # Not what is expected of the files, which follows their choice among equal scores.
        whole = run_torch(model, self.batches[:1])[0] if lost else {}
        for name in lost:
            without = run_torch(model, [{key: v for key, v in self.batches[0].items() if key != name}])[0]
            if any(not torch.allclose(value, whole[key], atol=1e-4) for key, value in without.items()):
                raise RuntimeError(
                    f"The files of the task {self.task!r} take {', '.join(taken)}; {self.source} bring {name} too, which "
                    f"{type(model).__name__} reads. Leave it out of the data, if it is not needed, or export for another task."
                )

    def write_files(
        self, precision: Precision, folder: Path, reference: PreTrainedModel | None = None
    ) -> dict[str, Any]:
        """Writes the ONNX files alone, and OpenVINO's beside them where those are asked for; counts the linear layers with and without
        integer weights, and those that ONNX Runtime fuses."""
        from .graph import count_fused_linears, improve, merge_decoders, multiplies_exactly

        reference = self._reference(precision) if reference is None else reference
        is_converted, facts = self.target == OPENVINO, dict[str, Any]()
        saturates = self.weight_type == "auto" and not (is_converted or multiplies_exactly())
        unsigned = self.weight_type == "uint8" or saturates
        if precision.multiplies_integers and not is_converted:
            facts["weight_type"] = "uint8" if unsigned else "int8"
        if precision.has_integers:
            traced = _to_trace(reference)
            leave_read_weights_(traced, self.batches[0])
            settings = {"unsigned": unsigned, "integer_convolutions": self.integer_convolutions}
            quantized = lower_quantizers_(traced, target=self.target, **settings)
            floats = sum(isinstance(module, (nn.Linear, Conv1D)) for module in traced.modules())
            files = self._trace(traced, folder, fold_constants=False)
        else:
            shutil.copytree(self._float_files, folder, dirs_exist_ok=True)
            files = [folder / file.name for file in sorted(self._float_files.glob("*.onnx"))]
        counts: Counter[str] = Counter()
        is_real = self.integer_convolutions and self.source != MADE_UP
        batches = [{name: value.numpy() for name, value in batch.items()} for batch in self.batches if is_real]
        for file in files:
            if precision.before_fusion is not None:
                precision.before_fusion(file)
            counts.update(improve(file, target=self.target, unsigned=unsigned, batches=batches))
            if precision.after_fusion is not None:
                precision.after_fusion(file)
        if precision.has_integers and not is_converted:
            # A decoder with a past has the layers of the one without.
            facts["fused_linears"] = sum(count_fused_linears(file) for file in files if "with_past" not in file.name)
        self.backend.finish(folder, reference.config, self.task)
        if self.merges and not self.backend.MERGES and merge_decoders(folder):
            (folder / MANIFEST).unlink(missing_ok=True)  # which is about files that were traced
        self._convert(folder)
        if not precision.has_integers:
            return facts
        if self.integer_convolutions:
            facts |= counts
        return {**facts, "quantized_linears": quantized, "float_linears": floats}

    def _convert(self, folder: Path) -> None:
        """Writes OpenVINO's files beside those of ONNX, where those are asked for."""
        if self.target == OPENVINO:
            from .openvino_runtime import convert

            for file in sorted(folder.glob("*.onnx")):
                convert(file)

    @cached_property
    def _float_files(self) -> Path:
        """The folder of the traced float model, which float32, float16 and dynamic files begin as."""
        folder = self.scratch / "traced"
        folder.mkdir()
        self._trace(_to_trace(self.float_model), folder, fold_constants=True)
        return folder

    def _trace(self, model: PreTrainedModel, folder: Path, fold_constants: bool) -> list[Path]:
        try:
            with rope_by_length(model), images_together(model):
                return self.backend.trace(model, folder, self.task, self.batches, fold_constants=fold_constants)
        except Exception as error:
            if isinstance(error, (OSError, MemoryError)) or _is_own(error):
                raise
            raise RuntimeError(
                f"The exporter cannot write {type(model).__name__} ({type(error).__name__}: {brief(error)}). Nothing was "
                f"written; this is so of the float model too. The exporter that goes with Transformers 4 or 5, whichever this is not, "
                f"may write it. {WITHOUT_FILE}"
            ) from error

    def _reference(self, precision: Precision) -> PreTrainedModel:
        """The model in torch that computes what files of a precision are to compute."""
        spec = precision.spec
        if spec is None:
            return self.float_model
        if means_the_same(self.model, spec):
            warn_of_other_weights(self.model, read_facts(self.model).get("quantization", {}))
            return self.model
        data: Iterable[Batch] = chain(self.batches, (model_inputs(self.model, batch) for batch in self.rest))
        spec = _fitted(spec, self.float_model) if precision.is_fitted else spec
        return quantize(copy.deepcopy(self.float_model), spec, data).eval()


def _is_own(error: Exception) -> bool:
    """Whether an error comes out of this package: neither of the exporter, nor of the tracer below it, nor of the model's code."""
    frames = [
        frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_name != "__torch_function__"
    ]
    inside = str(frames[-1].f_globals.get("__name__")).partition(".")[0] == __name__.partition(".")[0]
    return inside and not type(error).__module__.startswith("torch.")


def _fitted(spec: QuantizationSpec, model: nn.Module) -> QuantizationSpec:
    """The spec with one scale a channel where its groups do not divide the inputs, and 8 bits for convolutions.

    Convolutions have few weights, and lose most at 4 bits.
    """
    if spec.group_size is None:
        return spec
    overrides = dict(spec.overrides)
    for name, module in model.named_modules():
        if not spec.selects(name, module):
            continue
        if isinstance(module, (nn.Conv1d, nn.Conv2d)):
            overrides[name] = {"weight_bits": 8, "group_size": None}
        elif isinstance(module, (nn.Linear, Conv1D)):
            inputs = len(module.weight) if isinstance(module, Conv1D) else module.in_features
            if inputs % spec.group_size:
                overrides[name] = {"group_size": None}
        elif any(size % spec.group_size for weight in expert_weights(module).values() for size in weight.shape[1:]):
            overrides[name] = {"group_size": None}
    return replace(spec, overrides=overrides)


def _check_parity(
    parity: Parity, tolerance: float, name: str, where: str = "", choices: Choices | None = None, kind: str = "ONNX"
) -> None:
    from .top_k import OtherChoice

    told, kind_of_error = "", RuntimeError
    if choices is not None and choices.not_followed:
        kind_of_error = OtherChoice
        told = (
            f" It keeps others among its top k than torch does, with scores that differ by up to "
            f"{choices.score_difference:.4g} of the largest: more than a tie. Leave what computes the scores in floating "
            "point with exclude_modules; suggest_bits measures which module matters."
        )
    for output, found in parity.by_output.items():
        bound = max(tolerance * found["max_abs"], _ROUNDING)
        if not found["max_abs_diff"] <= bound:
            raise kind_of_error(
                f"The {name} {kind} file differs from the torch model{where} by up to {found['max_abs_diff']:.4g} in {output} "
                f"({parity.samples} samples, largest {'logit' if output == 'logits' else 'value'} {found['max_abs']:.4g}); "
                f"allowed is {bound:.4g} ({tolerance:g} of that). Nothing was written. Pass calibration= with real data if "
                f"this was measured on random inputs, or tolerance= if the difference is acceptable.{told}"
            )
