# SPDX-License-Identifier: Apache-2.0
"""The description of cached outputs, which travels with the dataset, and the fingerprints of what they depend on."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..modeling.forwards import TEACHER_PREFIX
from ..objectives.model_signature import ModelSignature
from ..schema import brief

FORMAT_VERSION = 1
ROW_CHECK = TEACHER_PREFIX + "row_check"
# `info.description` outlives select, shuffle, filter, map, splits, concatenation and the disk; parquet files drop it.
_MARK = re.compile(r"\s*<!-- hfkdq-cache (\{.*?\}) -->", re.DOTALL)


@dataclass(frozen=True)
class CachedOutput:
    """One output of a teacher, such as `"logits"` or `"hidden_state_3"`, and the columns that hold it."""

    name: str
    positions: Literal["attended", "decoded", "frames", "adapted_frames"] | None
    """The tokens, or frames of audio (behind an adapter), that its first axis follows; `None` where padding has no say."""
    shape: tuple[int, ...]
    """Shape for one example without its first axis; `()` where that is the only one."""
    dtype: Literal["float16", "int8", "int32"]

    @property
    def column(self) -> str:
        return TEACHER_PREFIX + self.name

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of its values and, of int8, of their scales and minima."""
        more = ("_scale", "_minimum") if self.dtype == "int8" else ()
        return (self.column, *(self.column + suffix for suffix in more))


@dataclass(frozen=True)
class CacheInfo:
    """The columns of a teacher's outputs, and what they depend on.

    Attributes:
        outputs (tuple of [`CachedOutput`]): the cached outputs.
        inputs (tuple of `str`): the columns of a batch that the teacher read, which the check of a row is over.
        teacher (`dict`): class, configuration and output shapes of the teacher, and its fingerprint in checkpoints.
        key (`dict`): what the outputs depend on: fingerprints of teacher, processor and dataset, collator, settings.
    """

    outputs: tuple[CachedOutput, ...]
    inputs: tuple[str, ...]
    teacher: Mapping[str, Any]
    key: Mapping[str, Any]

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that were added to the dataset."""
        return (*(column for output in self.outputs for column in output.columns), ROW_CHECK)

    @property
    def layers(self) -> tuple[int, ...]:
        """The hidden states that are cached; 0 is the embeddings."""
        names = (output.name.rpartition("_") for output in self.outputs)
        return tuple(int(number) for kind, _, number in names if kind == "hidden_state")

    @cached_property
    def outline(self) -> ModelSignature:
        """The teacher as objectives see it: class, configuration and shapes."""
        config = dict(self.teacher["config"])
        kind: Any = config.get("model_type")
        # Its `get` knows only what was imported so far.
        maker = CONFIG_MAPPING[kind] if kind in CONFIG_MAPPING else PretrainedConfig  # noqa: SIM401
        known = self.key["temperature"]  # where the outputs are the likeliest classes
        name, shapes = self.teacher["model_class"], self.teacher["shapes"]
        return ModelSignature(name, maker.from_dict(config), shapes, temperature=known)

    def to_json(self) -> str:
        fields = {name: value for name, value in vars(self).items() if name in self.__dataclass_fields__}
        plain = {**fields, "outputs": [asdict(output) for output in self.outputs]}
        return json.dumps(plain, sort_keys=True, default=str)

    @classmethod
    def from_json(cls, text: str) -> CacheInfo:
        """Reads what `to_json` wrote.

        Raises:
            ValueError: it was written by a release with another format, or is damaged.
        """
        try:
            plain = json.loads(text)
            version = plain["key"]["version"]
            if version == FORMAT_VERSION:
                outputs = tuple(CachedOutput(**{**o, "shape": tuple(o["shape"])}) for o in plain["outputs"])
                return cls(outputs, tuple(plain["inputs"]), dict(plain["teacher"]), dict(plain["key"]))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(
                f"What describes the cached teacher outputs is damaged ({type(error).__name__}: {brief(error)}). Cache them anew "
                "with cache_teacher_outputs."
            ) from error
        raise ValueError(
            f"These outputs were cached in format {version!r}; this release reads {FORMAT_VERSION}. Cache them anew with "
            "cache_teacher_outputs."
        )


def cache_info(dataset: Any) -> CacheInfo | None:
    """What is known of the teacher's outputs that a dataset holds.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): what `cache_teacher_outputs` returned, or what was
            made of it by `select`, `shuffle`, `filter`, `map`, `train_test_split`, `concatenate_datasets`,
            `save_to_disk` and the like.

    Returns:
        [`CacheInfo`], or `None` where the dataset holds no outputs.

    Raises:
        ValueError: the columns are there, but what describes them is lost (`to_iterable_dataset` and parquet, CSV and
            JSON files drop it); some of the columns were removed or renamed; or the outputs are of several teachers or settings.
    """
    columns = getattr(dataset, "column_names", None)
    if not isinstance(columns, list):
        return None
    description = getattr(getattr(dataset, "info", None), "description", None) or ""
    found = [CacheInfo.from_json(text) for text in dict.fromkeys(_MARK.findall(description))]
    if not found:
        if ROW_CHECK in columns:
            raise ValueError(
                f"The dataset has the column {ROW_CHECK!r} of cached teacher outputs, but what describes them is lost: it is "
                "kept in dataset.info.description, which save_to_disk writes, and to_iterable_dataset and parquet, CSV and "
                "JSON files drop. Copy it from the dataset that cache_teacher_outputs returned (other.info.description = "
                "dataset.info.description), load what save_to_disk wrote, or call cache_teacher_outputs again."
            )
        return None
    info = found[0]
    if not set(info.columns) & set(columns):
        return None
    for other in found[1:]:
        shared = {"dataset", "rows", "part_rows"}
        differ = [name for name in info.key if name not in shared and info.key[name] != other.key.get(name)]
        if differ or info.outputs != other.outputs or info.inputs != other.inputs:
            told = "; ".join(f"{name} {info.key[name]!r} and {other.key.get(name)!r}" for name in differ)
            raise ValueError(
                f"The dataset was put together of teacher outputs that were cached in different ways: {told or 'their layout'}. Put the "
                "datasets together first and call cache_teacher_outputs once."
            )
    missing = [column for column in info.columns if column not in columns]
    if missing:
        raise ValueError(
            f"Of the cached teacher outputs the columns {', '.join(missing)} were removed or renamed. Keep them all, or "
            "remove them all: dataset.remove_columns([c for c in dataset.column_names if c.startswith('teacher_')])."
        )
    return info


def with_info(dataset: Any, info: CacheInfo) -> Any:
    """Writes what is known of the cached outputs into a dataset, in place of what was there; returns the dataset."""
    kept = _MARK.sub("", dataset.info.description or "")
    # A ">" in a label must not end the comment.
    text = info.to_json().replace(">", "\\u003e")
    dataset.info.description = f"{kept}\n<!-- hfkdq-cache {text} -->"
    return dataset


def processor_fingerprint(processor: Any) -> str | None:
    """Class of a tokenizer, image processor, feature extractor or processor of several, and a hash of what it holds.
    How a tokenizer pads and truncates is left out: calling it changes that, and the rows are tokenized already."""
    if processor is None:
        return None
    return f"{type(processor).__name__} {short_hash(_contents(processor))}"


def _contents(processor: Any) -> Any:
    names = getattr(processor, "attributes", None)
    if isinstance(names, (list, tuple)) and names:
        return {name: _contents(getattr(processor, name)) for name in names if hasattr(processor, name)}
    if hasattr(processor, "get_vocab"):
        backend = getattr(processor, "backend_tokenizer", None)
        found = {} if backend is None else json.loads(backend.to_str())
        found = {key: value for key, value in found.items() if key not in ("padding", "truncation")}
        special = {key: str(value) for key, value in processor.special_tokens_map.items()}
        return {"backend": found, "vocabulary": processor.get_vocab(), "special": special}
    return processor.to_dict() if hasattr(processor, "to_dict") else type(processor).__qualname__


def collator_name(collator: Any) -> str:
    """Where the class of a collator, or the function that it is, was defined."""
    named = collator if hasattr(collator, "__qualname__") else type(collator)
    return f"{named.__module__}.{named.__qualname__}"


def short_hash(contents: Any) -> str:
    """16 hexadecimal digits that stand for contents, which JSON or text can hold."""
    return hashlib.sha256(json.dumps(contents, sort_keys=True, default=str).encode()).hexdigest()[:16]
