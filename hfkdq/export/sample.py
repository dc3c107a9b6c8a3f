# SPDX-License-Identifier: Apache-2.0
"""The call that shows on a card how a file is used, and what it prints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from packaging.version import Version
from transformers.utils import logging

from ..modeling.tasks import task_of
from ..schema import brief
from .choices import OPENVINO
from .protocol import PAST

TEXT = "A text that the model has not seen."
_NAMES = "Ada Lovelace met Charles Babbage in London."
_MASKED = "A text without one {}."
_QUESTION = {"question": "Who lives here?", "context": "Anna lives here."}
OPTIMUM, EXPORTERS = "optimum", "exporters"
"""What runs a file: Optimum, or Transformers' own exporters."""
LOADERS = {
    "AutoTokenizer": "tokenizer", "AutoImageProcessor": "image_processor", "AutoFeatureExtractor": "feature_extractor",
    "AutoProcessor": "processor",
}  # fmt: skip
"""The argument of a pipeline that takes what an Auto class loads."""
CALLS = {
    **dict.fromkeys(
        ("text-classification", "text-generation", "text2text-generation", "feature-extraction"), json.dumps(TEXT)
    ),
    "token-classification": json.dumps(_NAMES),
    "fill-mask": f'f"{_MASKED.format("{tokenizer.mask_token}")}"',
    "question-answering": ", ".join(f"{name}={json.dumps(text)}" for name, text in _QUESTION.items()),
    **dict.fromkeys(("image-classification", "object-detection"), '"image.png"'),
    **dict.fromkeys(("audio-classification", "automatic-speech-recognition"), '"sound.wav"'),
}  # fmt: skip
"""What a pipeline of a task is called with, as a program has it: text, or a file of one's own."""

GREY = 'np.asarray(Image.open("image.png").convert("L"))[None]'
"""The image for a model of images with one channel, of which a pipeline makes three."""

logger = logging.get_logger(__name__)


def optimum_class(auto: str) -> str:
    """The class of Optimum that loads files of the models of an `AutoModelFor...`; empty where there is none."""
    auto = auto.replace("ForTextEncoding", "ForFeatureExtraction")
    return "" if auto in ("AutoModelForObjectDetection", "AutoModelForCTC") else auto.replace("AutoModel", "ORTModel")


def channels(facts: Mapping[str, Any]) -> int | None:
    """How many channels the images of files have, by the record of their export; `None` where it does not say."""
    found: int | None = facts.get("fixed_axes", {}).get("num_channels")
    return found


def is_grey(facts: Mapping[str, Any]) -> bool:
    """Whether files classify images with one channel."""
    return facts.get("task") == "image-classification" and channels(facts) == 1


def file_name(suffix: str) -> str:
    """The name of a file among those of several precisions."""
    return f"model{suffix}.onnx"


def run_sample(
    folder: Path, facts: Mapping[str, Any], model_class: str, loader: str, image: Any
) -> dict[str, str] | None:
    """Runs the call of [`CALLS`] on an exported folder that has the files of its tokenizer or processor, with `facts`,
    the record of its export, the class of the model and `loader`, the Auto class of [`LOADERS`] for its tokenizer or
    processor; `image` stands for the file of an image. Gives the `runner`, and what was `printed` of its answer; `None`
    for tasks whose call takes what is not there, or writes a text, and where it fails."""
    task = task_of(model_class)
    given = _inputs(str(facts.get("task", "")).removesuffix(PAST), image)
    runs = facts.get("target") != OPENVINO  # which neither runner does
    if not runs or task is None or task.auto is None or task.name != facts.get("task") or given is None:
        return None
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # pipelines tell on which device they are
    try:
        processor = getattr(transformers, loader).from_pretrained(folder)
        if Version(transformers.__version__).major >= 5:
            return _by_exporters(folder, processor) if loader == "AutoTokenizer" else None
        return _by_optimum(folder, facts, task.name, task.auto, {LOADERS[loader]: processor}, given)
    except Exception as error:  # of libraries that the report does not depend on
        logger.warning(f"The card shows no answer of its sample call, which failed: {brief(error)}.")
        return None
    finally:
        logging.set_verbosity(before)


def _inputs(task: str, image: Any) -> Any:
    """What the pipeline is called with; `None` where there is nothing."""
    texts = {
        "text-classification": TEXT, "token-classification": _NAMES, "fill-mask": _MASKED, "question-answering": _QUESTION,
    }  # fmt: skip
    return image if task == "image-classification" else texts.get(task)


def _by_optimum(
    folder: Path, facts: Mapping[str, Any], task: str, auto: str, processor: dict[str, Any], given: Any
) -> dict[str, str]:
    import optimum.onnxruntime

    suffix = facts.get("suffix", "")
    how = {"file_name": file_name(suffix)} if suffix else {}
    model = getattr(optimum.onnxruntime, optimum_class(auto)).from_pretrained(folder, **how)
    if is_grey(facts):
        scores = model(
            **processor["image_processor"](np.asarray(given.convert("L"))[None], return_tensors="pt")
        ).logits
        return {"runner": OPTIMUM, "printed": str(model.config.id2label[int(scores.argmax())])}
    make: Any = transformers.pipeline  # whose annotations are of models in PyTorch
    pipe = make(task, model=model, **processor)
    if given is _MASKED:
        given = _MASKED.format(processor["tokenizer"].mask_token)
    return {"runner": OPTIMUM, "printed": str(pipe(**given) if isinstance(given, dict) else pipe(given))}


def _by_exporters(folder: Path, tokenizer: Any) -> dict[str, str]:
    from transformers.exporters import ExportedModel

    model = ExportedModel.from_pretrained(folder)
    return {"runner": EXPORTERS, "printed": str(model(**tokenizer(TEXT, return_tensors="pt")))}
