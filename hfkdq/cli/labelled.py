# SPDX-License-Identifier: Apache-2.0
"""Labelled examples of every task, made by the processor of the checkpoint of the columns that such data sets have."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset, Image, Value, concatenate_datasets
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    default_data_collator,
)

from ..metrics import answer_features
from ..metrics.base import IGNORED
from ..modeling.forwards import forward_columns
from ..modeling.tasks import CLASSIFICATION, class_names, is_bare, is_listed
from .columns import MASKS, is_string, lists_of, names_of, only, refuse_gaps, row_of, strings_of
from .labels import column_of, label_reader, label_table
from .media import to_mode
from .names import LABELS

_BLOCK = 512  # tokens of a text that a language model is measured on, where it takes more
_MASKED = 0.15  # share of tokens that a masked language model is asked for, as in BERT's training
_TAGS = ("ner_tags", "tags", "labels", "label", "pos_tags")
_WHOLE = (
    "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "TOKEN_CLASSIFICATION", "QUESTION_ANSWERING", "ZERO_SHOT_IMAGE_CLASSIFICATION"
)  # fmt: skip
Read = Callable[[dict[str, list[Any]]], list[Any]]


class Labelled(NamedTuple):
    """Examples, what makes batches of them, and in words the columns that they come from."""

    dataset: Any
    collate: Callable[[list[Any]], Any]
    columns: str


def labelled(reader: Any, rows: Dataset, description: str) -> Labelled:
    """The examples of the task of `reader.model`.

    Raises:
        ValueError: the command knows no data for this class, or the rows lack a column; what was expected is named.
    """
    names, accepted = class_names(reader.model), forward_columns(reader.model)
    classifies = any(is_listed(name, *CLASSIFICATION) for name in names)
    if reader.model.main_input_name in rows.column_names and not classifies:
        kept = [name for name in rows.column_names if name in accepted]  # inputs already, as a Trainer takes them
        pads = isinstance(lists_of(rows.features.get("labels")), Value) and hasattr(reader.tokenizer, "pad")
        collate = DataCollatorForTokenClassification(reader.tokenizer) if pads else reader.encoder(rows)[2]
        return Labelled(rows.select_columns(kept), collate, ", ".join(kept))
    for table, make in _BY_TABLE.items():
        if any(is_listed(name, table) for name in names):
            return make(reader, rows, description)
    if is_bare(reader.model):
        rows, encode, collate, columns = reader.encoder(rows)
        return Labelled(rows.with_transform(encode), collate, columns)
    raise ValueError(
        f"--eval-data: the command has no usual metric for {type(reader.model).__name__}. export_onnx in Python measures any model, "
        "with the compute_metrics= and the eval_dataset= of your Trainer."
    )


def with_unlabelled(reader: Any, rows: Dataset, description: str, more: Dataset, description_of_more: str) -> Labelled:
    """The examples of `rows`, and after them those of `more` with the label -100, whatever label they have. Raises
    `ValueError`: the model does not choose one class for an example; or what it would read of `more` has another
    name."""
    config = reader.model.config
    if (
        not any(is_listed(name, *CLASSIFICATION) for name in class_names(reader.model))
        or config.problem_type in ("regression", "multi_label_classification")
        or config.num_labels == 1
        or lists_of(rows.features[column := column_of(rows, LABELS, description)]) is not None
    ):
        raise ValueError(
            f"data.unlabelled is for models that choose one class for an example, and {type(reader.model).__name__} does something "
            "else here. Leave it out."
        )
    read = label_reader(rows, config, description)
    ours, theirs = (reader.encoder(part)[3] for part in (rows, more))
    if ours != theirs:
        raise ValueError(
            f"The model reads {ours} of {description} and would read {theirs} of {description_of_more}. Name the columns alike."
        )
    kept = [name for name in rows.column_names if name not in LABELS and name in more.column_names]
    inputs, numbers = rows.select_columns(kept), read({column: rows[column]})
    parts = [inputs, more.select_columns(kept).cast(inputs.features)]
    labels = Dataset.from_dict({"labels": [*numbers, *[IGNORED] * len(more)]})
    whole = concatenate_datasets([concatenate_datasets(parts), labels], axis=1)
    joined, encode, collate, columns = reader.encoder(whole)
    made = joined.with_transform(lambda batch: {**encode(batch), "labels": batch["labels"]})
    return Labelled(made, collate, columns)


def reads_whole_rows(model: Any) -> bool:
    """Whether a model reads more than a text, an image or a sound, so that the rows are read alike with and without labels."""
    return any(is_listed(name, *_WHOLE) for name in class_names(model))


def _classes(reader: Any, rows: Dataset, description: str) -> Labelled:
    """One label an example, several, or a number."""
    config = reader.model.config
    read: Read
    column = column_of(rows, LABELS, description)
    feature, problem = rows.features[column], config.problem_type
    element = lists_of(feature)
    if element is not None or problem == "multi_label_classification":
        refuse_gaps(rows, [column], description)
        table = label_table({label for row in rows[column] for label in row}, element, config, description)
        read = _several(column, table, config.num_labels)
    elif problem == "regression" or (problem is None and config.num_labels == 1):
        refuse_gaps(rows, [column], description)
        if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in rows[column]):
            told = f"{description} have a column {column} of {feature}"
            raise ValueError(f"{told}, and a regression needs numbers that are finite.")

        def read(batch: dict[str, list[Any]]) -> list[Any]:
            return [float(value) for value in batch[column]]

    else:
        read = label_reader(rows, config, description)
    rows, encode, collate, columns = reader.encoder(rows)
    return Labelled(rows.with_transform(lambda batch: {**encode(batch), "labels": read(batch)}), collate, columns)


def _several(column: str, table: Mapping[Any, int], classes: int) -> Read:
    def read(batch: dict[str, list[Any]]) -> list[Any]:
        hot = np.zeros((len(batch[column]), classes), np.float32)
        for row, found in enumerate(batch[column]):
            hot[row, [table[label] for label in found]] = 1.0
        return list(hot)

    return read


def _tokens(reader: Any, rows: Dataset, description: str) -> Labelled:
    """Lists of words with a label each; the first token of a word has its label."""
    words = [name for name, feature in rows.features.items() if is_string(lists_of(feature)) and name not in _TAGS]
    column = column_of(rows, _TAGS, description)
    if len(words) != 1:
        raise ValueError(
            f"{type(reader.model).__name__} reads one column of lists of words; there are {len(words)} of them in {names_of(rows)}."
        )
    refuse_gaps(rows, [*words, column], description)
    sizes = [(len(said), len(tags)) for said, tags in zip(rows[words[0]], rows[column], strict=True)]
    wrong = next((row for row, (said, tags) in enumerate(sizes) if said != tags), None)
    if wrong is not None:
        raise ValueError(
            f"{description} have {sizes[wrong][0]} words in {words[0]} and {sizes[wrong][1]} labels in {column} of row {row_of(rows, wrong)}; every word "
            "needs one."
        )
    found = {label for row in rows[column] for label in row}
    table = label_table(found, lists_of(rows.features[column]), reader.model.config, description)
    tokenizer = reader.tokenizer

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        encoded = tokenizer(batch[words[0]], is_split_into_words=True, **reader.cut)
        labels = []
        for row, tags in enumerate(batch[column]):
            owners = encoded.word_ids(row)
            pairs = zip(owners, [None, *owners], strict=False)
            labels.append([IGNORED if word in (None, before) else table[tags[word]] for word, before in pairs])
        return {**reader.taken(encoded), "labels": labels}

    collate = DataCollatorForTokenClassification(tokenizer)
    return Labelled(rows.with_transform(encode), collate, f"{words[0]} and {column}")


def _answers(reader: Any, rows: Dataset, description: str) -> Labelled:
    refuse_gaps(rows, [name for name in ("question", "context", "answers") if name in rows.column_names], description)
    longest = min(reader.longest or 384, 384)
    features = answer_features(rows, reader.tokenizer, longest, stride=longest // 3)
    return Labelled(features, DataCollatorWithPadding(reader.tokenizer), "question, context and answers")


def _masked(reader: Any, rows: Dataset, description: str) -> Labelled:
    """Texts of which some tokens are masked, the same at every call."""
    tokenizer, random = reader.tokenizer, np.random.default_rng(0)

    def mask(row: Mapping[str, Any]) -> dict[str, Any]:
        ids = np.array(row["input_ids"])
        special = np.array(tokenizer.get_special_tokens_mask(row["input_ids"], already_has_special_tokens=True), bool)
        chosen = (random.random(len(ids)) < _MASKED) & ~special
        labels = np.where(chosen, ids, IGNORED).tolist()
        return {"input_ids": np.where(chosen, tokenizer.mask_token_id, ids).tolist(), "labels": labels}

    encoded, columns = _encoded(reader, rows)
    return Labelled(encoded.map(mask, desc="Masking"), DataCollatorForTokenClassification(tokenizer), columns)


def _next_tokens(reader: Any, rows: Dataset, description: str) -> Labelled:
    """All texts, one after the other, in blocks of equal length."""
    size = min(reader.longest or _BLOCK, _BLOCK)
    encoded, columns = _encoded(reader, rows, truncation=False)
    ids = [token for row in encoded["input_ids"] for token in row]
    blocks = [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)] or [ids]
    if len(blocks[0]) < 2:
        raise ValueError(f"{description} have no two tokens in the column {columns}.")
    masks = [[1] * len(block) for block in blocks]
    data = Dataset.from_dict({"input_ids": blocks, "attention_mask": masks, "labels": blocks})
    return Labelled(data, default_data_collator, columns)


def _pairs_of_texts(reader: Any, rows: Dataset, description: str) -> Labelled:
    """A text and what is to be written for it."""
    nested = [name for name, feature in rows.features.items() if isinstance(feature, dict) and len(feature) == 2]
    if len(nested) == 1 and all(is_string(feature) for feature in rows.features[nested[0]].values()):
        rows = rows.select_columns(nested).flatten()  # the column `translation` of many data sets
    texts = reader.text_columns or strings_of(rows)
    if len(texts) != 2 or not all(is_string(rows.features.get(name)) for name in texts):
        raise ValueError(
            f"{type(reader.model).__name__} reads a column of texts and one of what it is to write for them; the columns are "
            f"{names_of(rows)}. Name the two with --text-columns SOURCE,TARGET."
        )
    refuse_gaps(rows, texts, description)
    tokenizer, (source, target) = reader.tokenizer, texts

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        written = tokenizer(text_target=batch[target], **reader.cut)["input_ids"]
        return {**reader.taken(tokenizer(batch[source], **reader.cut)), "labels": written}

    data = rows.map(encode, batched=True, remove_columns=rows.column_names, desc="Tokens")
    return Labelled(data, DataCollatorForSeq2Seq(tokenizer, reader.model), f"{source} to {target}")


def _speech(reader: Any, rows: Dataset, description: str) -> Labelled:
    """Sounds and what is said in them."""
    usual = [name for name in ("text", "sentence", "transcription") if name in rows.column_names]
    texts = (reader.text_columns or usual)[:1] or strings_of(rows)
    if len(texts) != 1:
        raise ValueError(
            f"{type(reader.model).__name__} needs the column with what is said; name it with --text-columns. There are {names_of(rows)}."
        )
    (said,) = texts
    refuse_gaps(rows, texts, description)
    rows, encode, collate, column = reader.sounds(rows)
    pad = reader.tokenizer.pad

    def encode_both(batch: dict[str, list[Any]]) -> dict[str, Any]:
        return {**encode(batch), "labels": reader.tokenizer(batch[said])["input_ids"]}

    def both(examples: list[Any]) -> dict[str, Any]:
        labels = pad({"input_ids": [example["labels"] for example in examples]}, return_tensors="pt")
        sounds = collate([{name: example[name] for name in example if name != "labels"} for example in examples])
        padding = labels["attention_mask"].eq(0)
        return {**sounds, "labels": labels["input_ids"].masked_fill(padding, IGNORED)}

    return Labelled(rows.with_transform(encode_both), both, f"{column} and {said}")


def _pixels(reader: Any, rows: Dataset, description: str) -> Labelled:
    """Images and images of the class of each pixel."""
    images = [name for name, feature in rows.features.items() if isinstance(feature, Image)]
    masks = [name for name in images if MASKS.search(name)]
    if len(images) != 2 or len(masks) != 1:
        raise ValueError(
            f"{type(reader.model).__name__} reads a column of images, and one called mask, label or annotation with the class of each "
            f"pixel; there are {names_of(rows)}."
        )
    processor = getattr(reader.processor, "image_processor", reader.processor)
    (image,) = set(images) - set(masks)

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        pictures = [to_mode(picture, "RGB") for picture in batch[image]]
        encoded = processor(pictures, segmentation_maps=[np.asarray(mask.convert("L")) for mask in batch[masks[0]]])
        classes = [np.asarray(mask) for mask in encoded["labels"]]
        return {"pixel_values": list(encoded["pixel_values"]), "labels": classes}

    return Labelled(rows.with_transform(encode), default_data_collator, f"{image} and {masks[0]}")


def _boxes(reader: Any, rows: Dataset, description: str) -> Labelled:
    """Images and their objects: `bbox` (COCO's x, y, width, height in pixels) and `category`."""
    image = only(rows, Image, "images", reader.model)
    kinds = {name: _fields(feature) for name, feature in rows.features.items()}
    found = [(name, kind) for name, kind in kinds.items() if "bbox" in kind and {"category", "category_id"} & {*kind}]
    if len(found) != 1:
        raise ValueError(
            f"{type(reader.model).__name__} reads a column of objects with bbox (x, y, width, height in pixels) and category; there are "
            f"{names_of(rows)}."
        )
    (column, fields), processor = found[0], getattr(reader.processor, "image_processor", reader.processor)
    category = "category" if "category" in fields else "category_id"
    objects = [_by_field(row) for row in rows[column]]
    for number, row in enumerate(objects):
        sizes = [len(row["bbox"]), len(row[category])]
        if sizes[0] != sizes[1] or not all(len(box) == 4 and min(box[2:]) > 0 for box in row["bbox"]):
            raise ValueError(
                f"{description} have {sizes[0]} boxes and {sizes[1]} of {category} in row {row_of(rows, number)}: {str(row['bbox'])[:99]}. Every object needs "
                "both, and a box is x, y, width and height in pixels, the last two positive."
            )
    names = {label for row in objects for label in row[category]}
    table = label_table(names, lists_of(fields[category]) or fields[category], reader.model.config, description)

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        pictures = [to_mode(picture, "RGB") for picture in batch[image]]
        annotations = []
        for number, row in enumerate(map(_by_field, batch[column])):
            boxes = [
                {"bbox": list(box), "category_id": table[label], "area": box[2] * box[3], "iscrowd": 0}
                for box, label in zip(row["bbox"], row[category], strict=True)
            ]
            annotations.append({"image_id": number, "annotations": boxes})
        encoded = processor(images=pictures, annotations=annotations, return_tensors="pt")
        return {name: list(values) for name, values in encoded.items()}

    def collate(examples: list[Any]) -> dict[str, Any]:
        names = [name for name in examples[0] if name != "labels"]
        stacked = {name: torch.stack([torch.as_tensor(example[name]) for example in examples]) for name in names}
        return {**stacked, "labels": [example["labels"] for example in examples]}

    return Labelled(rows.with_transform(encode), collate, f"{image} and {column}")


def _images_and_texts(reader: Any, rows: Dataset, description: str) -> Labelled:
    image, texts = only(rows, Image, "images", reader.model), reader.text_columns or strings_of(rows)
    if len(texts) != 1:
        raise ValueError(
            f"{type(reader.model).__name__} reads one column of texts; name it with --text-columns: {names_of(rows)}."
        )

    def collate(examples: list[Any]) -> dict[str, Any]:
        pictures, said = [to_mode(one[image], "RGB") for one in examples], [one[texts[0]] for one in examples]
        encoded = reader.processor(images=pictures, text=said, padding=True, truncation=True, return_tensors="pt")
        return reader.taken(encoded)

    return Labelled(rows.with_transform(lambda batch: batch), collate, f"{image} and {texts[0]}")


def _encoded(reader: Any, rows: Dataset, truncation: bool = True) -> tuple[Dataset, str]:
    """Tokens of one column of texts."""
    texts = reader.text_columns or strings_of(rows)
    if len(texts) != 1:
        raise ValueError(
            f"{type(reader.model).__name__} reads one column of strings; there are {len(texts)} of them in {names_of(rows)}. Name it with "
            "--text-columns."
        )
    if not any(text and text.strip() for text in rows[texts[0]]):
        raise ValueError(f"The column {texts[0]} has no text in any row.")
    cut = reader.cut if truncation else {}
    encoded = rows.filter(lambda text: bool(text and text.strip()), input_columns=texts, desc="Texts").map(
        lambda batch: reader.taken(reader.tokenizer(batch[texts[0]], **cut)), batched=True,
        remove_columns=rows.column_names, desc="Tokens",
    )  # fmt: skip
    return encoded, texts[0]


def _fields(feature: Any) -> Mapping[str, Any]:
    """The fields of objects: of a dictionary of lists, or of a list of dictionaries; none of another column."""
    return next((kind for kind in (feature, lists_of(feature)) if isinstance(kind, dict)), {})


def _by_field(objects: Any) -> dict[str, list[Any]]:
    if isinstance(objects, Mapping):
        return dict(objects)
    names = objects[0] if objects else ("bbox", "category", "category_id")
    return {name: [one[name] for one in objects] for name in names}


_BY_TABLE: Mapping[str, Callable[[Any, Dataset, str], Labelled]] = {
    "SEQ_TO_SEQ_CAUSAL_LM": _pairs_of_texts, "SPEECH_SEQ_2_SEQ": _speech, "MASKED_LM": _masked,
    "SEQUENCE_CLASSIFICATION": _classes, "TOKEN_CLASSIFICATION": _tokens, "QUESTION_ANSWERING": _answers,
    "IMAGE_CLASSIFICATION": _classes, "OBJECT_DETECTION": _boxes, "AUDIO_CLASSIFICATION": _classes, "CTC": _speech,
    "CAUSAL_LM": _next_tokens, "SEMANTIC_SEGMENTATION": _pixels, "ZERO_SHOT_IMAGE_CLASSIFICATION": _images_and_texts,
}  # fmt: skip
