# SPDX-License-Identifier: Apache-2.0
"""Model inputs from columns of texts, images or audio, made by the processor of the checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from datasets import Audio, Dataset, Image, Value
from torch import nn
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, PreTrainedModel, default_data_collator

from ..export.verify import COMPARE_BATCH_SIZE
from ..metrics import classification_metrics
from ..modeling.forwards import forward_columns
from ..modeling.tasks import CLASSIFICATION, class_names, is_listed
from .audio import decodable, samples_of
from .data import load_rows
from .labels import LABELS, label_reader

Encode = Callable[[dict[str, list[Any]]], dict[str, Any]]
_AUDIO_INPUTS = ("input_values", "input_features")


class Reader:
    """Makes batches for a model of the data that the command line names.

    Args:
        model (`PreTrainedModel`): tells which inputs it takes.
        processor (tokenizer, processor, *optional*): that of its checkpoint.
        text_columns (`list[str]`, *optional*): one or two columns of texts.
        max_length (`int`, *optional*): tokens beyond this are cut off.
    """

    def __init__(
        self, model: PreTrainedModel, processor: Any, text_columns: list[str] | None, max_length: int | None
    ) -> None:
        self.model, self.processor = model, processor
        self.text_columns, self.max_length = text_columns, max_length

    def batches(self, where: str, preferred: tuple[str, ...], samples: int) -> Iterable[Any]:
        """Batches without labels.

        Raises:
            ValueError: the rows have nothing that the model could read.
        """
        rows, description = load_rows(where, preferred, samples)
        rows, encode, collate, columns = self._encoder(rows)
        _say(f"Calibrating on {description}: {columns}")
        return DataLoader(rows.with_transform(encode), batch_size=COMPARE_BATCH_SIZE, collate_fn=collate)

    def evaluation(self, where: str, preferred: tuple[str, ...], samples: int | None) -> dict[str, Any]:
        """Labelled rows, their collator and the metrics, as arguments of `export_onnx`.

        Raises:
            ValueError: the model is no classifier, or the rows have no inputs or no labels for it.
        """
        _check_classifier(self.model)
        rows, description = load_rows(where, preferred, samples)
        read_labels = label_reader(rows, self.model.config, description)
        rows, encode, collate, columns = self._encoder(rows)
        _say(f"Evaluating on {description}: {columns}")

        def encode_labelled(batch: dict[str, list[Any]]) -> dict[str, Any]:
            return {**encode(batch), "labels": read_labels(batch)}

        return {
            "eval_dataset": rows.with_transform(encode_labelled),
            "compute_metrics": classification_metrics,
            "data_collator": collate,
        }

    def _encoder(self, rows: Dataset) -> tuple[Dataset, Encode, Callable[[list[Any]], Any], str]:
        """The rows as they are to be read, what makes inputs of them and batches of those, and the columns used."""
        main, accepted = self.model.main_input_name, forward_columns(self.model)
        if main in rows.column_names:
            kept = [name for name in rows.column_names if name in accepted and name not in LABELS]
            pads = main != "pixel_values" and hasattr(self.processor, "pad")
            collate = DataCollatorWithPadding(self.processor) if pads else default_data_collator
            return rows, lambda batch: {name: batch[name] for name in kept}, collate, ", ".join(kept)
        if self.processor is None:
            raise ValueError(
                f"The checkpoint has no tokenizer or processor that makes {main} of the columns {_names(rows)}. Save it "
                "beside the model with save_pretrained."
            )
        if main == "input_ids" and not self.model.config.is_encoder_decoder:
            return self._texts(rows, accepted)
        if main == "pixel_values":
            return self._images(rows, accepted)
        if main in _AUDIO_INPUTS and not self.model.config.is_encoder_decoder:
            return self._audio(rows, accepted)
        raise ValueError(
            f"The command cannot make the inputs of {type(self.model).__name__} ({main}) of the columns {_names(rows)}: it "
            "knows texts, images and audio for models without a decoder of their own. Call export_onnx in Python, "
            "whose calibration takes batches of any kind."
        )

    def _texts(self, rows: Dataset, accepted: set[str]) -> tuple[Dataset, Encode, Callable[[list[Any]], Any], str]:
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        columns = self._text_columns(rows)
        longest = self.max_length or _longest(tokenizer, self.model)

        def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
            texts = (batch[name] for name in columns)
            encoded = tokenizer(*texts, truncation=longest is not None, max_length=longest)
            return {name: values for name, values in encoded.items() if name in accepted}

        return rows, encode, DataCollatorWithPadding(tokenizer), " and ".join(columns)

    def _text_columns(self, rows: Dataset) -> list[str]:
        strings = [name for name, feature in rows.features.items() if _is_string(feature)]
        if self.text_columns is not None:
            wrong = [name for name in self.text_columns if name not in strings]
            if wrong:
                raise ValueError(f"--text-columns {wrong[0]}: no column of strings; the columns are {_names(rows)}.")
            return self.text_columns
        found = [name for name in strings if name not in LABELS]
        if len(found) not in (1, 2):
            raise ValueError(
                f"{type(self.model).__name__} reads one or two columns of strings; there are {len(found)} of them in "
                f"{_names(rows)}. Name those to use with --text-columns."
            )
        return found

    def _images(self, rows: Dataset, accepted: set[str]) -> tuple[Dataset, Encode, Callable[[list[Any]], Any], str]:
        processor = getattr(self.processor, "image_processor", self.processor)
        column = self._only(rows, Image, "images")
        mode = "L" if getattr(self.model.config, "num_channels", 3) == 1 else "RGB"

        def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
            arrays = [np.atleast_3d(np.asarray(image.convert(mode))) for image in batch[column]]
            encoded = processor(arrays, input_data_format="channels_last")
            return {name: list(values) for name, values in encoded.items() if name in accepted}

        return rows, encode, default_data_collator, column

    def _audio(self, rows: Dataset, accepted: set[str]) -> tuple[Dataset, Encode, Callable[[list[Any]], Any], str]:
        extractor = getattr(self.processor, "feature_extractor", self.processor)
        column, rate = self._only(rows, Audio, "audio"), extractor.sampling_rate

        def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
            encoded = extractor([samples_of(sound, rate) for sound in batch[column]], sampling_rate=rate)
            return {name: list(values) for name, values in encoded.items() if name in accepted}

        return decodable(rows, column, rate), encode, DataCollatorWithPadding(extractor), column

    def _only(self, rows: Dataset, kind: type, what: str) -> str:
        """The one column of a kind."""
        found: list[str] = [name for name, feature in rows.features.items() if isinstance(feature, kind)]
        if len(found) != 1:
            raise ValueError(
                f"{type(self.model).__name__} reads one column of {what} (datasets.{kind.__name__}); there are "
                f"{len(found)} of them in {_names(rows)}."
            )
        return found[0]


def _check_classifier(model: PreTrainedModel) -> None:
    """Refuses what accuracy says nothing of."""
    config = model.config
    problem = getattr(config, "problem_type", None)
    is_classifier = any(is_listed(name, *CLASSIFICATION) for name in class_names(model))
    if not is_classifier or problem in ("regression", "multi_label_classification") or config.num_labels < 2:
        raise ValueError(
            f"--eval-data: the command can evaluate text-classification, image-classification and audio-classification "
            f"with one label an example; {type(model).__name__} is none of these"
            f"{f' ({problem})' if problem else ''}. export_onnx in Python measures any model, with the compute_metrics= "
            "and the eval_dataset= of your Trainer."
        )


def _is_string(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def _names(rows: Dataset) -> str:
    """The columns with their types."""
    kinds = {
        name: feature.dtype if isinstance(feature, Value) else type(feature).__name__
        for name, feature in rows.features.items()
    }
    return ", ".join(f"{name} ({kind})" for name, kind in kinds.items())


def _longest(tokenizer: Any, model: PreTrainedModel) -> int | None:
    """How many tokens the model takes; `None` if nothing says so."""
    limits = [tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None)]
    # Positions of RoBERTa's kind begin after that of padding.
    limits += [
        table.num_embeddings - table.padding_idx - 1
        for name, table in model.named_modules()
        if isinstance(table, nn.Embedding) and table.padding_idx is not None and "position" in name.rpartition(".")[2]
    ]
    known = [limit for limit in limits if limit is not None and 0 < limit < 10**6]
    return min(known, default=None)


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
