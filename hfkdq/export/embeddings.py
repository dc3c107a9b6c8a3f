# SPDX-License-Identifier: Apache-2.0
"""One embedding for each text: pooling and norm as part of the exported model, and the files that sentence-transformers
loads. Knows nothing of ONNX."""

from __future__ import annotations

import copy
import functools
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
import transformers
from torch import Tensor
from torch.nn.functional import normalize as to_unit_length
from transformers import PreTrainedModel
from transformers.utils import ModelOutput, cached_file, logging

from ..modeling.forwards import as_output, forward_columns
from ..modeling.tasks import task_of
from ..schema import FreeText, check, read_file
from .choices import NO_POOLING, POOLINGS

logger = logging.get_logger(__name__)
NAME = "sentence_embedding"
MODULES, POOLING, MODEL_SETTINGS, TOKEN_SETTINGS = (
    "modules.json", "1_Pooling/config.json", "config_sentence_transformers.json", "sentence_bert_config.json"
)  # fmt: skip
FILES = (MODULES, POOLING, MODEL_SETTINGS, TOKEN_SETTINGS)
_TYPES = "sentence_transformers.models."


class _ModelSettings(TypedDict, total=False):
    """What of `config_sentence_transformers.json` is kept."""

    prompts: dict[FreeText, FreeText]
    default_prompt_name: FreeText | None
    similarity_fn_name: FreeText | None


class _TokenSettings(TypedDict, total=False):
    """What of `sentence_bert_config.json` is kept."""

    max_seq_length: int | None
    do_lower_case: bool


@dataclass(frozen=True)
class Pooling:
    """How the states of a text become one vector."""

    modes: tuple[str, ...]  # names of sentence-transformers; several are joined
    normalize: bool  # whether the vector is scaled to length 1
    model_settings: _ModelSettings
    token_settings: _TokenSettings

    def __call__(self, states: Tensor, mask: Tensor) -> Tensor:
        """The vectors, `(batch, modes * width)`, of states `(batch, seq, width)`; `mask`, `(batch, seq)`, is 0 at padding."""
        vectors = torch.cat([_pooled(states, mask, mode) for mode in self.modes], dim=-1)
        return to_unit_length(vectors, dim=-1) if self.normalize else vectors

    def describe(self) -> dict[str, Any]:
        """The record of an export."""
        return {"modes": list(self.modes), "normalize": self.normalize}

    def write(self, folder: Path, model: PreTrainedModel, processing_class: Any) -> None:
        """Writes what `SentenceTransformer(folder)` reads beside a checkpoint."""
        names = ["Transformer", "Pooling", *(["Normalize"] if self.normalize else [])]
        paths = ["", *(f"{number}_{name}" for number, name in enumerate(names) if number)]
        modules = [
            {"idx": number, "name": str(number), "path": path, "type": _TYPES + name}
            for number, (name, path) in enumerate(zip(names, paths, strict=True))
        ]
        for path in paths[1:]:
            (folder / path).mkdir()
        most = getattr(model.config, "max_position_embeddings", None)
        lengths = [n for n in (getattr(processing_class, "model_max_length", None), most) if type(n) is int and n > 0]
        versions = {"transformers": transformers.__version__, "pytorch": torch.__version__}
        texts: dict[str, Any] = {
            MODULES: modules,
            POOLING: {
                "word_embedding_dimension": model.config.hidden_size,
                **{key: mode in self.modes for mode, key in POOLINGS.items()},
            },
            MODEL_SETTINGS: {
                "__version__": versions, "prompts": {}, "default_prompt_name": None, "similarity_fn_name": "cosine",
                **self.model_settings,
            },
            TOKEN_SETTINGS: {"max_seq_length": min(lengths, default=None), "do_lower_case": False, **self.token_settings},
        }  # fmt: skip
        for name, data in texts.items():
            (folder / name).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _pooled(states: Tensor, mask: Tensor, mode: str) -> Tensor:
    """One vector for each text, `(batch, width)`, as sentence-transformers computes it."""
    places, seen = torch.arange(states.shape[1], device=states.device), mask != 0
    if mode in ("cls", "lasttoken"):
        # The first token that is no padding, wherever the padding is, or the last one.
        first = torch.where(seen, places, places[-1]).amin(1)
        place = first if mode == "cls" else torch.where(seen, places, places[0]).amax(1)
        return states.gather(1, place[:, None, None].expand(-1, 1, states.shape[-1])).squeeze(1)
    if mode == "max":
        return states.masked_fill(~seen[..., None], float("-inf")).amax(1)
    weights = seen[..., None].to(states.dtype)
    if mode == "weightedmean":
        weights = weights * (places + 1)[:, None]
    total = weights.sum(1).clamp(min=1e-9)
    return (states * weights).sum(1) / (total.sqrt() if mode == "mean_sqrt_len_tokens" else total)


def find_pooling(
    model: PreTrainedModel, task: str, asked: str | Sequence[str] | None, normalize: bool | None
) -> Pooling | None:
    """The pooling that was asked for, or else that of the folder that a model was loaded from; `None` for none.

    `ValueError` for one that does not exist or that the model cannot have, and for files of the folder that are damaged.
    """
    if asked == NO_POOLING:
        if normalize:
            raise ValueError('normalize=True needs an embedding to normalize; pooling="none" leaves it out.')
        return None
    modes = _checked(asked)
    fits = task == "feature-extraction" and _has_states_of_texts(model)
    found = _of_folder(model, modes) if fits else None
    modes = modes or (found.modes if found else ())
    if not modes and normalize is None:
        return None
    if not modes and fits:
        raise ValueError(
            "normalize= needs an embedding to normalize: pass pooling= too, such as 'mean'. The checkpoint has no files of "
            "sentence-transformers that say which."
        )
    if not fits:
        raise ValueError(
            f"pooling= and normalize= make one embedding for each text out of the states of an encoder; {type(model).__name__} "
            f"is exported for {task!r}. Export its encoder, such as AutoModel loads, for 'feature-extraction'."
        )
    unit = found is not None and found.normalize if normalize is None else normalize
    settings = (found.model_settings, found.token_settings) if found else (_ModelSettings(), _TokenSettings())
    return Pooling(modes, unit, *settings)


def _has_states_of_texts(model: PreTrainedModel) -> bool:
    return "input_ids" in forward_columns(model) and not getattr(model.config, "is_encoder_decoder", False)


def _checked(asked: str | Sequence[str] | None) -> tuple[str, ...]:
    """The modes that were asked for, in the order in which they are joined."""
    if asked is None:
        return ()
    given = (asked,) if isinstance(asked, str) else tuple(asked) if isinstance(asked, (list, tuple)) else (asked,)
    if not given or not all(isinstance(mode, str) and mode in POOLINGS for mode in given):
        raise ValueError(
            f"pooling={asked!r} does not exist. Use one or several of {', '.join(POOLINGS)}, or {NO_POOLING!r}."
        )
    return tuple(mode for mode in POOLINGS if mode in given)


def _of_folder(model: PreTrainedModel, asked: Sequence[str]) -> Pooling | None:
    """What the files of sentence-transformers say where a model was loaded from: a folder, or the cache of the Hub."""
    place = str(getattr(model.config, "name_or_path", None) or "")
    files = {name: _file(place, name) for name in FILES} if place else {}
    modules, pooling = files.get(MODULES), files.get(POOLING)
    if modules is None or pooling is None:
        return None
    kinds = _kinds(modules)
    config = read_file(pooling)
    named = config.get("pooling_mode", [mode for mode, key in POOLINGS.items() if config.get(key) is True] or "mean")
    named = [named] if isinstance(named, str) else named
    if not (isinstance(named, list) and all(isinstance(mode, str) for mode in named)):
        raise ValueError(
            f"{pooling} is damaged: pooling_mode is {named!r:.60}, expected a name or a list of names. Write it again."
        )
    unknown = kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"])
    if unknown or not set(named) <= POOLINGS.keys() or config.get("include_prompt") is False:
        told = ", ".join(kinds) if unknown else f"a pooling of {named}, include_prompt={config.get('include_prompt')}"
        if not asked:
            logger.warning(
                f"The files of sentence-transformers in {place} have {told}, which is not exported: the ONNX file has the states "
                "of all tokens, and no embedding. pooling= makes one of them."
            )
        return None
    settings = []
    for name, kept in ((MODEL_SETTINGS, _ModelSettings), (TOKEN_SETTINGS, _TokenSettings)):
        path = files[name]
        data = {} if path is None else read_file(path)
        data = {key: data[key] for key in kept.__annotations__ if key in data}
        try:
            check(data, kept, "it")
        except ValueError as error:
            raise ValueError(f"{path} is no file of sentence-transformers: {error}.") from None
        settings.append(data)
    return Pooling(tuple(mode for mode in POOLINGS if mode in named), "Normalize" in kinds, *settings)  # type: ignore[arg-type]


def _kinds(path: Path) -> list[str]:
    """The classes that `modules.json` lists, without their packages."""
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
        return [str(module["type"]).rpartition(".")[-1] for module in sorted(modules, key=lambda entry: entry["idx"])]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: it is no list of modules. Write it again.") from error


def _file(place: str, name: str) -> Path | None:
    """A file of a folder, or of a model of the Hub as far as it was downloaded."""
    try:
        found = cached_file(
            place, name, local_files_only=True, _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip
    except OSError:  # no such folder any more
        return None
    return None if found is None else Path(found)


def pool_(model: PreTrainedModel, pooling: Pooling) -> PreTrainedModel:
    """Has a model return its states and an embedding for each text, in place; its parameters and saved files stay."""
    base: Any = type(model)
    forward: Any = _pooling_forward(base.forward, pooling)
    # Optimum takes off what Transformers has wrapped around a forward pass, and puts its own in the place.
    if hasattr(base.forward, "__wrapped__"):
        forward.__wrapped__ = _pooling_forward(base.forward.__wrapped__, pooling)
    own = {"forward": forward, "__module__": base.__module__, "__qualname__": base.__qualname__}
    model.__class__ = type(base.__name__, (base,), own)
    return model


def _pooling_forward(call: Any, pooling: Pooling) -> Callable[..., ModelOutput]:
    """A forward pass that takes what `call` takes, and returns states and embeddings."""
    signature = inspect.signature(call)

    def forward(self: Any, *args: Any, **kwargs: Any) -> ModelOutput:
        states = as_output(call(self, *args, **kwargs))["last_hidden_state"]
        mask = signature.bind(self, *args, **kwargs).arguments.get("attention_mask")
        mask = torch.ones_like(states[..., 0]) if mask is None else mask
        return ModelOutput(last_hidden_state=states, **{NAME: pooling(states, mask)})

    functools.update_wrapper(forward, call)
    del forward.__wrapped__  # type: ignore[attr-defined]
    forward.__signature__ = signature  # type: ignore[attr-defined]
    return forward


def pooled_copy(model: PreTrainedModel, recorded: Any) -> PreTrainedModel:
    """The model that a file with this record of [`Pooling.describe`] was made of; the model itself for one without. `ValueError`
    for a model that has no states to pool."""
    if not isinstance(recorded, dict):
        return model
    task = task_of(type(model).__name__)
    if (task is not None and task.name != "feature-extraction") or not _has_states_of_texts(model):
        raise ValueError(
            f"{type(model).__name__} has no states that make an embedding of a text, as the record of the exported file says. Measure "
            "the file beside the encoder that was exported."
        )
    made = Pooling(_checked(recorded["modes"]), bool(recorded["normalize"]), {}, {})
    return pool_(copy.copy(model), made)
