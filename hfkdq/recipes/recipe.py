# SPDX-License-Identifier: Apache-2.0
"""The sections of a recipe, as plain data. Importing it costs nothing: what the sections make is in `parts.py`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from ..fields import MOST_THREADS

# What git takes for the name of a branch, without its rarer letters.
_BRANCH = re.compile(r"(?!.*(\.\.|//|\.lock$|[./]$))[\w][\w./+-]*")


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """The data of a recipe: files, folders or ids on the Hub, as `hfkdq export` reads them.

    A split may follow a colon, as in `squad:validation`, and so may a configuration before it, as in
    `nyu-mll/glue:sst2:validation`.

    Args:
        train (`str`): the rows to train on (split: train).
        eval (`str`, *optional*): the rows to measure on (split: validation, then test). By default those of `train`; of data
            that are one split, a tenth of its rows is kept back from training, the same at every run.
        unlabelled (`str`, *optional*): more rows to train on, for a classifier: a label that they have is not read, and the teacher
            alone teaches them.
        calibration (`str`, *optional*): what ranges are found on where none were trained, and files compared on; the rows
            of training by default.
        text_columns (list of `str`, *optional*): one column of texts, or two for pairs; by default those that there are.
        max_length (`int`, *optional*): tokens beyond this are cut off; what the model takes by default.
        train_samples (`int`, *optional*): how many rows to draw at random, the same at every run; all by default.
        eval_samples (`int`, *optional*): the same for `eval`.
        calibration_samples (`int`, defaults to 256): the same for `calibration`.
    """

    train: str
    eval: str | None = None
    unlabelled: str | None = None
    calibration: str | None = None
    text_columns: list[str] | None = None
    max_length: int | None = None
    train_samples: int | None = None
    eval_samples: int | None = None
    calibration_samples: int = 256

    def __post_init__(self) -> None:
        for name in ("train", "eval", "unlabelled", "calibration"):
            if (where := getattr(self, name)) is not None and not where.strip():
                raise ValueError(f"data.{name} is empty. Name a file, a folder or data on the Hub.")
        for name in ("max_length", "train_samples", "eval_samples", "calibration_samples"):
            _at_least(f"data.{name}", getattr(self, name), 1)
        if self.text_columns is not None and len(self.text_columns) not in (1, 2):
            raise ValueError(f"data.text_columns has one name or two, got {len(self.text_columns)}.")


@dataclass(frozen=True, kw_only=True)
class StudentSection:
    """The arguments of [`make_student`].

    Args:
        num_layers (`int`, *optional*): how many layers the student gets, of an encoder-decoder its encoder.
        layers (list of `int`, *optional*): the layers to copy instead, counted from 1.
        num_decoder_layers (`int`, *optional*): as `num_layers`, of the decoder of an encoder-decoder.
        decoder_layers (list of `int`, *optional*): as `layers`, of the decoder of an encoder-decoder.
    """

    num_layers: int | None = None
    layers: list[int] | None = None
    num_decoder_layers: int | None = None
    decoder_layers: list[int] | None = None

    def __post_init__(self) -> None:
        for number, chosen in (("num_layers", "layers"), ("num_decoder_layers", "decoder_layers")):
            _at_least(f"student.{number}", getattr(self, number), 1)
            if getattr(self, number) is not None and getattr(self, chosen) is not None:
                raise ValueError(f"student has {number} and {chosen}. Give one of them, null for the other.")
        if all(value is None for value in vars(self).values()):
            raise ValueError("student says no layers. Give num_layers, or leave the section out to keep them all.")


@dataclass(frozen=True, kw_only=True)
class ExportSection:
    """The arguments of [`export_onnx`] that are no data.

    Args:
        quantization (`str`, *optional*): a precision, such as `int8`, `float32` or `auto`; by default the integers that were
            trained, else float32.
        task (`str`, *optional*): Optimum's name of the task.
        tolerance (`float`, *optional*): largest difference from PyTorch, as a share of the largest logit.
        target (`str`, defaults to `"onnxruntime"`): `onnxruntime` or `standard` operators, or files for `openvino`.
        weight_type (`str`, defaults to `"auto"`): `auto`, `int8` or `uint8`.
        metric (`str`, *optional*): what may drop; the first of the task by default.
        max_drop (`float`, *optional*): refuse a file whose metric is worse than PyTorch's by more.
        allow_drop (`bool`, defaults to `False`): keep such a file, and say so.
        latency_rounds (`int`, defaults to 0): turns in which the file is timed against its float file; the report times too.
        threads (`int`, *optional*): threads while timing.
        integer_convolutions (`bool`, defaults to `False`): convolutions as integer operators.
    """

    quantization: str | None = None
    task: str | None = None
    tolerance: float | None = None
    target: str = "onnxruntime"
    weight_type: str = "auto"
    metric: str | None = None
    max_drop: float | None = None
    allow_drop: bool = False
    latency_rounds: int = 0
    threads: int | None = None
    integer_convolutions: bool = False

    def __post_init__(self) -> None:
        from ..export.choices import TARGETS
        from ..export.precisions import AUTO, NAMES

        for name, allowed in (
            ("quantization", (None, *NAMES)), ("target", TARGETS),
            ("weight_type", ("auto", "int8", "uint8")),
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                words = ", ".join(map(str, filter(None, allowed)))
                raise ValueError(f"export.{name} is {getattr(self, name)!r:.80}; it is one of {words}.")
        _at_least("export.latency_rounds", self.latency_rounds, 0)
        _at_least("export.threads", self.threads, 1)
        _at_least("export.max_drop", self.max_drop, 0)
        if self.tolerance is not None and not self.tolerance > 0:
            raise ValueError(f"export.tolerance must be larger than 0, got {self.tolerance!r}.")
        if self.allow_drop and self.max_drop is None and self.quantization != AUTO:
            raise ValueError("export.allow_drop needs export.max_drop: without a bound every drop is allowed.")


@dataclass(frozen=True, kw_only=True)
class ReportSection:
    """What [`CompressionReport.measure`] is told beside the models, the files and the data.

    Args:
        batch_size (`int`, defaults to 32): examples in a batch for the metrics.
        latency_rounds (`int`, defaults to 3): how often each engine has its turn of half a second; 0 leaves latency out.
        threads (`int`, *optional*): threads of each engine while it is timed.
        resamples (`int`, *optional*): how often rows are drawn anew for the intervals of the metrics; 0 leaves out all but Wilson's.
        dataset (`str`, *optional*): what the data of evaluation are called.
        base_model (`str`, *optional*): Hub id of the model that the student comes from.
        license (`str`, *optional*): license of the student, such as `apache-2.0`.
        language (`str` or list of `str`, *optional*): language of the data, such as `en`.
    """

    batch_size: int = 32
    latency_rounds: int = 3
    threads: int | None = None
    resamples: int | None = None
    dataset: str | None = None
    base_model: str | None = None
    license: str | None = None
    language: str | list[str] | None = None

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("latency_rounds", 0), ("threads", 1), ("resamples", 0)):
            _at_least(f"report.{name}", getattr(self, name), least)
        if self.license is not None and not re.fullmatch(r"[a-z0-9._-]+", self.license):
            raise ValueError(
                f"report.license is {self.license!r:.80}, expected an identifier of the Hub such as apache-2.0."
            )


@dataclass(frozen=True, kw_only=True)
class PushSection:
    """The arguments of [`push_to_hub`]; the token is that of `hf auth login`, as a file is no place for one.

    Args:
        repo_id (`str`): the repository, `user/name`.
        private (`bool`, *optional*): whether a repository that is created is private.
        revision (`str`, *optional*): the branch.
        create_pr (`bool`, defaults to `False`): open a pull request.
        commit_message (`str`, defaults to `"Upload compressed model"`): first line of the commit's message.
    """

    repo_id: str
    private: bool | None = None
    revision: str | None = None
    create_pr: bool = False
    commit_message: str = "Upload compressed model"

    def __post_init__(self) -> None:
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # exported there, without __all__

        try:
            validate_repo_id(self.repo_id)
        except ValueError as error:
            raise ValueError(f"push.repo_id is {self.repo_id!r:.80}, expected user/name: {error}") from None
        if self.revision is not None and not _BRANCH.fullmatch(self.revision):
            raise ValueError(f"push.revision is {self.revision!r:.80}, which is no name of a branch.")
        if not self.commit_message.strip():
            raise ValueError("push.commit_message is empty. Leave it out for the default.")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What becomes of a model. A section that is left out, or `null`, is not done, as in a program.

    Args:
        model (`str`): folder or Hub id of the checkpoint that is made smaller.
        data (`dict`): what is trained and measured on.
        teacher (`str`, *optional*): folder or Hub id of the checkpoint to learn from; that of `model` by default.
        student (`dict`, *optional*): the layers that are kept, all by default.
        objectives (list, *optional*): what is learned, as `LogitKD` or `LogitKD: {temperature: 2.0}`: names of classes and their
            arguments. Schedules are written alike: `weight: {Linear: {start: 1, end: 0}}`. The task loss by default.
        training (`dict`): the fields of `transformers.TrainingArguments` that are not as by default.
        pruning (`dict` or list of `dict`, *optional*): the arguments of [`PruningSpec`] and [`PruningCallback`]; of several structures a
            list.
        quantization (`dict`, *optional*): the arguments of [`QuantizationSpec`] and [`QATCallback`].
        export (`dict`, *optional*): how the ONNX file is made; `{}` is as by default.
        report (`dict`, *optional*): what is measured at the end; `{}` is as by default.
        push (`dict`, *optional*): where on the Hub the file goes.
    """

    model: str
    data: DataSection
    teacher: str | None = None
    student: StudentSection | None = None
    objectives: list[Any] | None = None
    training: dict[str, Any] = field(default_factory=dict)
    pruning: dict[str, Any] | list[dict[str, Any]] | None = None
    quantization: dict[str, Any] | None = None
    export: ExportSection | None = None
    report: ReportSection | None = None
    push: PushSection | None = None

    def __post_init__(self) -> None:
        for name in ("model", "teacher"):
            if (where := getattr(self, name)) is not None and not where.strip():
                raise ValueError(f"{name} is empty. Name the folder of a checkpoint, or a model on the Hub.")
        if self.objectives is not None and not self.objectives:
            raise ValueError("objectives is an empty list. Name one, or leave it out for the task loss alone.")
        for name, what in (("push", "sends"), ("report", "measures")):
            if getattr(self, name) is not None and self.export is None:
                raise ValueError(
                    f"{name} {what} the exported file, and there is no export. Add the section export: {{}}, or leave {name} out."
                )


def _at_least(name: str, value: float | None, least: int) -> None:
    if value is not None and value < least:
        raise ValueError(f"{name} must be {least} or more, got {value!r}.")
    if name.endswith(".threads") and value is not None and value > MOST_THREADS:
        raise ValueError(f"{name} must be {MOST_THREADS} or less, got {value!r}.")
