# SPDX-License-Identifier: Apache-2.0
"""The stacks of layers of a model, encoder-decoders included, with the fields of the configuration that count them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from dataclasses import field as data_field
from functools import reduce
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..schema import brief
from .numbering import PerLayer
from .own_modules import config_name
from .probing import Shapes, build_shapes, config_with, nested_configs
from .units import NoStructure

DEPTH_FIELDS = ("num_layers", "encoder_layers", "num_decoder_layers", "decoder_layers", "num_hidden_layers", "depth")
"""Configuration fields that hold a number of layers; an alias of another one comes last."""

PER_LAYER_FIELDS = ("layer_types", "mlp_layer_types", "no_rope_layers", "attention_layers", "attention_window")
"""Lists with one entry per layer; others are found by what a model with one layer more needs."""

_LAYER_NUMBERS = (
    "mlp_only_layers", "moe_layers", "cross_attention_layers", "full_attn_idxs", "attn_layer_indices",
    "window_block_indices", "residual_block_indices", "global_attn_indexes", "hybrid_layer_ids", "fullatt_block_indexes",
)  # fmt: skip
"""Lists of numbers of layers, from 0."""

_FIRST_LAYERS = ("first_k_dense_replace",)
"""How many layers at the beginning are of another kind."""

_READ_AFTER = ("deepstack_visual_indexes",)
"""Lists of numbers of layers, from 0, whose outputs are read."""

_FEATURE_LAYERS = ("vision_feature_layer", "vision_feature_layers")
"""Beside the configuration of images: number, or numbers, of the hidden states that a text reads, negative from the end."""

_SAME_AS_ENCODER = "num_hidden_layers"
"""Which Transformers 4 keeps beside the number of the encoder's layers, and LED reads."""

_PERIOD = "global_attn_every_n_layers"


@dataclass(frozen=True)
class CountedStack:
    """A stack of layers: its dotted name, its modules, and the configuration field that holds their number.

    `beside` names tensors outside of the stack whose shape depends on that number, and `lists` the fields with an entry per
    layer. `heads` names lists of modules beside the stack with an entry per layer, as detectors have that predict after each of
    them. The name of a field in a configuration within another has dots: `"text_config.num_hidden_layers"`.
    """

    name: str
    layers: nn.ModuleList
    field: str
    beside: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    model: PreTrainedModel = data_field(repr=False, default=None)  # type: ignore[assignment]

    def __len__(self) -> int:
        return len(self.layers)

    def fields(self, kept: Sequence[int]) -> dict[str, Any]:
        """The fields of the configuration for the layers `kept`, by place from 0."""
        return _fields_of(self.model.config, self.field, len(self), kept, self.lists)

    def bound_to(self) -> list[int]:
        """Places of layers, from 0, that hold other tensors than a layer built at their place would, and so cannot go."""
        names = [frozenset(name for name, _ in layer.named_parameters()) for layer in self.layers]
        usual = max(names, key=lambda own: (names.count(own), own == names[-1]))
        return [place for place, own in enumerate(names) if own != usual and not self._can_go(place)]

    def _can_go(self, place: int) -> bool:
        kept = [other for other in range(len(self)) if other != place]
        whole = build_shapes(self.model, config_with(self.model.config))
        built = build_shapes(self.model, config_with(self.model.config, **self.fields(kept)))
        return renumbered(whole, dict.fromkeys((self.name, *self.heads), kept)).keys() == built.keys()

    def in_model(self, model: nn.Module) -> Any:
        """The same stack of another model of the class."""
        return model.get_submodule(self.name)

    def renumber_(self, model: nn.Module, built: nn.Module) -> None:
        """Gives the owner of the layers the numbers that one has that was built with as many: which is the last (D-FINE),
        which attend to all (Qwen2.5-VL)."""
        owner = self.name.rpartition(".")[0]
        own = vars(built.get_submodule(owner))
        vars(model.get_submodule(owner)).update({k: v for k, v in own.items() if type(v) in (int, list)})

    def is_sayable(self, kept: Sequence[int]) -> bool:
        """Whether plain `from_pretrained` could build the layers `kept`."""
        return not any(isinstance(value, PerLayer) for value in self.fields(kept).values())

    def choose(
        self, costs: Sequence[Sequence[float]], bound: Sequence[int] = (), plain: bool = True
    ) -> list[int] | None:
        """The layers of least cost, with all that are `bound`, that a configuration can say (`plain`); `None` if none.

        `costs[place][layer]` is what it costs that `layer` stands at `place`, of as many places as will be left.
        """
        count = len(costs)
        period = self._period() if plain else None
        patterns: list[list[bool] | None] = (
            [None] if period is None else [[p % n == 0 for p in range(count)] for n in range(1, count + 1)]
        )
        found: list[tuple[float, list[int]]] = []
        for pattern in patterns:
            best: list[tuple[float, list[int]]] = [(0.0, [])] * (len(self) + 1)  # of the layers before each
            for place, row in enumerate(costs):
                following: list[tuple[float, list[int]]] = [(math.inf, [])]
                for layer in range(len(self)):
                    total = best[layer][0] + row[layer] - 1e9 * (layer in bound)
                    fits = pattern is None or pattern[place] == (layer % (period or 1) == 0)
                    taken = (total, [*best[layer][1], layer]) if fits else (math.inf, [])
                    following.append(min(following[-1], taken, key=lambda entry: entry[0]))
                best = following
            if math.isfinite(best[-1][0]) and set(bound) <= set(best[-1][1]):
                found.append(best[-1])
        return min(found, key=lambda entry: entry[0])[1] if found else None

    def _period(self) -> Any:
        return _period_of(_owner(self.model.config, self.field)[1])


def renumbered(shapes: Shapes, kept_of: dict[str, list[int]]) -> Shapes:
    """`shapes` by the names that tensors have when of some stacks the layers `kept_of` are left."""
    found = {}
    for name, shape in shapes.items():
        new: str | None = name
        for stack, kept in kept_of.items():
            if name.startswith(f"{stack}."):
                place, dot, rest = name.removeprefix(f"{stack}.").partition(".")
                new = f"{stack}.{kept.index(int(place))}{dot}{rest}" if int(place) in kept else None
        if new is not None:
            found[new] = shape
    return found


def _tensors_of(shapes: Shapes, prefix: str) -> Shapes:
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def find_layer_stacks(model: PreTrainedModel, with_heads: bool = False) -> list[CountedStack]:
    """The stacks of layers whose number the configuration holds: one, or an encoder and a decoder.

    The tensors that a model with one layer more has are those of that layer, and tell where the stack is. Configurations
    within the configuration count as well, in the order of the modules: texts and images of CLIP, images and texts of LLaVA.
    Stacks whose layers have heads of their own, so that none can be bypassed, count `with_heads` alone (RT-DETR's decoder).

    Raises:
        ValueError: there is none.
    """
    stacks: dict[str, CountedStack] = {}
    reasons: list[str] = []
    for name, count in _counts(model.config):
        stack = _stack_of(model, name, count, reasons)
        if stack is not None and (with_heads or not stack.heads):
            stacks.setdefault(stack.name, stack)
    if not stacks:
        reason = f": no other number could be tried, {'; '.join(reasons)}," if reasons else ""
        raise NoStructure(
            f"{type(model).__name__} has no stack of layers that {config_name(model.config)} counts (as one of "
            f"{', '.join(DEPTH_FIELDS)}){reason} so whole layers cannot be removed."
        )
    order = list(dict(model.named_modules()))
    return sorted(stacks.values(), key=lambda stack: order.index(stack.name))


def find_layer_stack(model: PreTrainedModel) -> CountedStack:
    """The one stack of layers of an encoder or a decoder.

    Raises:
        ValueError: there is none, or several (an encoder-decoder), so that there is no one answer.
    """
    try:
        stacks = find_layer_stacks(model)
    except ValueError:
        stacks = []
    if len(stacks) != 1:
        count = getattr(model.config, "num_hidden_layers", None)
        found = ", ".join(stack.name for stack in stacks) or "none"
        raise ValueError(
            f"{type(model).__name__} should have one stack of {count} layers (config.num_hidden_layers); found: {found}. "
            "Encoders and decoders with a single stack are supported."
        )
    return stacks[0]


def evenly_spaced_layers(count: int, total: int) -> list[int]:
    """`count` of `total` layers, numbered from 1: `round(i * total / count)`, halves up, so the last is among them."""
    return [(2 * i * total + count) // (2 * count) for i in range(1, count + 1)]


def _counts(config: PretrainedConfig) -> Iterator[tuple[str, int]]:
    """Dotted names of the fields that count layers, with their values."""
    for prefix, inner in nested_configs(config):
        known = {*inner.to_dict(), *(getattr(inner, "attribute_map", None) or {})}
        for name in DEPTH_FIELDS:
            count = getattr(inner, name, None) if name in known else None
            if type(count) is int:
                yield prefix + name, count


def _owner(config: PretrainedConfig, name: str) -> tuple[str, PretrainedConfig]:
    """The configuration that holds a field, and what the names of its fields begin with."""
    *path, _ = name.split(".")
    return "".join(f"{part}." for part in path), reduce(getattr, path, config)


def _period_of(config: PretrainedConfig) -> Any:
    """Every how many layers one is of another kind, where the configuration has no list instead."""
    return None if "layer_types" in vars(config) else vars(config).get(_PERIOD)


def read_periods_(config: PretrainedConfig) -> bool:
    """Gives what was written in place of a period its meaning again; whether there was any."""
    written = vars(config).get(_PERIOD)
    if isinstance(written, list):
        setattr(config, _PERIOD, PerLayer(written))
    return isinstance(written, list)


def _fields_of(
    config: PretrainedConfig, name: str, count: int, kept: Sequence[int], lists: Sequence[str]
) -> dict[str, Any]:
    """The fields of `config` for the layers `kept` of the `count` that the field `name` counts; layers may come twice."""
    prefix, owner = _owner(config, name)
    held = vars(owner)
    fields: dict[str, Any] = {key: type(held[key])(held[key][place] for place in kept) for key in lists}
    if "attention_layers" in fields and "attention_types" in held:
        fields["attention_types"] = [[fields["attention_layers"], 1]]
    for key in _LAYER_NUMBERS:
        if isinstance(held.get(key), (list, tuple)):
            fields[key] = [place for place, layer in enumerate(kept) if layer in held[key]]
    for key in _READ_AFTER:
        if isinstance(held.get(key), (list, tuple)):
            fields[key] = [sum(layer <= read for layer in kept) - 1 for read in held[key]]
    step = held.get("decoder_sparse_step", 1)
    if type(step) is int and step > 1 and "mlp_only_layers" in fields:
        sparse = [layer not in held["mlp_only_layers"] and (layer + 1) % step == 0 for layer in kept]
        fields |= {"mlp_only_layers": [i for i, own in enumerate(sparse) if not own], "decoder_sparse_step": 1}
    for key in _FIRST_LAYERS:
        if type(held.get(key)) is int:
            fields[key] = sum(layer < held[key] for layer in kept)
    period = _period_of(owner)
    if period is not None:
        rests = [layer % period for layer in kept]
        tried = [*([period] if type(period) is int else []), *range(1, len(kept) + 1)]
        fits = [n for n in tried if all((p % n == 0) == (rest == 0) for p, rest in enumerate(rests))]
        fields[_PERIOD] = fits[0] if fits else PerLayer(rests)
    stages = held.get("stage_names")
    if isinstance(stages, list) and len(stages) == count + 1:  # what comes out of a backbone, and after which layer
        after = [sum(layer < index % (count + 1) for layer in kept) for index in held.get("_out_indices") or ()]
        names = [stages[0], *(f"stage{i}" for i in range(1, len(kept) + 1))]
        chosen = list(dict.fromkeys(after))
        fields |= {"stage_names": names, "_out_indices": chosen, "_out_features": [names[i] for i in chosen]}
    above: dict[str, Any] = {}
    if prefix.endswith("vision_config."):
        outer, beside = _owner(config, prefix[:-1])
        for key in _FEATURE_LAYERS:
            read = vars(beside).get(key)
            if read is not None:
                indices = [read] if isinstance(read, int) else read
                after = [sum(layer < index % (count + 1) for layer in kept) for index in indices]
                new = [n - (len(kept) + 1 if index < 0 else 0) for n, index in zip(after, indices, strict=True)]
                above[outer + key] = new[0] if isinstance(read, int) else new
    if name == f"{prefix}encoder_layers" and held.get(_SAME_AS_ENCODER) == count:
        fields[_SAME_AS_ENCODER] = len(kept)
    return {name: len(kept), **{prefix + key: value for key, value in fields.items()}, **above}


def _one_more(model: PreTrainedModel, name: str, count: int) -> tuple[Shapes, Shapes, list[str]]:
    """The shapes of a model, those with one layer more, and the lists of the configuration that grow along. Raises
    `NoStructure`: the class cannot be made from such a configuration."""
    prefix, owner = _owner(model.config, name)
    held = vars(owner)
    lists = [key for key, value in held.items() if isinstance(value, (list, tuple)) and len(value) == count]
    lists = [key for key in lists if key not in (*_LAYER_NUMBERS, *_READ_AFTER)]

    def made(number: int, **fields: Any) -> Shapes:
        try:
            return build_shapes(model, config_with(model.config, **fields))
        except Exception as error:  # whatever a class raises for a configuration that it cannot be made from
            raise NoStructure(f"{name}={number}: {brief(error)}") from error

    def longer(keys: list[str]) -> Shapes:
        return made(count + 1, **_fields_of(model.config, name, count, [*range(count), count - 1], keys))

    def grows_alone(key: str) -> bool:
        """Whether the list counts layers of its own, and is as long as this stack by chance."""
        try:
            return made(count, **{prefix + key: type(held[key])([*held[key], held[key][-1]])}) != before
        except NoStructure:  # it has to be as long as the field says
            return False

    def is_needed(key: str) -> bool:
        try:
            return longer([other for other in lists if other != key]) != after
        except NoStructure:
            return True

    try:
        after = longer(lists)
    except NoStructure:  # lists of the encoder may be as long as the decoder by chance (LED)
        if not lists:
            raise
        lists, after = [], longer([])
    before = made(count, **{name: count})
    chance = [key for key in lists if key not in PER_LAYER_FIELDS and grows_alone(key)]
    if chance:
        lists = [key for key in lists if key not in chance]
        after = longer(lists)
    return before, after, [key for key in lists if key in PER_LAYER_FIELDS or is_needed(key)]


def _stack_of(model: PreTrainedModel, name: str, count: int, reasons: list[str]) -> CountedStack | None:
    """The list that grows by one layer when the field `name` does."""
    try:
        before, after, lists = _one_more(model, name, count)
    except NoStructure as error:
        reasons.append(str(error))
        return None
    added = after.keys() - before.keys()  # of that layer alone: one more stage changes others too
    marker = f".{count}."
    grown = Counter(key.partition(marker)[0] for key in added if marker in key)
    if sum(grown.values()) != len(added) or before.keys() - after.keys():
        return None
    modules = dict(model.named_modules(remove_duplicate=False))
    for where in grown:
        if not isinstance(modules.get(where), nn.ModuleList) or len(modules[where]) != count:
            return None
        # A stage of another width than any before is no layer among its like; the first layer may hold what serves all (T5).
        like = _tensors_of(after, f"{where}{marker}").items()
        others = [_tensors_of(before, f"{where}.{place}.").items() for place in range(count)]
        if not any(like <= other or other <= like for other in others):
            return None
    (where, most), *heads = grown.most_common() or [("", 0)]
    if not where or any(size == most for _, size in heads):
        return None
    beside = tuple(tensor for tensor, shape in before.items() if after[tensor] != shape)
    return CountedStack(where, modules[where], name, beside, tuple(lists), tuple(head for head, _ in heads), model)
