# SPDX-License-Identifier: Apache-2.0
"""The usual metrics of every task, ready for a Trainer, an export and a report: `metrics_for(model, tokenizer)`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import EvalPrediction

from ..modeling.masks import output_mask, position_mask
from ..modeling.tasks import class_names, is_bare, is_listed
from .answers import answer_pairs, has_answers, span_metrics
from .base import IGNORED
from .classes import MeanIoU, MultiLabelF1, classification_metrics
from .detection import average_precision, detection_metrics, detection_pairs
from .text import AnswerF1, Bleu, EntityF1, WordErrorRate
from .values import Correlation, EmbeddingSimilarity

Outputs = Mapping[str, Tensor]
_NO_LABELS = "There is no label other than -100 to predict; use an eval_dataset that has labels."
LOWER_IS_BETTER = ("wer", "cer", "mse", "perplexity")
"""Of the usual metrics, those that fall as models get better."""


@dataclass(frozen=True, kw_only=True)
class TaskMetrics:
    """How models of a task are measured; called as `compute_metrics` of a `Trainer`.

    Args:
        compute (`Callable`): from an `EvalPrediction` to metrics by name.
        metric (`str`): the one by which a file is judged where none is named.
        scale (`float`): what the metric counts as all: 1, or 100 for BLEU.
        preprocess (`Callable`, *optional*): `preprocess_logits_for_metrics` of the `Trainer`.
        prepare (`Callable`, *optional*): from model, inputs and outputs by name to the outputs that are kept; what padding does
            not change, where the `Trainer`'s own hook sees no inputs.
        generates (`bool`): whether the predictions are generated tokens, as with `predict_with_generate`.
        concat_batches (`bool`): `eval_do_concat_batches` of `TrainingArguments`.
        needs_labels (`bool`): without labels, predictions are held against those of the first model that is measured.
        pairs (`Callable`, *optional*): from an `EvalPrediction` to what is said and what is right, two lists as long as there are
            texts or questions, where rows are not what is scored.
        score (`Callable`, *optional*): from the two lists to what `compute` gives.

    Example:
        ```python
        metrics = metrics_for(model, tokenizer)
        trainer = Trainer(model, args, compute_metrics=metrics, preprocess_logits_for_metrics=metrics.preprocess, ...)
        ```
    """

    compute: Callable[[EvalPrediction], dict[str, float]]
    metric: str
    scale: float = 1.0
    preprocess: Callable[[Any, Any], Any] | None = None
    prepare: Callable[[Any, Mapping[str, Any], Outputs], Outputs] | None = None
    generates: bool = False
    concat_batches: bool = True
    needs_labels: bool = True
    pairs: Callable[[EvalPrediction], tuple[list[Any], list[Any]]] | None = None
    score: Callable[[list[Any], list[Any]], dict[str, float]] | None = None

    def __call__(self, eval_prediction: EvalPrediction) -> dict[str, float]:
        """The metrics, the one that counts first."""
        found = self.compute(eval_prediction)
        return {self.metric: found[self.metric], **found} if self.metric in found else found


def metrics_for(model: Any, processing_class: Any = None, dataset: Any = None) -> TaskMetrics:
    """The usual metrics of a model's task, all computed without a network.

    | task | metrics, the one that counts first |
    |---|---|
    | classification of texts, pairs, images, sounds; multiple choice | `accuracy`, macro `f1` |
    | several labels an example | micro `f1`, `macro_f1`, `accuracy` of all labels together |
    | regression | `spearman`, `pearson`, `mse` |
    | tokens | `f1`, `precision`, `recall` of entities if labels begin with B- or I-, else `accuracy`, macro `f1` |
    | answers | `f1`, `exact_match`: of texts if the data set has what [`answer_features`] keeps, else of the tokens of the span |
    | masked and causal language models | `accuracy` of the next or the masked token, `perplexity` |
    | encoder-decoders of texts | `bleu`, `chrf` of generated texts |
    | speech to text, by CTC or generated | `wer`, `cer` (lower is better) |
    | segmentation with a class for each pixel | `mean_iou`, `accuracy` |
    | detection | `map`, `map_50`, `map_75` and `map_<class>` |
    | embeddings | `spearman`, `retrieval`, `cosine` to the first model that is measured; no labels needed |
    | images and texts | `accuracy` of finding the text of an image among those of its batch; no labels needed |

    Args:
        model (`PreTrainedModel`): its class and configuration tell the task.
        processing_class (tokenizer or processor, *optional*): decodes texts and boxes.
        dataset (`datasets.Dataset`, *optional*): the examples, whose labels tell regression and several labels apart.

    Returns:
        [`TaskMetrics`]: to be passed as `compute_metrics=`.

    Raises:
        ValueError: the task has no usual metric here, or it decodes and there is no `processing_class`.
    """
    names = class_names(model)
    for table, make in _BY_TABLE.items():
        if any(is_listed(name, table) for name in names):
            return make(model, processing_class, dataset)
    if is_bare(model):
        return TaskMetrics(compute=_similarity, metric="spearman", prepare=_embedding, needs_labels=False)
    raise ValueError(
        f"{type(model).__name__} has no usual metric. Pass compute_metrics=, as for a Trainer: a function of an EvalPrediction that "
        "returns numbers by name."
    )


def _classifier(model: Any, processor: Any, dataset: Any) -> TaskMetrics:
    problem, label = getattr(model.config, "problem_type", None), _first_label(dataset)
    if problem == "multi_label_classification" or (problem is None and np.ndim(label) == 1):
        return TaskMetrics(compute=_several_labels, metric="f1")
    if problem == "regression" or (problem is None and (model.config.num_labels == 1 or isinstance(label, float))):
        return TaskMetrics(compute=_regression, metric="spearman")
    return TaskMetrics(compute=classification_metrics, metric="accuracy")


def _tokens(model: Any, processor: Any, dataset: Any) -> TaskMetrics:
    names = {int(number): str(name) for number, name in model.config.id2label.items()}
    if not any(name[:2] in ("B-", "I-") for name in names.values()):
        return TaskMetrics(compute=classification_metrics, metric="accuracy")

    def tags(prediction: EvalPrediction) -> tuple[list[Any], list[Any]]:
        found, labels = _first(prediction.predictions).argmax(-1), np.asarray(prediction.label_ids)
        if not (labels != IGNORED).any():
            raise ValueError(_NO_LABELS)
        pairs = [(ours[true != IGNORED], true[true != IGNORED]) for ours, true in zip(found, labels, strict=True)]
        ours, theirs = ([[names[int(label)] for label in row] for row in rows] for rows in zip(*pairs, strict=True))
        return ours, theirs

    return _of_pairs(tags, EntityF1.score, metric="f1")


def _of_pairs(
    pairs: Callable[[EvalPrediction], tuple[list[Any], list[Any]]],
    score: Callable[[Any, Any], dict[str, float]],
    **settings: Any,
) -> TaskMetrics:
    """Metrics of what is read off predictions and labels."""
    return TaskMetrics(compute=lambda prediction: score(*pairs(prediction)), pairs=pairs, score=score, **settings)


def _answers(model: Any, processor: Any, dataset: Any) -> TaskMetrics:
    if has_answers(dataset):
        return _of_pairs(answer_pairs(dataset), AnswerF1.score, metric="f1")
    return TaskMetrics(compute=span_metrics, metric="f1")


def _language(shift: int) -> Callable[..., TaskMetrics]:
    """Of logits at a place and the label `shift` places on."""

    def preprocess(logits: Any, labels: Tensor) -> Tensor:
        logits = _first(logits)
        logits, labels = logits[:, : logits.shape[1] - shift], labels[:, shift:]
        loss = F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
        return torch.stack([loss, logits.argmax(-1).eq(labels).to(loss.dtype)], dim=-1)

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        valid = np.asarray(prediction.label_ids)[:, shift:] != IGNORED
        if not valid.any():
            raise ValueError(_NO_LABELS)
        loss, hits = np.moveaxis(np.asarray(prediction.predictions)[valid].astype(np.float64), -1, 0)
        return {"accuracy": float(hits.mean()), "perplexity": float(np.exp(loss.mean()))}

    return lambda model, processor, dataset: TaskMetrics(compute=compute, metric="accuracy", preprocess=preprocess)


def _generated(score: Callable[[Any, Any], dict[str, float]], **settings: Any) -> Callable[..., TaskMetrics]:
    """Of texts that are generated, held against those of the labels."""

    def make(model: Any, processor: Any, dataset: Any) -> TaskMetrics:
        decode = _decoder(model, processor)
        pairs = lambda prediction: (decode(prediction.predictions), decode(prediction.label_ids))  # noqa: E731
        return _of_pairs(pairs, score, generates=True, **settings)

    return make


def _ctc(model: Any, processor: Any, dataset: Any) -> TaskMetrics:
    decode, blank = _decoder(model, processor), int(model.config.pad_token_id)

    def mask(model: Any, inputs: Mapping[str, Any], outputs: Outputs) -> Outputs:
        """Frames of padding say the blank, whatever is computed there."""
        logits = outputs["logits"]
        valid = output_mask(model, inputs, logits.shape[:2])
        if valid is None:
            return {"logits": logits}
        silence = torch.full_like(logits, -1e4)
        silence[..., blank] = 0.0
        return {"logits": torch.where(valid.unsqueeze(-1).to(logits.device), logits, silence)}

    def pairs(prediction: EvalPrediction) -> tuple[list[Any], list[Any]]:
        frames = _first(prediction.predictions)
        frames = np.where(frames == IGNORED, blank, frames)
        # Tokenizers that are told to skip special tokens drop the blank between two letters first, and take them for one.
        said = np.where((frames != blank) & (np.diff(frames, prepend=-1) != 0), frames, IGNORED)
        ours, theirs = (decode(ids, group_tokens=False) for ids in (said, prediction.label_ids))
        return ours, theirs

    return _of_pairs(
        pairs, WordErrorRate.score, metric="wer", prepare=mask,
        preprocess=lambda logits, labels: _first(logits).argmax(-1),
    )  # fmt: skip


def _pixels(model: Any, processor: Any, dataset: Any) -> TaskMetrics:
    unlabelled = (IGNORED, getattr(model.config, "semantic_loss_ignore_index", 255))

    def preprocess(logits: Any, labels: Tensor) -> Tensor:
        return F.interpolate(_first(logits).float(), labels.shape[-2:], mode="bilinear", align_corners=False).argmax(1)

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        labels = np.asarray(prediction.label_ids)
        valid = ~np.isin(labels, unlabelled)
        return MeanIoU.score(np.asarray(prediction.predictions)[valid], labels[valid])

    return TaskMetrics(compute=compute, metric="mean_iou", preprocess=preprocess)


def _pairs(model: Any, processor: Any, dataset: Any) -> TaskMetrics:
    def hits(model: Any, inputs: Mapping[str, Any], outputs: Outputs) -> Outputs:
        logits = outputs["logits_per_image"]
        return {"hits": logits.argmax(-1).eq(torch.arange(len(logits), device=logits.device)).float()}

    return TaskMetrics(
        compute=lambda prediction: {"accuracy": float(np.mean(_first(prediction.predictions)))},
        metric="accuracy", prepare=hits, needs_labels=False,
    )  # fmt: skip


def _several_labels(prediction: EvalPrediction) -> dict[str, float]:
    return MultiLabelF1.score(_first(prediction.predictions) > 0, np.asarray(prediction.label_ids) > 0)


def _regression(prediction: EvalPrediction) -> dict[str, float]:
    return Correlation.score(_first(prediction.predictions).reshape(-1), np.asarray(prediction.label_ids).reshape(-1))


def _similarity(prediction: EvalPrediction) -> dict[str, float]:
    return EmbeddingSimilarity.score(_first(prediction.predictions), np.asarray(prediction.label_ids))


def _embedding(model: Any, inputs: Mapping[str, Any], outputs: Outputs) -> Outputs:
    """One vector an example: the model's own, else the mean of the states that are no padding."""
    for name in ("sentence_embedding", "text_embeds", "image_embeds", "audio_embeds"):
        if name in outputs:
            return {"embedding": outputs[name]}
    states = outputs["last_hidden_state"].flatten(2).float()
    mask = output_mask(model, inputs, states.shape[:2])
    if mask is None and states.dim() == 3:
        mask = position_mask(inputs, None)
    if mask is None or mask.shape != states.shape[:2]:
        # Channels of a convolutional network come before height and width.
        channels = (getattr(model.config, "hidden_sizes", None) or [0])[-1]
        return {"embedding": states.mean(-1 if "pixel_values" in inputs and states.shape[1] == channels else 1)}
    weights = mask.to(states).unsqueeze(-1)
    return {"embedding": (states * weights).sum(1) / weights.sum(1).clamp(min=1)}


def _decoder(model: Any, processor: Any) -> Callable[..., list[str]]:
    """From token ids, padded with -100, to texts."""
    tokenizer = getattr(processor, "tokenizer", processor)
    if not hasattr(tokenizer, "batch_decode"):
        raise ValueError(
            f"The metrics of {type(model).__name__} compare texts, and nothing decodes its tokens. Pass its tokenizer or processor "
            "as processing_class=."
        )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def decode(ids: Any, **settings: Any) -> list[str]:
        ids = _first(ids)
        texts = tokenizer.batch_decode(np.where(ids == IGNORED, pad, ids), skip_special_tokens=True, **settings)
        return [text.strip() for text in texts]

    return decode


def _first(values: Any) -> Any:
    """The first of several outputs, or the only one."""
    return values[0] if isinstance(values, (tuple, list)) else values


def _first_label(dataset: Any) -> Any:
    """The label of the first example; `None` where there is none."""
    try:
        row = dataset[0]
    except (TypeError, KeyError, IndexError):
        return None
    found = [row[name] for name in ("labels", "label") if isinstance(row, Mapping) and row.get(name) is not None]
    return found[0].tolist() if found and hasattr(found[0], "tolist") else found[0] if found else None


def _boxes(model: Any, processor: Any, dataset: Any) -> TaskMetrics:
    names = {int(number): str(name) for number, name in model.config.id2label.items()}
    processor = getattr(processor, "image_processor", processor)
    detection_metrics(processor)  # refuses what is no processor of a detector, and a missing library
    score = partial(average_precision, names=names)
    return _of_pairs(detection_pairs(processor), score, metric="map", concat_batches=False)


# In the order of `modeling.tasks.TASKS`: a class that two tables list is for the first of them.
_BY_TABLE: Mapping[str, Callable[[Any, Any, Any], TaskMetrics]] = {
    "SEQ_TO_SEQ_CAUSAL_LM": _generated(Bleu.score, metric="bleu", scale=100.0),
    "SPEECH_SEQ_2_SEQ": _generated(WordErrorRate.score, metric="wer"), "MASKED_LM": _language(0),
    "SEQUENCE_CLASSIFICATION": _classifier, "TOKEN_CLASSIFICATION": _tokens, "QUESTION_ANSWERING": _answers,
    "MULTIPLE_CHOICE": _classifier, "IMAGE_CLASSIFICATION": _classifier, "OBJECT_DETECTION": _boxes,
    "AUDIO_CLASSIFICATION": _classifier, "CTC": _ctc, "CAUSAL_LM": _language(1), "SEMANTIC_SEGMENTATION": _pixels,
    "ZERO_SHOT_IMAGE_CLASSIFICATION": _pairs,
}  # fmt: skip
