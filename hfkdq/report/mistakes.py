# SPDX-License-Identifier: Apache-2.0
"""The rows that a compressed model gets wrong and the model that it is compared with right, with what can be shown of them."""

from __future__ import annotations

import base64
import io
import wave
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Audio, Dataset
from transformers import EvalPrediction

from ..measuring.intervals import rows_of
from ..metrics.base import IGNORED
from ..metrics.tasks import LOWER_IS_BETTER, TaskMetrics
from .data import Mistake
from .environment import hide_secrets

COLORS = {"right": "#1a9850", "first": "#2f6fb5", "last": "#e0793a"}
"""Of boxes: those that are there, and those that the first and the last engine find."""
# What one row may take of a report.
_TEXT, _PIXELS, _SECONDS = 600, 240, 10
# A metric is computed for each row alone, which takes time.
_MOST_ROWS = 2000


class ScoredRows(NamedTuple):
    """Of an engine, the first metric of each row alone, what it says of the rows and what is right, as far as that can be told."""

    name: str
    scores: list[float]
    said: list[Any]
    right: list[Any]


def find_mistakes(
    engines: Sequence[ScoredRows], metric: str, model: Any, rows: Sequence[Any], processor: Any, limit: int
) -> tuple[Mistake, ...]:
    """The rows, at most `limit`, on which the last engine loses most to the first one, by the first metric of each row
    alone; none where the numbers of their rows differ. Of `rows`, what may be shown, the best first, the first that has
    as many rows is. The model names the classes, and the processor turns token ids into texts."""
    if not engines or not engines[0].scores or len({len(engine.scores) for engine in engines}) != 1:
        return ()
    first, last = (np.asarray(engines[place].scores, np.float64) for place in (0, -1))
    lost = (last - first) if metric in LOWER_IS_BETTER else (first - last)
    chosen = [int(row) for row in np.argsort(-lost, kind="stable")[:limit] if lost[row] > 0]
    fitting = [one for one in rows if len(one) == len(lost) or len(lost) == _MOST_ROWS < len(one)]
    plain = _readable(fitting[0]) if fitting else None
    classes = getattr(model.config, "id2label", None) or {}
    found = []
    for row in chosen:
        said = {engine.name: engine.said[row] for engine in engines if engine.said}
        label = engines[0].right[row] if engines[0].right else None
        shown = {} if plain is None else dict(plain[row])
        drawn = {} if label is None else {"": label, "first": said[engines[0].name], "last": said[engines[-1].name]}
        for name, value in shown.items():
            if _is_picture(value) and any(isinstance(boxes, Mapping) for boxes in drawn.values()):
                shown[name] = _with_boxes(value, list(drawn.values()))
        texts, media = _shown(shown, processor)
        found.append(Mistake(
            row=row, scores={engine.name: float(engine.scores[row]) for engine in engines},
            said=_safe({name: _told(value, classes) for name, value in said.items()}),
            label=None if label is None else _safe({"": _told(label, classes)})[""], texts=_safe(texts), media=media,
        ))  # fmt: skip
    return tuple(found)


def score_rows(name: str, task: TaskMetrics, prediction: EvalPrediction, model: Any) -> ScoredRows:
    """The rows of an engine one by one, whose classes the model names; none where its metrics are those of a function of
    the user's own, or of all rows together."""
    if task.pairs is not None and task.score is not None:
        said, right = (values[:_MOST_ROWS] for values in task.pairs(prediction))
        score = task.score
        alone = [_score(task, lambda: score([ours], [theirs])) for ours, theirs in zip(said, right, strict=True)]  # noqa: B023 - called at once
        return ScoredRows(name, alone, said, right)
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    labels = prediction.label_ids
    if not isinstance(logits, np.ndarray) or not isinstance(labels, np.ndarray) or len(logits) != len(labels):
        return ScoredRows(name, [], [], [])
    if logits.ndim == 2 and labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer):
        classes, tops = getattr(model.config, "id2label", None) or {}, logits.argmax(-1)
        told = [[str(classes.get(int(number), number)) for number in numbers] for numbers in (tops, labels)]
        hits = np.where(labels == IGNORED, 0.0, tops == labels)
        return ScoredRows(name, hits.astype(float).tolist(), *told)
    numbers = range(min(len(labels), _MOST_ROWS) if task.metric and task.needs_labels else 0)
    alone = [_score(task, lambda: task(rows_of(prediction, np.array([row])))) for row in numbers]  # noqa: B023 - called at once
    return ScoredRows(name, alone, [], [])


def _score(task: TaskMetrics, compute: Callable[[], Mapping[str, float]]) -> float:
    """The first metric of a row; nothing is lost on a row without a label that counts."""
    try:
        return compute()[task.metric]
    except ValueError:
        return 0.0


def _readable(rows: Any) -> Any:
    """The rows without their transform, sounds as the bytes of their files."""
    if not isinstance(rows, Dataset):
        return rows
    sounds = [name for name, feature in rows.features.items() if isinstance(feature, Audio)]
    rows = rows.with_format(None)
    for name in sounds:
        rows = rows.cast_column(name, Audio(decode=False))
    return rows


def first_image(rows: Sequence[Any]) -> Any:
    """The first image of the first of several data sets that holds one; `None` without any."""
    values = (value for one in rows if len(one) for value in _readable(one)[0].values())
    return next((value for value in values if _is_picture(value)), None)


def _told(value: Any, classes: Mapping[int, str]) -> str:
    if isinstance(value, Mapping):
        names = [str(classes.get(int(label), label)) for label in np.asarray(value["labels"])[_likely(value)]]
        return ", ".join(names) or "nothing"
    return value if isinstance(value, str) else " / ".join(map(str, value))


def _likely(boxes: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    """The places of the boxes that are as likely as not, or are those of a label."""
    return np.flatnonzero(np.asarray(boxes.get("scores", np.ones(len(boxes["labels"])))) >= 0.5)


def _is_picture(value: Any) -> bool:
    return hasattr(value, "convert") and hasattr(value, "thumbnail")


def _with_boxes(image: Any, boxes: Sequence[Any]) -> Any:
    """The picture with the boxes that are right, of the first engine and of the last, in the colours of `COLORS`."""
    from PIL import ImageDraw

    drawn = image.convert("RGB")
    scale = _PIXELS / max(drawn.size)
    drawn = drawn.resize((round(scale * drawn.width), round(scale * drawn.height)))
    pen = ImageDraw.Draw(drawn)
    for found, color in zip(boxes, COLORS.values(), strict=True):
        for corners in np.asarray(found["boxes"], np.float64).reshape(-1, 4)[_likely(found)]:
            left, top, right, bottom = (scale * corner for corner in corners)
            ends = [left, top, max(left, right), max(top, bottom)]
            pen.rectangle(ends, outline=color, width=max(2, drawn.width // 100))
    return drawn


def _shown(row: Mapping[str, Any], processor: Any) -> tuple[dict[str, str], dict[str, str]]:
    """The texts of a row, and its images and sounds."""
    texts, media = {}, {}
    for name, value in row.items():
        if name in ("label", "labels"):
            continue
        if isinstance(value, str):
            texts[name] = value
        elif isinstance(value, list) and value and all(isinstance(word, str) for word in value):
            texts[name] = " ".join(value)
        elif _is_picture(value):
            media[name] = _picture(value)
        elif isinstance(value, Mapping) and value.keys() == {"bytes", "path"}:
            sound = _sound_of_file(value["bytes"] or Path(value["path"]).read_bytes())
            media |= {} if sound is None else {name: sound}
        elif isinstance(value, Mapping) and "array" in value and "sampling_rate" in value:
            media[name] = _sound(np.asarray(value["array"]), int(value["sampling_rate"]))
    tokenizer = getattr(processor, "tokenizer", processor)
    if not texts and "input_ids" in row and hasattr(tokenizer, "decode"):
        texts["input_ids"] = tokenizer.decode(row["input_ids"], skip_special_tokens=True)
    if not media and "pixel_values" in row:
        media["pixel_values"] = _pixels(np.asarray(row["pixel_values"], np.float64))
    return texts, media


def _picture(image: Any) -> str:
    """A PNG file of an image, of at most `_PIXELS` a side."""
    small = image.convert("RGB")
    small.thumbnail((_PIXELS, _PIXELS))
    factor = _PIXELS // (2 * max(small.size))
    if factor > 1:  # a few pixels are seen by nobody
        small = small.resize((factor * small.width, factor * small.height), 0)
    file = io.BytesIO()
    small.save(file, format="PNG", optimize=True)
    return _address("image/png", file.getvalue())


def _pixels(values: np.ndarray[Any, Any]) -> str:
    """A picture of what a model reads, `(channels, height, width)` of any range."""
    from PIL import Image

    channels = values[:3] if len(values) >= 3 else values[:1].repeat(3, axis=0)
    low, high = channels.min(), channels.max()
    scaled = (255 * (channels - low) / max(high - low, 1e-9)).astype(np.uint8).transpose(1, 2, 0)
    return _picture(Image.fromarray(scaled))


def _sound_of_file(data: bytes) -> str | None:
    """The beginning of a WAV file as it is; `None` for what no WAV file is."""
    try:
        with wave.open(io.BytesIO(data)) as file:
            if file.getsampwidth() != 2:
                return None
            rate, channels = file.getframerate(), file.getnchannels()
            frames = np.frombuffer(file.readframes(_SECONDS * rate), "<i2")
    except (wave.Error, EOFError):
        return None
    return _sound(frames.reshape(-1, channels).mean(1) / 32768, rate)


def _sound(samples: np.ndarray[Any, Any], rate: int) -> str:
    """A WAV file of samples in [-1, 1], its first seconds."""
    file, mono = io.BytesIO(), samples if samples.ndim == 1 else samples.mean(0)
    with wave.open(file, "wb") as written:
        written.setnchannels(1)
        written.setsampwidth(2)
        written.setframerate(rate)
        written.writeframes((32767 * np.clip(mono[: _SECONDS * rate], -1, 1)).astype("<i2").tobytes())
    return _address("audio/wav", file.getvalue())


def _address(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _safe(texts: Mapping[str, str]) -> dict[str, str]:
    """Texts of at most `_TEXT` characters, without secrets and without halves of characters."""
    cut = {name: text if len(text) <= _TEXT else f"{text[:_TEXT]}…" for name, text in texts.items()}
    return {name: hide_secrets(text.encode(errors="replace").decode()) for name, text in cut.items()}
