# SPDX-License-Identifier: Apache-2.0
"""What a recipe is carried out on: its models, its processor, and its rows as examples of the model's task."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed

from .. import PruningSpec, make_student, prune
from ..bars import bars_are_seen
from ..export.backends import load_backend
from ..export.checks import check_arguments, check_openvino, resolve_task
from ..export.choices import FLAT, OPENVINO
from ..export.precisions import AUTO, precision_of
from ..export.protocol import PAST
from ..hub import check_login
from ..measuring.evaluation import NEW_TOKENS, Evaluation, says_length
from ..metrics import TaskMetrics, metrics_for
from ..metrics.base import IGNORED
from ..modeling import load_checkpoint
from ..modeling.batches import first_batch, make_batches
from ..modeling.tasks import tasks_of
from ..pruning import PruningCallback
from ..quantization import QATCallback, means_the_same, prepare_qat_
from ..recipes import ExportSection, Recipe, override, read
from ..recipes.defaults import default_objectives, default_sections
from ..recipes.parts import Parts, parts_of, training_arguments
from ..report.plots import check_plots
from ..trainer import DistillationTrainer, Seq2SeqDistillationTrainer
from .checkpoint import load_processor
from .data import CALIBRATION, EVALUATION, load_rows, load_split
from .inputs import Reader
from .labelled import labelled, with_unlabelled


@dataclass(frozen=True)
class Setup:
    """Models and data of a recipe.

    Args:
        recipe ([`Recipe`]): with all that was chosen for it.
        parts ([`Parts`]): its parts.
        original (`PreTrainedModel`): the model as it came.
        teacher (`PreTrainedModel`, *optional*): the model to learn from, where an objective does.
        student (`PreTrainedModel`): the model that is trained.
        processor (*optional*): tokenizer or processor.
        reader ([`Reader`]): makes batches of named data.
        train, evaluation (`datasets.Dataset`): examples of the task.
        collate (`Callable`): makes batches of them.
        metrics ([`TaskMetrics`]): of the task.
        described (`tuple` of `str`): which rows are trained and measured on.
    """

    recipe: Recipe
    parts: Parts
    original: PreTrainedModel
    teacher: PreTrainedModel | None
    student: PreTrainedModel
    processor: Any
    reader: Reader
    train: Any
    evaluation: Any
    collate: Callable[[list[Any]], Any]
    metrics: TaskMetrics
    described: tuple[str, str]

    def trainer(self, output_dir: str | os.PathLike[str], *callbacks: TrainerCallback, **changes: Any) -> Any:
        """The trainer of the recipe, with other callbacks first; `changes` are training arguments for this time."""
        task, is_made = self.metrics, getattr(self.train, "format", {}).get("type") == "custom"
        if (
            task.generates
            and "generation_max_length" not in self.parts.training
            and not says_length(self.student.generation_config)
        ):
            changes["generation_max_length"] = (
                NEW_TOKENS + 1
            )  # with the token that a decoder begins with, as the report
        args = training_arguments(
            self.parts, os.fspath(output_dir), task.generates,
            # A transform makes the model's columns out of others, which must still be there.
            **{"remove_unused_columns": not is_made, "eval_do_concat_batches": task.concat_batches,
               "disable_tqdm": None if bars_are_seen() else True, **changes},
        )  # fmt: skip
        # What needs a batch's inputs, or its labels uncut, has no place in the Trainer; the report measures it.
        measured = task.needs_labels and task.prepare is None and task.concat_batches
        cls = Seq2SeqDistillationTrainer if task.generates else DistillationTrainer
        return cls(
            model=self.student, args=args, train_dataset=self.train, eval_dataset=self.evaluation, data_collator=self.collate,
            processing_class=self.processor, compute_metrics=task if measured else None,
            preprocess_logits_for_metrics=task.preprocess if measured and not task.generates else None,
            callbacks=[*callbacks, *self._callbacks()], teacher_model=self.teacher,
            objectives=[objective.copy() for objective in self.parts.objectives] or None,
        )  # fmt: skip

    @property
    def loses_tokens(self) -> bool:
        """Whether the student loses tokens, which it does once it is trained."""
        return any(spec.structure == "vocab" for spec, _ in self.parts.pruning)

    def without_tokens(self, student: PreTrainedModel) -> Setup:
        """Takes the tokens out of a student that [`prune_tokens_`] does; a setup with a tokenizer and examples of its own."""
        processor, data = self.prune_tokens_(student), self.recipe.data
        reader = Reader(student, processor, data.text_columns, data.max_length)
        train, evaluation, collate, _ = _examples(reader, self.recipe)
        return replace(
            self,
            student=student,
            processor=processor,
            reader=reader,
            train=train,
            evaluation=evaluation,
            collate=collate,
        )

    def prune_tokens_(self, model: PreTrainedModel) -> PreTrainedTokenizerBase:
        """Takes the tokens out of a model that the examples of training do not use; its tokenizer is a copy.

        Raises:
            ValueError: the model does not read texts alone, or its tokenizer is of no known type.
        """
        if not isinstance(self.processor, PreTrainedTokenizerBase) or "input_ids" not in self.train[0]:
            raise ValueError(
                f"pruning.structure vocab is for models that read texts alone, and {type(model).__name__} does not."
            )
        written = self.train if self.metrics.generates else ()
        answers = ([id_ for id_ in row.get("labels", ()) if id_ != IGNORED] for row in written)
        used = chain((row["input_ids"] for row in self.train), answers)
        specs = [spec for spec, _ in self.parts.pruning if spec.structure == "vocab"]
        spec = specs[0] if specs else PruningSpec(structure="vocab")
        prune(model, spec, used, processing_class=(processor := copy.deepcopy(self.processor)))
        return processor

    def _callbacks(self) -> list[TrainerCallback]:
        found: list[TrainerCallback] = []
        for spec, rest in self.parts.pruning:
            if spec.structure == "vocab":  # which goes once the student is trained
                continue
            if spec.criterion == "teacher":
                rows = self.train.select(range(min(len(self.train), self.recipe.data.calibration_samples)))
                rest = {**rest, "calibration": rows, "data_collator": self.collate, "teacher_model": self.teacher}
            found.append(PruningCallback(spec, **rest))
        if self.parts.quantization is not None:
            found.append(QATCallback(self.parts.quantization[0], **self.parts.quantization[1]))
        return found


def set_up(recipe: Recipe, changes: list[str] | None, source: str) -> Setup:
    """Loads models and data, and checks that they fit.

    Args:
        recipe ([`Recipe`]): what to do.
        changes (list of `str`, *optional*): the recipe has a model and data alone: the rest is chosen for them, and then these
            `key=value` applied.
        source (`str`): what errors call the recipe.

    Raises:
        ValueError: a model, data or a setting that does not fit the others.
    """
    original = load_checkpoint(recipe.model)
    of_objectives = [text for text in changes or () if text.startswith("objectives")]
    if changes is not None:
        data = {name: value for name, value in asdict(recipe.data).items() if value is not None}
        sections: dict[str, Any] = {"model": recipe.model, "data": data, **default_sections(original)}
        for layers in ("layers", "decoder_layers"):
            if any(text.startswith(f"student.{layers}=") for text in changes):  # they take the place of their number
                sections.get("student", {}).pop(f"num_{layers}", None)
        recipe = read(override(sections, [text for text in changes if text not in of_objectives]), source)
    set_seed(recipe.training.get("seed", 42))
    processor = load_processor(recipe.model)
    reader = Reader(original, processor, recipe.data.text_columns, recipe.data.max_length)
    train, evaluation, collate, described = _examples(reader, recipe)
    metrics = metrics_for(original, processor, evaluation)
    batch = first_batch(make_batches(original, train, 2, collate, processor))
    if recipe.student is None:
        student = copy.deepcopy(original)
    else:
        student = make_student(original, **asdict(recipe.student), example_inputs=batch)
    teacher = original if recipe.teacher is None else load_checkpoint(recipe.teacher)
    if changes is not None:
        chosen: dict[str, Any] = {}
        labelled = float(metrics.needs_labels)
        if recipe.data.unlabelled is not None:
            labels = train.with_format("numpy")["labels"][:]
            labelled = float((labels != IGNORED).mean())
        if not any(text.startswith("objectives=") for text in of_objectives):
            chosen["objectives"] = default_objectives(student, teacher, batch, labelled)
        recipe = Recipe(**{**vars(recipe), **override(chosen, of_objectives)})
    parts = parts_of(recipe, source)
    training_arguments(parts, tempfile.gettempdir(), metrics.generates)  # the recipe's own with those that were chosen
    if recipe.teacher is not None and not parts.uses_teacher:
        raise ValueError(
            f"{source}: nothing is learned from teacher {recipe.teacher}. Add an objective such as LogitKD."
        )
    if recipe.data.unlabelled is not None and not parts.uses_teacher:
        raise ValueError(f"{source}: data.unlabelled needs a teacher to learn from. Add an objective such as LogitKD.")
    setup = Setup(
        recipe, parts, original, teacher if parts.uses_teacher else None, student, processor, reader, train, evaluation, collate,
        metrics, described,
    )  # fmt: skip
    _check_names_of_metrics(setup, source)
    if setup.loses_tokens:
        setup.prune_tokens_(copy.deepcopy(student))
    if recipe.export is not None:
        try:
            _check_export(setup, recipe.export)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
    return setup


def check_means(recipe: Recipe) -> None:
    """Refuses, before anything is loaded, what the end of a run would lack: the exporter, matplotlib, a login.

    Raises:
        ImportError: matplotlib is missing, for the page and the plot of the report.
        RuntimeError: the exporter is missing.
        ValueError: a push is asked for, and no token may do it.
    """
    if recipe.export is not None:
        load_backend()
    if recipe.report is not None:
        check_plots()
    if recipe.push is not None:
        check_login()


def _check_export(setup: Setup, section: ExportSection) -> None:
    """Refuses what `export_onnx` would refuse of the trained student for its settings, and calibration data that cannot be read."""
    model, trained = setup.student, setup.parts.quantization
    backend = load_backend()
    check_arguments(model, section.tolerance, section.target, section.weight_type, FLAT)
    try:
        usual = resolve_task(backend, model, None).removesuffix(PAST)
        task = resolve_task(backend, model, section.task)
        if section.target == OPENVINO:
            check_openvino(model, task)
        task = task.removesuffix(PAST)
    except ValueError as error:
        raise ValueError(f"export.task: {error}" if section.task is not None else f"export: {error}") from error
    fitting = {usual, *(known.name for known in tasks_of(model))}
    if task not in fitting:
        raise ValueError(
            f"export.task is {section.task!r}, and {type(model).__name__} is for {', '.join(sorted(fitting))}. Leave it out."
        )
    precision = None if section.quantization in (None, AUTO) else precision_of(section.quantization)
    if trained is not None and precision is not None and precision.spec is not None:
        quantized = prepare_qat_(copy.deepcopy(model), trained[0])
        if not means_the_same(quantized, precision.spec):
            raise ValueError(
                f"export.quantization is {section.quantization!r}, and quantization trains other integers. Leave export.quantization "
                "out to have those that are trained, or the section quantization to have none trained."
            )
    has_float_inputs = trained[0].activation_bits is None if trained is not None else True
    if precision is not None:
        has_float_inputs = not precision.needs_calibration
    if section.integer_convolutions and has_float_inputs and section.quantization != AUTO:
        raise ValueError(
            "export.integer_convolutions needs 8-bit inputs of convolutions, and the file has floats. Set it to false, or quantize "
            "activations."
        )
    data = setup.recipe.data
    key = "data.train" if data.calibration is None else "data.calibration"
    try:
        where = data.calibration or data.train
        next(iter(setup.reader.batches(where, CALIBRATION, data.calibration_samples, tell=False)))
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def _check_names_of_metrics(setup: Setup, source: str) -> None:
    """Refuses names that the metrics of a few rows have not, before anything is trained."""
    export, training = setup.recipe.export, setup.recipe.training
    best = training.get("metric_for_best_model")
    wanted = {
        "export.metric": None if export is None else export.metric,
        "training.metric_for_best_model": None if best is None else best.removeprefix("eval_"),
    }
    if all(name in (None, "loss") for name in wanted.values()):
        return
    rows = setup.evaluation.select(range(min(32, len(setup.evaluation))))
    with tempfile.TemporaryDirectory() as scratch:
        evaluation = Evaluation(rows, setup.metrics, setup.processor, setup.collate, 8, scratch)
        try:
            names = evaluation.metrics("model", setup.original)
        except ValueError:  # such as a correlation of too few rows
            return
    for key, name in wanted.items():
        if name is not None and name not in names and (name != "loss" or key == "export.metric"):
            refusal = f"{key} is {name!r}, and what is measured are {', '.join(names)}"
            raise ValueError(f"{source}: {refusal}.")


def _examples(reader: Reader, recipe: Recipe) -> tuple[Any, Any, Any, tuple[str, str]]:
    data = recipe.data
    if data.eval is None:
        (rows, said), (others, said_of_others) = load_split(data.train, data.train_samples, data.eval_samples)
    else:
        rows, said = load_rows(data.train, ("train",), data.train_samples)
        others, said_of_others = load_rows(data.eval, EVALUATION, data.eval_samples)
    evaluation = labelled(reader, others, said_of_others)
    if data.unlabelled is None:
        train = labelled(reader, rows, said)
    else:
        more, said_of_more = load_rows(data.unlabelled, CALIBRATION, None)
        train = with_unlabelled(reader, rows, said, more, said_of_more)
        said = f"{said} and, without labels, {said_of_more}"
    described = (f"{said}: {train.columns}", f"{said_of_others}: {evaluation.columns}")
    return train.dataset, evaluation.dataset, train.collate, described
