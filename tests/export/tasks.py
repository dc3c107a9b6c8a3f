# SPDX-License-Identifier: Apache-2.0
"""Which task every architecture family is exported for, and a tiny model of each."""

from __future__ import annotations

import torch
import transformers as tf

from ..families import FAMILIES

HEADS = {
    "audio-classification": "AutoModelForAudioClassification",
    "audio-frame-classification": "AutoModelForAudioFrameClassification",
    "audio-xvector": "AutoModelForAudioXVector",
    "automatic-speech-recognition": "AutoModelForCTC",
    "feature-extraction": "AutoModel",
    "fill-mask": "AutoModelForMaskedLM",
    "image-classification": "AutoModelForImageClassification",
    "image-segmentation": "AutoModelForImageSegmentation",
    "masked-im": "AutoModelForMaskedImageModeling",
    "multiple-choice": "AutoModelForMultipleChoice",
    "object-detection": "AutoModelForObjectDetection",
    "question-answering": "AutoModelForQuestionAnswering",
    "text-classification": "AutoModelForSequenceClassification",
    "text-generation": "AutoModelForCausalLM",
    "text2text-generation": "AutoModelForSeq2SeqLM",
    "token-classification": "AutoModelForTokenClassification",
}
_GENERATING = ("text-generation", "text2text-generation", "automatic-speech-recognition")
ALL_TASKS = (*HEADS, *(f"{task}-with-past" for task in _GENERATING), "feature-extraction-with-past")


def _table(supported: str, **refused: str) -> dict[str, str | None]:
    """`None` for what is exported, else what the error must say."""
    exported = supported.split()
    return {
        task: None if task in exported else refused.get(task.replace("-", "_"), "cannot export") for task in ALL_TASKS
    }


_ENCODER = "feature-extraction fill-mask multiple-choice question-answering text-classification token-classification"
_VISION = "feature-extraction image-classification"
_TEXT_TO_TEXT = "feature-extraction text2text-generation text2text-generation-with-past"
_DECODER = "feature-extraction text-generation text-generation-with-past text-classification"
_SPEECH = "feature-extraction automatic-speech-recognition audio-classification"
# What Optimum exports; `None` where it does.
TASKS: dict[str, dict[str, str | None]] = {
    "bert": _table(_ENCODER),
    "roberta": _table(_ENCODER),
    "distilbert": _table(_ENCODER),
    "electra": _table(_ENCODER),
    "mpnet": _table(_ENCODER),
    "deberta": _table(_ENCODER.replace("multiple-choice", "")),
    "deberta-v2": _table(_ENCODER),
    "gpt2": _table(f"{_DECODER} token-classification"),
    "llama": _table(_DECODER),
    "t5": _table(_TEXT_TO_TEXT),
    "bart": _table(f"{_TEXT_TO_TEXT} {_DECODER} question-answering"),
    "vit": _table(f"{_VISION} masked-im"),
    "deit": _table(f"{_VISION} masked-im"),
    "swin": _table(f"{_VISION} masked-im"),
    "convnext": _table(_VISION),
    "resnet": _table(_VISION),
    "wav2vec2": _table(f"{_SPEECH} audio-frame-classification audio-xvector"),
    "hubert": _table(_SPEECH),
    "whisper": _table(f"{_SPEECH} automatic-speech-recognition-with-past"),
    "detr": _table("feature-extraction object-detection image-segmentation"),
    "yolos": _table("feature-extraction object-detection"),
}
EXPORTED = [(family, task) for family, tasks in TASKS.items() for task, refused in tasks.items() if refused is None]
REFUSED = [(family, task, refused) for family, tasks in TASKS.items() for task, refused in tasks.items() if refused]
_ONE_LAYER: dict[str, dict] = {
    "distilbert": {"n_layers": 1},
    "gpt2": {"n_layer": 1, "pad_token_id": 0},
    "t5": {"num_layers": 1, "num_decoder_layers": 1},
    "bart": {"encoder_layers": 1, "decoder_layers": 1},
    "whisper": {"encoder_layers": 1, "decoder_layers": 1},
    "detr": {"encoder_layers": 1, "decoder_layers": 1},
    "swin": {"depths": [1, 1]},
    "convnext": {"depths": [1, 1]},
    "resnet": {"depths": [1, 1]},
}
_HEAD: dict[str, dict] = {
    "question-answering": {"num_labels": 2},
    "audio-xvector": {"tdnn_dim": (16, 16), "tdnn_kernel": (3, 3), "tdnn_dilation": (1, 1), "xvector_output_dim": 16},
}


def make(family: str, task: str) -> tf.PreTrainedModel:
    """A model of one layer with the head of the task, in eval mode."""
    torch.manual_seed(0)
    settings = {**FAMILIES[family].settings, **_ONE_LAYER.get(family, {"num_hidden_layers": 1}), **_HEAD.get(task, {})}
    if task == "image-segmentation":
        settings.update(_segmentation())
    config = getattr(tf, FAMILIES[family].config)(**settings)
    head = HEADS[task.removesuffix("-with-past")]
    if family == "whisper" and "recognition" in task:
        head = "AutoModelForSpeechSeq2Seq"
    if (family, task) == ("deit", "image-classification"):  # the head has two classes
        config.architectures = ["DeiTForImageClassification"]
    return getattr(tf, head).from_config(config).eval()


def _segmentation() -> dict:
    stages = [f"stage{i}" for i in (1, 2, 3, 4)]
    backbone = tf.ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[8, 8, 16, 32], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=stages,
    )  # fmt: skip
    return {"backbone_config": backbone, "encoder_attention_heads": 8, "decoder_attention_heads": 8}
