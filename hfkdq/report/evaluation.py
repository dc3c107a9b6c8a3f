# SPDX-License-Identifier: Apache-2.0
"""Evaluates models and ONNX files alike, through the Trainer.

Knows data, collators and metrics; sizes, latencies and reports are measured elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import EvalPrediction, PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import denumpify_detensorize
from transformers.utils import logging

from ..export.runtime import OnnxSession

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """How every engine is evaluated: the data, the metrics and a folder for what the Trainer may write."""

    dataset: Any
    compute_metrics: Callable[[EvalPrediction], Mapping[str, Any]]
    processing_class: Any
    data_collator: Any
    batch_size: int
    folder: str

    def trainer(self, model: PreTrainedModel, session: OnnxSession | None = None, batch_size: int = 0) -> Trainer:
        """A plain Trainer around `model`; one that runs `session` in its place if there is one."""
        on_cpu = model.device.type == "cpu"
        args = TrainingArguments(
            output_dir=self.folder,
            per_device_eval_batch_size=batch_size or self.batch_size,
            use_cpu=on_cpu,
            dataloader_pin_memory=not on_cpu,
            # A transform makes the model's columns out of others, which must still be there.
            remove_unused_columns=getattr(self.dataset, "format", {}).get("type") != "custom",
            report_to=[],
        )
        settings = dict(
            model=model, args=args, data_collator=self.data_collator, processing_class=self.processing_class
        )
        return Trainer(**settings) if session is None else _OnnxTrainer(session, **settings)

    def metrics(self, name: str, model: PreTrainedModel, session: OnnxSession | None = None) -> dict[str, float]:
        """What `compute_metrics` says of the engine, numbers only."""
        was_training = model.training
        try:
            output = self.trainer(model, session).predict(self.dataset)
        finally:
            model.train(was_training)
        if output.label_ids is None:
            raise ValueError(
                f"eval_dataset gives {type(model).__name__} no labels, so nothing can be measured. Its columns are "
                f"{', '.join(getattr(self.dataset, 'column_names', [])) or 'unknown'}; name the labels 'labels'."
            )
        values = denumpify_detensorize(
            dict(self.compute_metrics(EvalPrediction(predictions=output.predictions, label_ids=output.label_ids)))
        )
        numbers = {key: float(value) for key, value in values.items() if isinstance(value, (int, float))}
        if len(numbers) < len(values):
            logger.warning(f"Left out of the report, as no numbers: {', '.join(sorted(set(values) - set(numbers)))}.")
        wrong = [f"{key}={value}" for key, value in numbers.items() if not math.isfinite(value)]
        if wrong:
            raise ValueError(f"compute_metrics gave {', '.join(wrong)} for {name!r}; the report needs finite numbers.")
        return numbers

    def first_example(self, model: PreTrainedModel) -> dict[str, np.ndarray[Any, Any]]:
        """The first example as a batch of one, without labels."""
        trainer = self.trainer(model, batch_size=1)
        batch = next(iter(trainer.get_eval_dataloader(self.dataset)))
        return {key: _array(value) for key, value in batch.items() if key not in trainer.label_names}


class _OnnxTrainer(Trainer):
    """Evaluates an ONNX file in place of the model that it was exported from."""

    def __init__(self, session: OnnxSession, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._session = session

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        outputs = self._session({key: _array(value) for key, value in inputs.items()})
        logits = tuple(torch.from_numpy(value) for value in outputs.values())
        labels = tuple(inputs[name].cpu() for name in self.label_names if name in inputs)
        return None, _alone(logits), _alone(labels)


def _alone(values: tuple[torch.Tensor, ...]) -> Any:
    return values[0] if len(values) == 1 else values or None


def _array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    return np.asarray((tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy())
