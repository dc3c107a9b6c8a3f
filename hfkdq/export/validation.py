# SPDX-License-Identifier: Apache-2.0
"""Validates a file: its metric against that of the model in torch, its latency against that of the float file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from ..measuring.evaluation import Evaluation, Runner, Scores
from ..measuring.latency import (
    BUSY,
    Latency,
    TimedEngine,
    check_counts,
    speedup,
    speedup_interval,
    time_engines,
    total_latency,
)
from ..metrics.tasks import LOWER_IS_BETTER
from .precisions import FLOAT
from .verify import run_torch

logger = logging.get_logger(__name__)
# Two medians closer than this are alike; the machines that this runs on do other work too.
NOISE = 0.05
TOO_BUSY = f"the machine was too busy to tell: two estimates of it, by medians and by fastest calls or by two rounds, differ by more than {BUSY:g} times"
BATCH_SIZE = 32


class Quality:
    """Measures metrics in torch and on files, and bounds how far one of them may drop.

    `metric` names the bounded one where there are several; `max_drop`, in its unit, says how much worse a file may be;
    `ValueError` if that is negative or no number.
    """

    def __init__(
        self, evaluation: Evaluation, metric: str | None, greater_is_better: bool, max_drop: float | None
    ) -> None:
        if max_drop is not None and not (max_drop >= 0 and math.isfinite(max_drop)):
            raise ValueError(
                f"max_drop must be 0 or a positive number (in the unit of the metric), got {max_drop!r}. For a metric "
                "that falls as models get better, pass greater_is_better=False."
            )
        self.evaluation, self.metric = evaluation, metric or evaluation.task.metric or None
        known = evaluation.task.metric != ""
        self.greater_is_better = greater_is_better and not (known and self.metric in LOWER_IS_BETTER)
        self.max_drop = max_drop
        self._known: list[tuple[PreTrainedModel, Scores]] = []
        self._measured: dict[str, dict[str, float]] = {}

    def begin(self, model: PreTrainedModel, plain: PreTrainedModel) -> None:
        """Measures the model as it was given and, if it has fake quantizers, what it is without them.

        `ValueError` if there is no such metric, or none was named and there are several to bound.
        """
        metrics = self.of_torch("torch", model).metrics
        if self.metric is None and len(metrics) == 1:
            self.metric = next(iter(metrics))
        if self.metric is None and self.max_drop is not None:
            raise ValueError(
                f"max_drop bounds one metric; compute_metrics gave {', '.join(metrics) or 'no number'}. "
                "Name it with metric=."
            )
        if self.metric is not None and self.metric not in metrics:
            raise ValueError(
                f"metric={self.metric!r} is none of what compute_metrics gave: {', '.join(metrics) or 'no number'}."
            )
        self._measured = {"torch": metrics}
        if plain is not model:
            self._measured["float"] = self.of_torch("float", plain).metrics

    def of_torch(self, name: str, model: PreTrainedModel) -> Scores:
        """The scores of a model on the CPU, measured once; to be called while no session of ONNX Runtime is open."""
        for known, scores in self._known:
            if known is model:
                return scores
        scores = self.evaluation.scores(name, model, _torch_runner(model))
        self._known.append((model, scores))
        return scores

    def of_file(self, model: PreTrainedModel, reference: Scores, runner: Runner) -> dict[str, Any]:
        """Facts about a file that computes what a model with the scores `reference` does; `model` tells the Trainer."""
        scores = self.evaluation.scores("the exported file", model, runner)
        ours, theirs = scores.top_classes, reference.top_classes
        compared = len(ours) if ours.shape == theirs.shape else 0
        different = int((ours != theirs).sum()) if compared else 0
        return {
            "metric": self.metric, "greater_is_better": self.greater_is_better, "max_drop": self.max_drop,
            "examples": len(self.evaluation.dataset), **self._measured, "reference": reference.metrics,
            "onnx": scores.metrics, "drop": self._drop(scores.metrics), "top1_compared": compared,
            "top1_different": different if compared else None,
            "top1_different_share": different / compared if compared else None,
        }  # fmt: skip

    def rejection_reason(self, facts: Mapping[str, Any]) -> str | None:
        """Why a file with these facts is not good enough; `None` if it is."""
        if self.max_drop is None or facts["drop"] <= self.max_drop:
            return None
        before, after = facts["torch"][self.metric], facts["onnx"][self.metric]
        return (
            f"{self.metric} goes from {before:.6g} in torch to {after:.6g} in the exported file on {facts['examples']} "
            f"examples; that is {facts['drop']:.4g} worse, and max_drop allows {self.max_drop:g}."
        )

    def _drop(self, metrics: Mapping[str, float]) -> float | None:
        if self.metric is None:
            return None
        if self.metric not in metrics:
            raise ValueError(
                f"compute_metrics gave {self.metric} for torch, and only {', '.join(metrics)} for the file."
            )
        drop = self._measured["torch"][self.metric] - metrics[self.metric]
        return round(drop if self.greater_is_better else -drop, 12)  # 0.9 - 0.89 is more than 0.01


def _torch_runner(model: PreTrainedModel) -> Runner:
    def run(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # Files of several parts give no states of their encoder.
        outputs = run_torch(model, [batch])[0]
        return {name: value for name, value in outputs.items() if name != "encoder_last_hidden_state"}

    return run


class Timing:
    """Times files in turn, each in a process of its own; a model that generates on a text of `runner.TOKENS` tokens.

    `rounds` says how often each has its turn, 0 leaves timing out; `threads` are as many as PyTorch uses by default.
    """

    def __init__(self, rounds: int, threads: int | None) -> None:
        self.rounds, self.threads = rounds, torch.get_num_threads() if threads is None else threads
        check_counts(latency_rounds=(rounds, 0), threads=(self.threads, 1))

    @property
    def skip_reason(self) -> str | None:
        """Why nothing is timed; `None` if it is."""
        return "latency_rounds is 0" if self.rounds == 0 else None

    def time(
        self, folders: Mapping[str, Path], task: str, inputs: Mapping[str, np.ndarray[Any, Any]]
    ) -> dict[str, Timed]:
        """The latencies of the files in each folder on one example, each file timed in a process of its own."""
        from .runner import open_files
        from .runtime import onnx_call

        calls = {name: open_files(folder, task).calls(inputs) for name, folder in folders.items()}
        each = [(f"{name}, {call.part}", call) for name, parts in calls.items() for call in parts]
        engines = [TimedEngine(name, onnx_call, call.path, call.inputs) for name, call in each]
        times = iter(time_engines(engines, threads=self.threads, rounds=self.rounds))
        return {name: Timed({call.part: (next(times), call.times) for call in parts}) for name, parts in calls.items()}

    def facts(
        self, name: str, found: Mapping[str, Timed], inputs: Mapping[str, np.ndarray[Any, Any]], advice: str = ""
    ) -> dict[str, Any]:
        """The facts about the latency of the files `name`, which were timed beside the float32 files; `advice` is what to do
        where those are faster."""
        ours, theirs = found[name].whole, found[FLOAT].whole if FLOAT in found else None
        shapes = {key: list(array.shape) for key, array in inputs.items()}
        facts = {
            "device": "cpu",
            "threads": self.threads,
            "rounds": self.rounds,
            "inputs": shapes,
            "onnx": asdict(ours),
        }
        if len(found[name].parts) > 1:
            facts["parts"] = {
                part: {"times": times, "onnx": asdict(latency)}
                | ({FLOAT: asdict(found[FLOAT].parts[part][0])} if FLOAT in found and name != FLOAT else {})
                for part, (latency, times) in found[name].parts.items()
            }
        if theirs is None or name == FLOAT:
            return facts
        if ours.median_ms > (1 + NOISE) * theirs.median_ms:
            logger.warning(
                f"The {name} file takes {ours.median_ms:.3g} ms, that of float32 {theirs.median_ms:.3g} ms: on "
                f"this machine it is smaller, but not faster.{advice}"
            )
        ratio, bounds = speedup(theirs, ours), speedup_interval(theirs, ours)
        facts[FLOAT] = asdict(theirs)
        if ratio is None:
            return {**facts, "speedup_left_out": TOO_BUSY}
        return {**facts, "speedup": ratio} | ({} if bounds is None else {"speedup_interval": list(bounds)})


@dataclass(frozen=True)
class Timed:
    """The latency of a model: by part, that of a call and the number of calls."""

    parts: Mapping[str, tuple[Latency, int]]

    @property
    def whole(self) -> Latency:
        """All calls together: a sum of medians, and of minima."""
        return total_latency(self.parts.values())
