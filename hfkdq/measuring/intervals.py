# SPDX-License-Identifier: Apache-2.0
"""How sure a measured number is: intervals of metrics over the rows that were drawn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import EvalPrediction

from ..bars import progress_bar
from ..metrics.tasks import TaskMetrics

Array = np.ndarray[Any, Any]
CONFIDENCE = 0.95
RESAMPLES = 1000
# A metric that takes longer than this for all resamples is computed on fewer.
_SECONDS, _FEWER = 60.0, 100
_SHARES = ("accuracy", "exact_match", "retrieval")


@dataclass(frozen=True)
class Sampled:
    """What is known of the metrics of an engine beyond their values. The resamples of two engines that were measured on
    the same rows are of the same rows."""

    intervals: dict[str, list[float]]  # lower and upper bound of every metric, 95 %
    draws: dict[str, Array]  # every metric on each resample, `(resamples,)`


def wilson(share: float, count: int) -> list[float]:
    """Wilson's score interval (Probable inference, 1927) of a share in [0, 1] of `count` rows, 1 or more: lower and upper
    bound, 95 %. It is within [0, 1], and not empty where all rows are right."""
    z = statistics.NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    width = 1 + z * z / count
    middle = (share + z * z / (2 * count)) / width
    half = z / width * (share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5
    return [max(0.0, min(middle - half, share)), min(1.0, max(middle + half, share))]


def sample(
    task: TaskMetrics, prediction: EvalPrediction, metrics: Mapping[str, float], resamples: int, batched: bool = False
) -> Sampled:
    """Intervals of metrics: Wilson's where one is a share of the rows, else the middle 95 % of a bootstrap over rows.

    The rows of a resample are drawn with replacement; where every row is held against every other (metrics without
    labels), so that no row may be there twice, half of them are drawn without, which varies as much. All draws begin at the
    same seed.

    Args:
        task (`TaskMetrics`): computes the metrics.
        prediction (`EvalPrediction`): predictions and labels of all rows.
        metrics (`Mapping[str, float]`): the metrics on all rows.
        resamples (`int`): how often; 0 for shares alone. A hundred at most where all would take more than a minute.
        batched (`bool`): predictions and labels are lists of batches, which are drawn instead of rows.

    Returns:
        [`Sampled`]: the intervals; none for a metric that cannot be computed on resamples.
    """
    count, compute = _units(task, prediction, batched)
    intervals = {name: wilson(value, count) for name, value in metrics.items() if _is_share(name, value, count)}
    if resamples == 0 or count < 2:
        return Sampled(intervals, {})
    random, rows = np.random.default_rng(0), max(2, count // 2)
    found: list[Mapping[str, float]] = []
    start, number = time.perf_counter(), resamples
    with progress_bar(total=number, desc="Intervals", leave=False) as bar:
        while len(found) < number:
            drawn = random.integers(count, size=count) if task.needs_labels else random.permutation(count)[:rows]
            try:
                found.append(compute(drawn))
            except ValueError:  # such as of a resample without a label that counts
                found.append({})
            if len(found) == 1 and (time.perf_counter() - start) * resamples > _SECONDS:
                bar.total = number = min(resamples, _FEWER)
            bar.update()
    draws = {name: np.array([values.get(name, np.nan) for values in found], np.float64) for name in metrics}
    draws = {name: values for name, values in draws.items() if np.isfinite(values).mean() > CONFIDENCE}
    return Sampled({name: _middle(values) for name, values in draws.items()} | intervals, draws)


def change(first: Sampled, other: Sampled) -> dict[str, list[float]]:
    """The interval of how much each metric of `other` differs from that of `first`, on the same resamples of the same rows."""
    shared = [name for name in other.draws if name in first.draws]
    sizes = {name: min(len(first.draws[name]), len(other.draws[name])) for name in shared}
    return {name: _middle(other.draws[name][:size] - first.draws[name][:size]) for name, size in sizes.items()}


def _middle(values: Array) -> list[float]:
    outside = (1 - CONFIDENCE) / 2
    return [float(bound) for bound in np.nanquantile(values, [outside, 1 - outside])]


def _is_share(name: str, value: float, count: int) -> bool:
    """Whether a metric counts rows: by its name, and by a value that is a whole number of them."""
    return count > 0 and name.endswith(_SHARES) and abs(value * count - round(value * count)) < 1e-6


def _units(
    task: TaskMetrics, prediction: EvalPrediction, batched: bool
) -> tuple[int, Callable[[Array], Mapping[str, float]]]:
    """How many rows, texts, questions or batches there are, and what computes the metrics of some of them."""
    if task.pairs is not None and task.score is not None:
        score, (ours, theirs) = task.score, task.pairs(prediction)
        return len(ours), lambda drawn: score([ours[i] for i in drawn], [theirs[i] for i in drawn])
    if batched:
        batches = [list(values) for values in (prediction.predictions, prediction.label_ids)]

        def some(drawn: Array) -> Any:
            return ([values[i] for i in drawn] for values in batches)

        return len(batches[0]), lambda drawn: task(EvalPrediction(*some(drawn)))
    sizes = {np.shape(array)[:1] for array in [*leaves_of(prediction.predictions), *leaves_of(prediction.label_ids)]}
    if len(sizes) != 1 or () in sizes:  # such as labels that are a number for each object
        return 0, lambda drawn: {}
    return sizes.pop()[0], lambda drawn: task(rows_of(prediction, drawn))


def rows_of(prediction: EvalPrediction, rows: Array) -> EvalPrediction:
    """Some rows of predictions and labels, which may be nested."""
    return EvalPrediction(predictions=_take(prediction.predictions, rows), label_ids=_take(prediction.label_ids, rows))


def leaves_of(values: Any) -> list[Any]:
    """The arrays of predictions or labels, which may be nested."""
    if isinstance(values, Mapping):
        return [leaf for value in values.values() for leaf in leaves_of(value)]
    return [leaf for value in values for leaf in leaves_of(value)] if isinstance(values, (tuple, list)) else [values]


def _take(values: Any, rows: Array) -> Any:
    if isinstance(values, Mapping):
        return {name: _take(value, rows) for name, value in values.items()}
    if isinstance(values, (tuple, list)):
        return tuple(_take(value, rows) for value in values)
    return np.asarray(values)[rows]
