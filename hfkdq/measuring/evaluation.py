# SPDX-License-Identifier: Apache-2.0
"""Evaluates models and whatever runs in their place alike, through the Trainer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_pt_utils import nested_detach
from transformers.trainer_utils import denumpify_detensorize
from transformers.utils import logging

from ..bars import bars_are_seen
from ..metrics.tasks import TaskMetrics
from ..modeling.forwards import SHIFT, TEACHER_PREFIX, decoder_inputs, forward_columns, return_dict_kwargs
from ..modeling.tasks import decodes

logger = logging.get_logger(__name__)
# Outputs whose last axis are classes, or the tokens where an answer begins and ends.
_CLASSES = ("logits", "start_logits", "end_logits")
Runner = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Runs a batch, on the CPU and without labels, in place of a model: outputs by name. Where texts are generated, `runner.generate(model,
batch, **settings)` writes them in place of `model.generate`."""
NEW_TOKENS = 128
"""How many tokens are generated at most for a model whose generation_config does not say."""


def says_length(generation_config: Any) -> bool:
    """Whether a model says itself how many tokens it writes at most; 20 are Transformers' own bound where nothing is said."""
    return generation_config.max_new_tokens is not None or generation_config.max_length not in (None, 20)


@dataclass(frozen=True)
class Scores:
    """What an evaluation found: `top_classes` are the likeliest ones at every place of the data set that has a label,
    int64 of shape `(places,)`; empty for outputs that are no classes, and for models that no runner stood for."""

    metrics: dict[str, float]  # what `compute_metrics` gave, numbers only
    top_classes: Tensor


@dataclass(frozen=True)
class Evaluation:
    """How every engine is evaluated: the data, the metrics and a folder for what the Trainer may write.

    `preprocess_logits` is `Trainer`'s `preprocess_logits_for_metrics`, of whose results alone all are kept in memory;
    `concat_batches` its `eval_do_concat_batches`, which hands over a list of batches where it is `False`. [`TaskMetrics`] as
    `compute_metrics` bring both, and say what else is special about their task.
    """

    dataset: Any
    compute_metrics: Callable[[EvalPrediction], Mapping[str, Any]]
    processing_class: Any
    data_collator: Any
    batch_size: int
    folder: str
    preprocess_logits: Callable[[Any, Any], Any] | None = None
    concat_batches: bool = True
    keep_columns: bool = False
    _first_predictions: list[Any] = field(default_factory=list)

    @property
    def task(self) -> TaskMetrics:
        """How the task is measured."""
        given: Any = self.compute_metrics
        task = given if isinstance(given, TaskMetrics) else TaskMetrics(compute=given, metric="")
        task = replace(task, concat_batches=task.concat_batches and self.concat_batches)
        return task if self.preprocess_logits is None else replace(task, preprocess=self.preprocess_logits)

    def of_teacher(self, student: PreTrainedModel) -> Evaluation:
        """The same rows as a teacher with a tokenizer of its own reads them: its columns, `teacher_...`, and the labels."""
        columns = getattr(self.dataset, "column_names", None) or []
        if not any(name.startswith(TEACHER_PREFIX) for name in columns):
            return self
        kept = {*forward_columns(student), "label", "label_ids"}
        others = [name for name in columns if name not in kept and not name.startswith(TEACHER_PREFIX)]
        collate = self.trainer(student).data_collator

        def theirs(rows: list[Any]) -> dict[str, Any]:
            batch = collate(rows)
            labels = {name: value for name, value in batch.items() if "label" in name or name.endswith("_positions")}
            own = {name: value for name, value in batch.items() if name.startswith(TEACHER_PREFIX)}
            return labels | {name.removeprefix(TEACHER_PREFIX): value for name, value in own.items()}

        return replace(self, dataset=self.dataset.remove_columns(others), data_collator=theirs, keep_columns=True)

    def __post_init__(self) -> None:
        if not hasattr(self.dataset, "__len__") or not hasattr(self.dataset, "__getitem__"):
            raise TypeError(f"eval_dataset must be a data set with a length, got {type(self.dataset).__name__}.")
        if len(self.dataset) == 0:
            raise ValueError("eval_dataset has no examples; there is nothing to measure on.")

    def trainer(self, model: PreTrainedModel, runner: Runner | None = None, batch_size: int = 0) -> Trainer:
        """A plain Trainer around `model`, or a `RunnerTrainer` if there is a runner."""
        on_cpu, task = model.device.type == "cpu", self.task
        # A transform makes the model's columns out of others, which must still be there.
        transforms = getattr(self.dataset, "format", {}).get("type") == "custom"
        args = TrainingArguments(
            output_dir=self.folder, per_device_eval_batch_size=batch_size or self.batch_size, use_cpu=on_cpu,
            dataloader_pin_memory=not on_cpu, remove_unused_columns=not (self.keep_columns or transforms),
            eval_do_concat_batches=task.concat_batches, report_to=[], disable_tqdm=None if bars_are_seen() else True,
        )  # fmt: skip
        settings = dict(
            model=model, args=args, data_collator=self.data_collator, processing_class=self.processing_class,
            preprocess_logits_for_metrics=task.preprocess,
        )  # fmt: skip
        is_plain = runner is None and task.prepare is None and not task.generates
        trainer = Trainer(**settings) if is_plain else RunnerTrainer(runner, task, **settings)
        if trainer.accelerator.num_processes == 1:
            # Accelerate cuts all tensors of a last batch to as many rows as it has examples: the boxes of an image too.
            trainer.gather_function = lambda data: data
        return trainer

    def metrics(self, name: str, model: PreTrainedModel, runner: Runner | None = None) -> dict[str, float]:
        """What `compute_metrics` says of the engine, numbers only."""
        return self.scores(name, model, runner).metrics

    def scores(self, name: str, model: PreTrainedModel, runner: Runner | None = None) -> Scores:
        """As [`~Evaluation.run`], without what `compute_metrics` was given."""
        return self.run(name, model, runner)[0]

    def run(self, name: str, model: PreTrainedModel, runner: Runner | None = None) -> tuple[Scores, EvalPrediction]:
        """Runs the engine called `name` over the whole data set: `runner` if there is one, else `model`; what was found, and the
        predictions and labels that `compute_metrics` was given.

        Raises:
            ValueError: the data have no labels, or a metric is not finite.
        """
        was_training, trainer = model.training, self.trainer(model, runner)
        try:
            output = trainer.predict(self.dataset)
        finally:
            model.train(was_training)
        labels = output.label_ids
        if labels is None and not self.task.needs_labels:
            if not self._first_predictions:
                self._first_predictions.append(output.predictions)
            labels = self._first_predictions[0]
        if labels is None:
            raise ValueError(
                f"eval_dataset gives {type(model).__name__} no labels, so nothing can be measured. Its columns are "
                f"{', '.join(getattr(self.dataset, 'column_names', [])) or 'unknown'}; name the labels 'labels'."
            )
        prediction = EvalPrediction(predictions=output.predictions, label_ids=labels)
        values = denumpify_detensorize(dict(self.compute_metrics(prediction)))
        numbers = {key: float(value) for key, value in values.items() if isinstance(value, (int, float))}
        if len(numbers) < len(values):
            logger.warning(f"Left out of the report, as no numbers: {', '.join(sorted(set(values) - set(numbers)))}.")
        wrong = [f"{key}={value}" for key, value in numbers.items() if not math.isfinite(value)]
        if wrong:
            raise ValueError(f"compute_metrics gave {', '.join(wrong)} for {name!r}; the report needs finite numbers.")
        tops = trainer.top_classes if isinstance(trainer, RunnerTrainer) else []
        return Scores(numbers, torch.cat(tops) if tops else torch.zeros(0, dtype=torch.int64)), prediction

    def batches(self, model: PreTrainedModel, batch_size: int) -> Iterator[dict[str, Any]]:
        """The batches of the data set, with what an encoder-decoder makes of the labels."""
        trainer = self.trainer(model, batch_size=batch_size)
        for batch in trainer.get_eval_dataloader(self.dataset):
            yield with_decoder_inputs(model, dict(batch), trainer.label_names)

    def first_example(self, model: PreTrainedModel) -> dict[str, np.ndarray[Any, Any]]:
        """The first example as a batch of one, without labels."""
        trainer = self.trainer(model, batch_size=1)
        batch = next(iter(trainer.get_eval_dataloader(self.dataset)))
        return {key: _on_cpu(value).numpy() for key, value in batch.items() if key not in trainer.label_names}


class RunnerTrainer(Trainer):
    """Evaluates a runner in place of the model that it stands for, or the model itself where its task asks for more than
    its outputs; `top_classes` are those of every batch, the likeliest ones at the places that have a label."""

    def __init__(self, runner: Runner | None, task: TaskMetrics, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._runner, self._task = runner, task
        self.top_classes: list[Tensor] = []
        self._names: list[str] | None = None

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        labels = tuple(inputs[name] for name in self.label_names if inputs.get(name) is not None)
        given = {name: value for name, value in inputs.items() if name not in self.label_names}
        batch = {name: _on_cpu(value) for name, value in given.items() if isinstance(value, Tensor)}
        if self._task.generates:
            return None, self._generated(model, batch), _alone(nested_detach(labels))
        whole = with_decoder_inputs(model, dict(inputs), self.label_names)
        if "decoder_input_ids" in whole:
            batch["decoder_input_ids"] = _on_cpu(whole["decoder_input_ids"])
        outputs = self._outputs(model, batch)
        self.top_classes += [_top_classes(value, labels) for name, value in outputs.items() if name in _CLASSES]
        if self._task.prepare is not None:
            outputs = self._task.prepare(model, batch, outputs)
        elif any(not isinstance(entry, Tensor) for entry in labels):
            outputs = self._in_place(model, inputs, outputs)
        return None, _alone(tuple(outputs.values())), _alone(nested_detach(labels))

    def _outputs(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if self._runner is not None:
            return self._runner(batch)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**self._prepare_inputs(dict(batch)), **return_dict_kwargs(model))
        return {name: _on_cpu(value) for name, value in outputs.items() if isinstance(value, Tensor)}

    def _generated(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """The tokens that are written for a batch, as `model.generation_config` says."""
        settings = {} if says_length(model.generation_config) else {"max_new_tokens": NEW_TOKENS}
        given = {name: value for name, value in batch.items() if not name.startswith("decoder_")}
        writer = getattr(self._runner, "generate", None)
        if writer is not None:
            return writer(model, given, **settings)
        with torch.no_grad():
            return _on_cpu(model.generate(**self._prepare_inputs(given), **settings))

    def _in_place(self, model: nn.Module, inputs: Any, outputs: Mapping[str, Tensor]) -> dict[str, Any]:
        """The outputs at the places that the Trainer has them at, where a model that has labels gives others before them."""
        if self._names is None:
            with torch.no_grad():
                self._names = [name for name in model(**self._prepare_inputs(inputs)) if name != "loss"]
        last = max((self._names.index(name) for name in outputs if name in self._names), default=-1)
        return {name: outputs.get(name, {}) for name in self._names[: last + 1]} | dict(outputs)


def with_decoder_inputs(
    model: nn.Module, batch: dict[str, Any], label_names: Sequence[str] = ("labels",)
) -> dict[str, Any]:
    """A batch with the decoder's inputs, made of the labels, for a model that writes a text after another input."""
    labels = [batch[name] for name in label_names if name in batch]
    is_text = len(labels) == 1 and isinstance(labels[0], Tensor)
    if not is_text or "decoder_input_ids" in batch or not (decodes(model) or hasattr(model, SHIFT)):
        return batch
    return {**batch, "decoder_input_ids": decoder_inputs(model, labels[0])}


def _top_classes(logits: Tensor, labels: tuple[Any, ...]) -> Tensor:
    """The likeliest classes, flat, without the places whose label says that they do not count."""
    if logits.shape[-1] == 1 or any(not isinstance(entry, Tensor) for entry in labels):
        return torch.zeros(0, dtype=torch.int64)
    tops = logits.argmax(-1)  # logits without their last axis
    return tops[labels[0] != -100] if labels and labels[0].shape == tops.shape else tops.flatten()


def _alone(values: tuple[Any, ...]) -> Any:
    return values[0] if len(values) == 1 else values or None


def _on_cpu(tensor: Tensor) -> Tensor:
    return (tensor.float() if tensor.is_floating_point() else tensor).cpu()
