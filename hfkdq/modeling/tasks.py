# SPDX-License-Identifier: Apache-2.0
"""Tasks: which classes of Transformers are for each, under the names of the Hub and of Optimum.

A new task is one line in `TASKS`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from transformers.models.auto import modeling_auto


@dataclass(frozen=True)
class Task:
    """A task, and the classes that do it.

    Args:
        name (`str`): the pipeline tag of the Hub, which Optimum uses too.
        table (`str`): Transformers lists the classes in `MODEL_FOR_{table}_MAPPING_NAMES`.
        auto (`str`, *optional*): `AutoModelFor...` that loads the classes, where a pipeline needs no more than a checkpoint
            and its processor.
        outputs (tuple of `str`): what an exported file returns.
        generates (`bool`): whether a decoder writes the answer token by token.
    """

    name: str
    table: str
    auto: str | None = None
    outputs: tuple[str, ...] = ("logits",)
    generates: bool = False

    def does(self, model_class: str) -> bool:
        """Whether a class of this name is for the task."""
        return is_listed(model_class, self.table)


# A class that two tables list is for the first of them.
TASKS = (
    Task("text2text-generation", "SEQ_TO_SEQ_CAUSAL_LM", "AutoModelForSeq2SeqLM", generates=True),
    Task("automatic-speech-recognition", "SPEECH_SEQ_2_SEQ", "AutoModelForSpeechSeq2Seq", generates=True),
    Task("fill-mask", "MASKED_LM", "AutoModelForMaskedLM"),
    Task("text-classification", "SEQUENCE_CLASSIFICATION", "AutoModelForSequenceClassification"),
    Task("token-classification", "TOKEN_CLASSIFICATION", "AutoModelForTokenClassification"),
    Task("question-answering", "QUESTION_ANSWERING", "AutoModelForQuestionAnswering", ("start_logits", "end_logits")),
    Task("multiple-choice", "MULTIPLE_CHOICE"),
    Task("image-classification", "IMAGE_CLASSIFICATION", "AutoModelForImageClassification"),
    Task("object-detection", "OBJECT_DETECTION", "AutoModelForObjectDetection", outputs=("logits", "pred_boxes")),
    Task("audio-classification", "AUDIO_CLASSIFICATION", "AutoModelForAudioClassification"),
    Task("automatic-speech-recognition", "CTC", "AutoModelForCTC"),
    Task("text-generation", "CAUSAL_LM", "AutoModelForCausalLM", generates=True),
    Task("audio-frame-classification", "AUDIO_FRAME_CLASSIFICATION"),
    Task("audio-xvector", "AUDIO_XVECTOR", outputs=("logits", "embeddings")),
    Task("image-segmentation", "IMAGE_SEGMENTATION", outputs=("logits", "pred_masks")),
    Task("masked-im", "MASKED_IMAGE_MODELING", outputs=("reconstruction",)),
    Task(
        "feature-extraction",
        "TEXT_ENCODING",
        "AutoModelForTextEncoding",
        outputs=("last_hidden_state", "pooler_output", "sentence_embedding"),
    ),
)
_WRITING = (
    "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "VISION_2_SEQ", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM"
)  # fmt: skip
DETECTING = ("ElectraForPreTraining", "FunnelForPreTraining", "TapasForQuestionAnswering")
"""Classes whose logits, `(batch, seq)`, are yes or no for each token."""
CLASSIFICATION = ("SEQUENCE_CLASSIFICATION", "IMAGE_CLASSIFICATION", "AUDIO_CLASSIFICATION")
"""Tables of classes that give one class for a whole example."""


def is_listed(model_class: str, *tables: str) -> bool:
    """Whether Transformers lists a class in one of its tables, such as `"CAUSAL_LM"`."""
    return any(model_class in _classes(f"MODEL_FOR_{table}_MAPPING_NAMES") for table in tables)


def written(names: Iterable[str], config: Any) -> Literal["next tokens", "the tokens of a decoder"] | None:
    """What a model with classes of these names predicts if it writes a text: of its labels the next, or each; else `None`."""
    if not any(is_listed(name, *_WRITING) for name in names):
        return None
    return "the tokens of a decoder" if getattr(config, "is_encoder_decoder", False) else "next tokens"


def class_names(model: Any) -> list[str]:
    """The name of a model's class and of the classes that it inherits from, its own first."""
    return [cls.__name__ for cls in type(model).__mro__]


def decodes(model: Any) -> bool:
    """Whether a model writes a text with a decoder, after what an encoder reads."""
    return written(class_names(model), getattr(model, "config", None)) == "the tokens of a decoder"


def tasks_of(model: Any) -> list[Task]:
    """The tasks that a model's class, or one that it inherits from, is listed for."""
    names = class_names(model)
    return [task for task in TASKS if any(task.does(name) for name in names)]


def is_bare(model: Any) -> bool:
    """Whether the class is a model without a head, which returns hidden states."""
    return not _classes("MODEL_MAPPING_NAMES").isdisjoint(class_names(model))


def task_of(model_class: str) -> Task | None:
    """The task of a class that is given by its name; `None` if Transformers lists it for none."""
    return next((task for task in TASKS if task.does(model_class)), None)


@cache
def _classes(table: str) -> frozenset[str]:
    values = getattr(modeling_auto, table, {}).values()  # each line of Transformers has some that the other has not
    return frozenset(name for value in values for name in ([value] if isinstance(value, str) else value))
