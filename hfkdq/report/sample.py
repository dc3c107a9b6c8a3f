# SPDX-License-Identifier: Apache-2.0
"""What the call of a card prints on the folder that it is about, and who loads its tokenizer or processor."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import FeatureExtractionMixin, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor

from ..export.record import export_file, read_export
from ..export.sample import run_sample
from ..files import replacing
from .data import Sample
from .mistakes import first_image

_PROCESSORS = {
    PreTrainedTokenizerBase: "AutoTokenizer",
    BaseImageProcessor: "AutoImageProcessor",
    ProcessorMixin: "AutoProcessor",
    FeatureExtractionMixin: "AutoFeatureExtractor",
}


def loader_of(processor: Any) -> str | None:
    """The Auto class that loads a tokenizer or processor; `None` for anything else."""
    return next((auto for cls, auto in _PROCESSORS.items() if isinstance(processor, cls)), None)


def sample_of(
    folder: Path | None, facts: Mapping[str, Any], model: PreTrainedModel, processor: Any, shown: Sequence[Any]
) -> Sample | None:
    """What the call of the card prints on an exported folder; an image is the first of the data."""
    loader = loader_of(processor)
    if folder is None or loader is None or "kind" not in facts:
        return None
    found = run_sample(folder, facts, type(model).__name__, loader, first_image(shown))
    return None if found is None else Sample(**found)


def record_sample(folder: Path, model: PreTrainedModel, processor: Any, shown: Sequence[Any]) -> None:
    """Adds to the record of an export what [`sample_of`] gives, and what loads its tokenizer or processor."""
    facts = read_export(folder)
    sample = sample_of(folder, facts, model, processor, shown)
    facts |= {} if sample is None else {"sample": asdict(sample)}
    facts |= {} if (loader := loader_of(processor)) is None else {"processor": loader}
    with replacing(export_file(folder)) as temporary:
        temporary.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
