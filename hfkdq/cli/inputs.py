# SPDX-License-Identifier: Apache-2.0
"""Model inputs from columns of texts, images or audio, made by the processor of the checkpoint."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from datasets import Audio, Dataset, Image
from torch import nn
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, PreTrainedModel, default_data_collator
from transformers.utils.generic import find_labels

from ..export.verify import COMPARE_BATCH_SIZE
from ..measuring.evaluation import with_decoder_inputs
from ..modeling.forwards import forward_columns
from .audio import decodable, samples_of
from .columns import is_string, names_of, only, refuse_gaps, refuse_twins, strings_of
from .data import load_rows
from .labelled import labelled, reads_whole_rows
from .media import to_mode
from .names import LABELS

Encode = Callable[[dict[str, list[Any]]], dict[str, Any]]
_POSITIONS = re.compile(r"(^|\.)(embed_positions|position_embeddings?|wpe)$")
_AUDIO_INPUTS = ("input_values", "input_features")


class Reader:
    """Makes batches for a model, with the tokenizer or processor of its checkpoint, of the data that the command line
    names: of one or two `text_columns`, and cut off after `max_length` tokens, where these are given."""

    def __init__(
        self, model: PreTrainedModel, processor: Any, text_columns: list[str] | None, max_length: int | None
    ) -> None:
        self.model, self.processor = model, processor
        self.text_columns = text_columns
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.longest = _longest(self.tokenizer, model, max_length)
        self.cut = {"truncation": self.longest is not None, "max_length": self.longest}  # for a tokenizer
        self.rows: Dataset | None = None  # what `evaluation` read

    def taken(self, encoded: Mapping[str, Any]) -> dict[str, Any]:
        """Those of a processor's values that the model takes."""
        accepted = forward_columns(self.model)
        return {name: values for name, values in encoded.items() if name in accepted}

    def batches(self, where: str, preferred: tuple[str, ...], samples: int, tell: bool = True) -> Iterable[Any]:
        """Batches without labels; `tell` says on the terminal of what. Raises `ValueError`: the rows have nothing that
        the model could read."""
        rows, description = load_rows(where, preferred, samples)
        collate: Callable[[list[Any]], Any]
        if reads_whole_rows(self.model):
            dataset, whole, columns = labelled(self, rows, description)
            targets, kept = find_labels(type(self.model)), [*self.taken(dict.fromkeys(dataset.column_names))]
            dataset = dataset.select_columns(kept) if kept else dataset  # none where a collator makes them

            def collate(examples: list[Any]) -> dict[str, Any]:
                batch = with_decoder_inputs(self.model, dict(whole(examples)))
                return {name: value for name, value in batch.items() if name not in targets}

        else:
            rows, encode, collate, columns = self.encoder(rows)
            dataset = rows.with_transform(encode)
        if tell:
            _say(f"Calibrating on {description}: {columns}")
        return DataLoader(dataset, batch_size=COMPARE_BATCH_SIZE, collate_fn=collate)

    def evaluation(self, where: str, preferred: tuple[str, ...], samples: int | None) -> dict[str, Any]:
        """Labelled rows and their collator, as arguments of `export_onnx`, which takes the usual metrics of the task.
        Raises `ValueError`: the command knows no data for the model's task, or the rows have no inputs or no labels for
        it."""
        self.rows, description = load_rows(where, preferred, samples)
        dataset, collate, columns = labelled(self, self.rows, description)
        _say(f"Evaluating on {description}: {columns}")
        return {"eval_dataset": dataset, "data_collator": collate}

    def encoder(self, rows: Dataset) -> tuple[Dataset, Encode, Callable[[list[Any]], Any], str]:
        """The rows as they are to be read, what makes inputs of them and batches of those, and the columns used."""
        main, accepted = self.model.main_input_name, forward_columns(self.model)
        if main in rows.column_names:
            kept = [name for name in rows.column_names if name in accepted and name not in LABELS]
            pads = main != "pixel_values" and hasattr(self.processor, "pad")
            collate = DataCollatorWithPadding(self.processor) if pads else default_data_collator
            return rows, lambda batch: {name: batch[name] for name in kept}, collate, ", ".join(kept)
        if self.processor is None:
            raise ValueError(
                f"The checkpoint has no tokenizer or processor that makes {main} of the columns {names_of(rows)}. Save it "
                "beside the model with save_pretrained."
            )
        if main == "input_ids" and not self.model.config.is_encoder_decoder:
            return self._texts(rows)
        if main == "pixel_values":
            return self._images(rows, accepted)
        if main in _AUDIO_INPUTS and not self.model.config.is_encoder_decoder:
            return self.sounds(rows)
        raise ValueError(
            f"The command cannot make the inputs of {type(self.model).__name__} ({main}) of the columns {names_of(rows)}: it "
            "knows texts, images and audio for models without a decoder of their own. Call export_onnx in Python, "
            "whose calibration takes batches of any kind."
        )

    def _texts(self, rows: Dataset) -> tuple[Dataset, Encode, Callable[[list[Any]], Any], str]:
        columns = self._text_columns(rows)
        refuse_gaps(rows, columns, "The rows")

        def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
            return self.taken(self.tokenizer(*(batch[name] for name in columns), **self.cut))

        return rows, encode, DataCollatorWithPadding(self.tokenizer), " and ".join(columns)

    def _text_columns(self, rows: Dataset) -> list[str]:
        if self.text_columns is not None:
            wrong = [name for name in self.text_columns if not is_string(rows.features.get(name))]
            if wrong:
                raise ValueError(f"--text-columns {wrong[0]}: no column of strings; the columns are {names_of(rows)}.")
            return self.text_columns
        found = strings_of(rows)
        if len(found) not in (1, 2):
            raise ValueError(
                f"{type(self.model).__name__} reads one or two columns of strings; there are {len(found)} of them in "
                f"{names_of(rows)}. Name those to use with --text-columns."
            )
        refuse_twins(rows, found)
        return found

    def _images(self, rows: Dataset, accepted: set[str]) -> tuple[Dataset, Encode, Callable[[list[Any]], Any], str]:
        processor = getattr(self.processor, "image_processor", self.processor)
        column = only(rows, Image, "images", self.model)
        mode = "L" if getattr(self.model.config, "num_channels", 3) == 1 else "RGB"

        def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
            arrays = [np.atleast_3d(np.asarray(to_mode(image, mode))) for image in batch[column]]
            encoded = processor(arrays, input_data_format="channels_last")
            return {name: list(values) for name, values in encoded.items() if name in accepted}

        return rows, encode, default_data_collator, column

    def sounds(self, rows: Dataset) -> tuple[Dataset, Encode, Callable[[list[Any]], Any], str]:
        """The rows, what makes inputs of their sounds, what makes batches of those, and the column."""
        extractor = getattr(self.processor, "feature_extractor", self.processor)
        column, rate = only(rows, Audio, "audio", self.model), extractor.sampling_rate

        def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
            encoded = extractor([samples_of(sound, rate) for sound in batch[column]], sampling_rate=rate)
            return self.taken({name: list(values) for name, values in encoded.items()})

        return decodable(rows, column, rate), encode, DataCollatorWithPadding(extractor), column


def _longest(tokenizer: Any, model: PreTrainedModel, wanted: int | None) -> int | None:
    """How many tokens a text keeps: `wanted`, else as many as the model takes; `None` if nothing says so. Raises
    `ValueError`: its table of positions has fewer."""
    of_tokens = getattr(model, "main_input_name", "") == "input_ids"
    tables = [
        # Positions of RoBERTa's kind begin after that of padding, those of BART's at 2.
        table.num_embeddings - getattr(table, "offset", 0 if table.padding_idx is None else table.padding_idx + 1)
        for name, table in model.named_modules()
        if isinstance(table, nn.Embedding) and _POSITIONS.search(name)
        if "vision" not in name and (of_tokens or ".encoder." not in name)
    ]
    if wanted and tables and wanted > min(tables):
        raise ValueError(
            f"max_length={wanted} is more than the {min(tables)} positions that {type(model).__name__} has. Leave it out, or name "
            f"{min(tables)} at most."
        )
    limits = [getattr(tokenizer, "model_max_length", None), getattr(model.config, "max_position_embeddings", None)]
    known = [limit for limit in [*limits, *tables] if limit is not None and 0 < limit < 10**6]
    return wanted or min(known, default=None)


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
