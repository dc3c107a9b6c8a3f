# SPDX-License-Identifier: Apache-2.0
"""Answers cut out of long texts: windows that overlap, and the best answer of all windows of a question."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import EvalPrediction

from .base import Array
from .text import AnswerF1

_KEPT = ("offset_mapping", "example", "context", "answers")
_BEST, _LONGEST = 20, 30  # candidates for either end, and tokens of an answer, as in Transformers' own examples


def answer_features(rows: Dataset, tokenizer: Any, max_length: int = 384, stride: int = 128) -> Dataset:
    """Windows of questions and contexts, for training and for [`metrics_for`].

    Args:
        rows (`datasets.Dataset`): with `question`, `context` and `answers` (`text` and `answer_start`, lists), as SQuAD has them.
        tokenizer (`PreTrainedTokenizerFast`): of the model.
        max_length (`int`, defaults to 384): tokens of a window.
        stride (`int`, defaults to 128): tokens that neighbouring windows share.

    Returns:
        `datasets.Dataset`: a row a window, with what the tokenizer gives, `start_positions` and `end_positions` of the first answer (0,
        the first token, where the window does not have it), and for the metrics `offset_mapping` (characters of the context;
        `[-1, -1]` for other tokens), `example` (number of the question), `context` and `answers` (texts).

    Raises:
        ValueError: a column is missing, the tokenizer is not a fast one, `stride` leaves no room for new tokens, or the context
            does not have an answer where `answer_start` says.
    """
    missing = [name for name in ("question", "context", "answers") if name not in rows.column_names]
    if missing:
        raise ValueError(
            f"Answers need the columns question, context and answers; there is no {missing[0]} among {rows.column_names}."
        )
    answers = rows.features["answers"]
    if not isinstance(answers, dict) or not {"text", "answer_start"} <= answers.keys():
        raise ValueError(f"The column answers needs lists text and answer_start, as SQuAD has them; it is {answers}.")
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            "Answers need a fast tokenizer, which tells the characters of a token. Load it with AutoTokenizer."
        )
    if not 0 <= stride < max_length:
        raise ValueError(f"stride must be less than max_length, {max_length}, got {stride}.")

    def encode(batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        try:
            encoded = tokenizer(
                batch["question"], batch["context"], truncation="only_second", max_length=max_length, stride=stride,
                return_overflowing_tokens=True, return_offsets_mapping=True,
            )  # fmt: skip
        except Exception as error:  # tokenizers raises nothing more special
            longest = max(batch["question"], key=len)
            raise ValueError(
                f"No window of {max_length} tokens with {stride} shared holds a question and some of its context ({error}); the longest "
                f"question of these rows begins with {longest[:60]!r}. Take a larger max_length, a smaller stride, or leave it out."
            ) from error
        owners = encoded.pop("overflow_to_sample_mapping")
        columns: dict[str, list[Any]] = {name: list(values) for name, values in encoded.items()}
        columns |= {name: [] for name in ("start_positions", "end_positions", "example", "context", "answers")}
        for window, owner in enumerate(owners):
            inside = np.array(encoded.sequence_ids(window)) == 1
            offsets = np.where(inside[:, None], np.array(columns["offset_mapping"][window]), -1)
            texts, starts = (list(batch["answers"][owner][key]) for key in ("text", "answer_start"))
            _refuse_elsewhere(numbers[owner], batch["context"][owner], texts, starts)
            first, last = _tokens_of(offsets, starts[0], starts[0] + len(texts[0])) if texts else (0, 0)
            row = {"start_positions": first, "end_positions": last, "example": numbers[owner],
                   "context": batch["context"][owner], "answers": texts}  # fmt: skip
            for name, value in row.items():
                columns[name].append(value)
            columns["offset_mapping"][window] = offsets.tolist()
        return columns

    return rows.map(encode, batched=True, with_indices=True, remove_columns=rows.column_names, desc="Windows")


def _refuse_elsewhere(row: int, context: str, texts: list[str], starts: list[int]) -> None:
    if len(texts) != len(starts):
        raise ValueError(
            f"Row {row} has {len(texts)} answers and {len(starts)} of answer_start; every answer needs one."
        )
    for text, start in zip(texts, starts, strict=True):
        if start < 0 or not context.startswith(text, start):
            found, first = context[max(start, 0) :][: len(text)], context.find(text)
            raise ValueError(
                f"Row {row} says that its answer {text[:60]!r} begins at character {start} of the context, where there is {found[:60]!r}. "
                + (
                    f"It is at {first}: correct answer_start"
                    if first >= 0
                    else "It is nowhere in the context: correct it"
                )
                + ", counted in characters from 0, or leave the row out."
            )


def _tokens_of(offsets: Array, start: int, end: int) -> tuple[int, int]:
    """The first and the last token of characters of the context; 0 and 0 if they are not all there."""
    inside = np.flatnonzero(offsets[:, 0] >= 0)
    if not len(inside) or offsets[inside[0], 0] > start or offsets[inside[-1], 1] < end:
        return 0, 0
    first = inside[offsets[inside, 0] <= start][-1]
    last = inside[offsets[inside, 1] >= end][0]
    return int(first), int(last)


def has_answers(dataset: Any) -> bool:
    """Whether a data set is one of [`answer_features`]."""
    return set(_KEPT) <= set(getattr(dataset, "column_names", None) or ())


def answer_metrics(features: Dataset) -> Callable[[EvalPrediction], dict[str, float]]:
    """Exact match and F1 of the texts that are answered, the best of all windows of a question.

    Args:
        features (`datasets.Dataset`): of [`answer_features`], in the order in which they are predicted.

    Returns:
        `Callable`: `compute_metrics` for a `Trainer`.
    """
    pairs = answer_pairs(features)
    return lambda prediction: AnswerF1.score(*pairs(prediction))


def answer_pairs(features: Dataset) -> Callable[[EvalPrediction], tuple[list[str], list[list[str]]]]:
    """What reads the answer to every question off predictions, and what is right, as [`answer_metrics`] scores them."""

    def pairs(prediction: EvalPrediction) -> tuple[list[str], list[list[str]]]:
        starts, ends = (np.asarray(logits) for logits in prediction.predictions[:2])
        best: dict[int, tuple[float, str]] = {}
        right: dict[int, list[str]] = {}
        for row, start, end in zip(features.select_columns(list(_KEPT)), starts, ends, strict=True):
            score, text = _best_answer(row, start, end)
            if score >= best.get(row["example"], (-np.inf, ""))[0]:
                best[row["example"]] = score, text
            right[row["example"]] = row["answers"] or [""]
        return [best[number][1] for number in right], list(right.values())

    return pairs


def _best_answer(row: Mapping[str, Any], starts: Array, ends: Array) -> tuple[float, str]:
    """The likeliest answer of a window and the sum of its logits."""
    offsets = np.array(row["offset_mapping"])
    inside = np.flatnonzero(offsets[:, 0] >= 0)
    if not len(inside):
        return -np.inf, ""
    first, last = (inside[np.argsort(-logits[inside], kind="stable")[:_BEST]] for logits in (starts, ends))
    scores = starts[first][:, None] + ends[last][None]
    lengths = last[None] - first[:, None]
    scores = np.where((lengths >= 0) & (lengths < _LONGEST), scores, -np.inf)
    a, b = np.unravel_index(scores.argmax(), scores.shape)
    return float(scores[a, b]), row["context"][offsets[first[a], 0] : offsets[last[b], 1]]


def span_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Exact match and F1 of the tokens from the likeliest start to the likeliest end, in [0, 1], where the texts are not
    known: of logits of starts and ends, `(examples, seq)`, and their positions."""
    first, last = (np.asarray(logits).argmax(-1) for logits in prediction.predictions[:2])
    start, end = (np.asarray(positions) for positions in prediction.label_ids)
    shared = np.maximum(np.minimum(last, end) - np.maximum(first, start) + 1, 0)
    sizes = np.maximum(last - first + 1, 0) + end - start + 1
    return {"f1": float((2 * shared / sizes).mean()), "exact_match": float(((first == start) & (last == end)).mean())}
