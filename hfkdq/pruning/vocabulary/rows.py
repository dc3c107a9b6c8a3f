# SPDX-License-Identifier: Apache-2.0
"""The rows of a model that stand for tokens, and the ids that its configurations name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ...protocols import Adapted, FollowsPruning
from ..removal import slice_


class VocabularyRows:
    """The embedding tables, heads, biases and ids of a model that follow its vocabulary. Which tensors those are is
    read off two empty models of its class that differ in `vocab_size` alone, so that what is cut is what
    `from_pretrained` will expect. The model is left alone until `keep_`. Raises `ValueError`: no table of tokens, or
    one that the configuration doesn't describe."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.rows = _table_rows(model)
        self.configs = {
            id(config): config
            for module in model.modules()
            if isinstance(getattr(module, "config", None), PretrainedConfig)
            for config in _nested(module.config)  # type: ignore[arg-type]
            if config is model.config or getattr(config, "vocab_size", None) == self.rows
        }
        if all(getattr(config, "vocab_size", None) != self.rows for config in self.configs.values()):
            raise ValueError(
                f"The embedding table has {self.rows} rows, which no vocab_size in the configuration of "
                f"{type(model).__name__} says. Change tables with resize_token_embeddings, which writes it."
            )

    def named_ids(self) -> set[int]:
        """The ids of the table that a configuration, a generation configuration or a `padding_idx` names."""
        seen: set[int] = {module.padding_idx for module, _ in self._padded()}

        def note(id_: int) -> int:
            seen.add(id_)
            return id_

        for holder in self._id_holders():
            renumbered_fields(vars(holder), note)
        return {id_ for id_ in seen if 0 <= id_ < self.rows}

    def fixed_ids(self) -> set[int]:
        """The ids that must not move: up to that of padding, where positions are counted from it."""
        counted = [module.padding_idx for module, is_position in self._padded() if is_position]
        return set(range(max(counted) + 1)) if counted else set()

    def check(self, kept: int, renumber: Callable[[int], int]) -> dict[str, int]:
        """Names of all tensors with one entry per token, and the dimension, if `kept` of them can be left."""
        if kept == self.rows:
            return {}
        config = copy.deepcopy(self.model.config)
        before = _empty_shapes(self.model, config)
        for part in _nested(config):
            if part is config or getattr(part, "vocab_size", None) == self.rows:
                _change_config_(part, self.rows, kept, renumber)
        after = _empty_shapes(self.model, config)
        tensors = dict(_named_tensors(self.model))
        found = {}
        for name in [name for name in before if before[name] != after[name]]:
            dims = [dim for dim, size in enumerate(before[name]) if after[name][dim] != size]
            sizes = (before[name][dims[0]], after[name][dims[0]])
            tensor = tensors.get(name)
            if len(dims) != 1 or sizes != (self.rows, kept) or tensor is None or tensor.shape != before[name]:
                raise ValueError(
                    f"{name} of {type(self.model).__name__} should be a tensor of shape {tuple(before[name])} with one "
                    f"entry per token, got {'none' if tensor is None else tuple(tensor.shape)}. Prune the vocabulary "
                    "of the plain model, before adapters are added or after they are merged."
                )
            if not tensor.is_floating_point() or tensor.is_meta:
                raise ValueError(
                    f"{name} is {tensor.dtype} on {tensor.device}; only floating-point rows that are in memory can be "
                    "chosen from. Load the model without quantization and offloading."
                )
            found[name] = dims[0]
        self._check_heads(found, tensors)
        return found

    def keep_(self, dims: dict[str, int], kept: torch.Tensor, renumber: Callable[[int], int]) -> None:
        """Leaves the rows `kept`, in this order, of the tensors in `dims`, and lets ids and sizes follow."""
        for module, _ in list(self._padded()):
            module.padding_idx = renumber(module.padding_idx)
        tensors = {name: tensor for name, tensor in _named_tensors(self.model) if name in dims}
        for old, dim in {id(tensor): (tensor, dims[name]) for name, tensor in tensors.items()}.values():  # ties once
            for module in slice_(self.model, old, dim, kept):
                if isinstance(module, FollowsPruning) and dim == 0:
                    module.keep_outputs_(kept)
        for module in self.model.modules():
            if vars(module).get("vocab_size") == self.rows:
                module.vocab_size = len(kept)  # type: ignore[assignment]
        for holder in self._id_holders():
            _change_config_(holder, self.rows, len(kept), renumber)
        self.rows = len(kept)

    def _check_heads(self, found: dict[str, int], tensors: dict[str, torch.Tensor]) -> None:
        """Refuses a model with a table or head that would be left out, or an adapter beside one."""
        cut = {id(tensors[name]) for name in found}
        for module in self.model.modules():
            if isinstance(module, PreTrainedModel):
                for end in (_end(module, "get_input_embeddings"), _end(module, "get_output_embeddings")):
                    weight = getattr(end, "weight", None)
                    if weight is not None and weight.shape[0] == self.rows and id(weight) not in cut:
                        raise ValueError(
                            f"A {type(end).__name__} of {type(module).__name__} has {self.rows} rows that vocab_size "
                            "doesn't describe, so it would not follow. Its vocabulary cannot be pruned."
                        )
            own = {id(tensor) for tensor in module._parameters.values() if tensor is not None}
            if own & cut and isinstance(module, Adapted) and module.adapter is not None:
                raise ValueError("An adapter stands beside an embedding table or head. Merge the adapters first.")

    def _padded(self) -> Iterator[tuple[Any, bool]]:
        """Modules that know the id of padding, and whether they count positions from it."""
        pads = {getattr(config, "pad_token_id", None) for config in self.configs.values()}
        parts = [module for module in self.model.modules() if isinstance(module, PreTrainedModel)]
        tables = {id(getattr(_end(part, "get_input_embeddings"), "weight", None)) for part in parts}
        for module in self.model.modules():
            padding = vars(module).get("padding_idx")
            if isinstance(padding, int) and padding >= 0:
                is_table = id(module._parameters.get("weight")) in tables
                if is_table or padding in pads:
                    yield module, not is_table and bool(module._parameters or module._buffers)

    def _id_holders(self) -> list[Any]:
        generation = [getattr(module, "generation_config", None) for module in self.model.modules()]
        return [*self.configs.values(), *{id(held): held for held in generation if held is not None}.values()]


def _table_rows(model: PreTrainedModel) -> int:
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"Expected a Transformers PreTrainedModel, got {type(model).__name__}. Unwrap the model first; merge "
            "adapters with merge_and_unload()."
        )
    table = _end(model, "get_input_embeddings")
    if hasattr(table, "base_layer"):
        raise ValueError(
            f"The embedding table of {type(model).__name__} has an adapter ({type(table).__name__}), whose rows would "
            "not follow. Merge the adapters into the model first."
        )
    if not isinstance(table, nn.Embedding):
        raise ValueError(
            f"{type(model).__name__} has no embedding table for tokens, as its get_input_embeddings() gives "
            f"{'none' if table is None else type(table).__name__}, so there is no vocabulary to prune. Prune another structure; "
            "where a part of the model reads texts, prune the vocabulary of that part by itself."
        )
    return table.weight.shape[0]


def _end(model: PreTrainedModel, name: str) -> Any:
    """The result of `get_input_embeddings` or `get_output_embeddings`, `None` where a model has none."""
    try:
        return getattr(model, name)()
    except (AttributeError, NotImplementedError):
        return None


def _nested(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    yield config
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig):
            yield from _nested(value)


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _change_config_(config: Any, rows: int, kept: int, renumber: Callable[[int], int]) -> None:
    """Writes new ids, and `kept` in the place of `rows`, into a configuration."""
    for name, value in renumbered_fields(vars(config), renumber).items():
        setattr(config, name, value)
    if getattr(config, "vocab_size", None) == rows:
        config.vocab_size = kept


def _empty_shapes(model: PreTrainedModel, config: PretrainedConfig) -> dict[str, torch.Size]:
    """The shapes of all tensors of a new model of this class; none of them takes memory."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return {name: tensor.shape for name, tensor in _named_tensors(type(model)(copy.deepcopy(config)))}
    except Exception as error:  # a class of any author, which may fail in any way
        raise ValueError(
            f"{type(model).__name__} cannot be built from its configuration with {config.vocab_size} tokens ({error}), "
            "so the pruned model could not be loaded. Prune the vocabulary of a model that from_pretrained gives."
        ) from error


ID_SUFFIXES = ("_token_id", "_token_ids", "_token_index")
ID_LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids")
ID_TABLES = ("lang_to_id", "task_to_id")


def renumbered_fields(fields: dict[str, Any], renumber: Callable[[int], int]) -> dict[str, Any]:
    """Those of the `fields` of a configuration that hold ids, with `renumber` applied to each."""
    changed: dict[str, Any] = {}
    for name, value in fields.items():
        if value is None or name.startswith("_"):
            continue
        if name.endswith(ID_SUFFIXES) or name in ID_LISTS:
            changed[name] = renumbered(value, renumber)
        elif name in ID_TABLES:
            changed[name] = {key: renumbered(id_, renumber) for key, id_ in value.items()}
        elif name == "forced_decoder_ids":  # pairs of a place and an id
            changed[name] = [[place, renumbered(id_, renumber)] for place, id_ in value]
        elif name == "sequence_bias":
            pairs = value.items() if isinstance(value, dict) else value
            new = [(renumbered(ids, renumber), bias) for ids, bias in pairs]
            changed[name] = {tuple(k): bias for k, bias in new} if isinstance(value, dict) else list(map(list, new))
    return changed


def renumbered(value: Any, renumber: Callable[[int], int]) -> Any:
    """`value` with every id in it replaced, in lists of any depth; what is no id stays."""
    if isinstance(value, (list, tuple)):
        return type(value)(renumbered(item, renumber) for item in value)
    return renumber(value) if isinstance(value, int) and not isinstance(value, bool) else value
