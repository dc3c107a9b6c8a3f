# SPDX-License-Identifier: Apache-2.0
"""Targets of pruning: units of a model that are ranked among themselves, and the tensors that belong to each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..facts import read_facts
from ..modeling.bypass import bypass_
from ..modeling.channels import find_channels
from ..modeling.forwards import body_of
from ..modeling.heads import find_heads
from ..modeling.hidden_width import find_hidden, norms_of
from ..modeling.layers import CountedStack, find_layer_stacks
from ..modeling.neurons import find_neurons
from ..modeling.own_modules import as_pretrained_
from ..modeling.units import CONVOLUTIONS, UnitGroup
from ..specs import PruningSpec, module_matches, unmatched
from ..specs.quantization import expert_weights, outputs_last
from .masked_norms import mask_norm_

WEIGHTED = (nn.Linear, Conv1D, *CONVOLUTIONS)
VOCABULARY_NEEDS_NO_TRAINING = (
    "structure='vocab' needs a tokenizer and a corpus and no training: prune(model, spec, corpus, "
    "processing_class=tokenizer), before the trainer is made."
)
_OF_PARAMETERS = {"XLNetRelativeAttention": {"q": (1, 2), "k": (1, 2), "v": (1, 2), "r": (1, 2), "o": (0,)}}
"""By class, the parameters of modules that multiply with them themselves, and which of their axes are outputs."""
_OF_WEIGHTS = ("weight", "n:m", "block")


@dataclass(frozen=True)
class Part:
    """A tensor of a module, as part of a target: its names, and whether it computes or reads the units."""

    name: str
    module: nn.Module
    tensor: str
    role: str

    @property
    def values(self) -> Tensor:
        return getattr(self.module, self.tensor)


Measure = Callable[[Part], Tensor | None]
"""From a part to one number for each of its entries, in its shape; `None` if the part does not count."""


@dataclass(frozen=True)
class GroupTarget:
    """Neurons, heads or channels of one block, or the hidden width of a model with its norms."""

    group: UnitGroup
    norms: tuple[nn.Module, ...] = ()

    @property
    def name(self) -> str:
        return self.group.name

    @property
    def units(self) -> int:
        return self.group.units

    @property
    def parts(self) -> list[Part]:
        return [Part(s.name, s.module, s.tensor, s.role) for s in self.group.slices]

    def reduce(self, measure: Measure) -> Tensor:
        """The sum of `measure` over the entries of each unit; float32 of shape `(units,)`."""
        total = torch.zeros(self.units, device=self.parts[0].values.device)
        for part, entry in zip(self.parts, self.group.slices, strict=True):
            values = measure(part)
            if values is not None:
                total = total + entry.sums(values.float()).to(total.device)
        return total

    def entries(self, pruned: Tensor) -> Iterator[tuple[Part, Tensor]]:
        """For every part a bool tensor that broadcasts over it: the entries of the units in the bool mask `pruned`."""
        for part, entry in zip(self.parts, self.group.slices, strict=True):
            yield part, entry.entries(pruned)

    def apply_(self, pruned: Tensor) -> None:
        """Takes the units out of what the model computes, in the shapes that it has."""
        zero_(self, pruned)
        for norm in self.norms:
            mask_norm_(norm, pruned)


def weights_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The weights of a module by name, and which of their axes are outputs; those of all experts have one for the expert.
    Empty for modules that multiply with none."""
    if isinstance(module, WEIGHTED):
        return {"weight": (1,) if isinstance(module, Conv1D) else (0,)}
    experts: dict[str, tuple[int, ...]]
    experts = {name: (0, 2) if outputs_last(module, name) else (0, 1) for name in expert_weights(module)}
    return experts or _OF_PARAMETERS.get(type(module).__name__, {})


@dataclass(frozen=True)
class WeightTarget:
    """The weights of one tensor of a module, single or in blocks of rows and columns."""

    name: str
    module: nn.Module
    block: tuple[int, int] = (1, 1)
    tensor: str = "weight"

    @property
    def outputs(self) -> tuple[int, ...]:
        """The axes of the tensor that are outputs."""
        return weights_of(self.module)[self.tensor]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of blocks: outputs by inputs, with the window of a convolution among the inputs."""
        rows, columns = self._matrix(self.parts[0].values).shape
        return -(-rows // self.block[0]), -(-columns // self.block[1])

    @property
    def units(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def parts(self) -> list[Part]:
        return [Part(self.name, self.module, self.tensor, "input" if isinstance(self.module, WEIGHTED) else "other")]

    def _order(self, values: Tensor) -> list[int]:
        """The axes of the tensor, outputs first."""
        return sorted(range(values.dim()), key=lambda dim: dim not in self.outputs)

    def _matrix(self, values: Tensor) -> Tensor:
        return values.permute(self._order(values)).flatten(len(self.outputs)).flatten(0, -2)

    def reduce(self, measure: Measure) -> Tensor:
        values = measure(self.parts[0])
        matrix = self._matrix(torch.zeros_like(self.parts[0].values) if values is None else values.float())
        if self.block == (1, 1):
            return matrix.flatten()
        rows, columns = self.block
        matrix = nn.functional.pad(matrix, (0, -matrix.shape[1] % columns, 0, -matrix.shape[0] % rows))
        blocks = matrix.reshape(matrix.shape[0] // rows, rows, matrix.shape[1] // columns, columns)
        return blocks.sum(dim=(1, 3)).flatten()

    def entries(self, pruned: Tensor) -> Iterator[tuple[Part, Tensor]]:
        weight = self.parts[0].values
        matrix = self._matrix(weight)
        mask = pruned.view(self.shape)
        if self.block != (1, 1):
            mask = mask.repeat_interleave(self.block[0], 0).repeat_interleave(self.block[1], 1)
            mask = mask[: matrix.shape[0], : matrix.shape[1]]
        order = self._order(weight)
        mask = mask.reshape([weight.shape[dim] for dim in order])
        yield self.parts[0], mask.permute([order.index(dim) for dim in range(weight.dim())])

    def apply_(self, pruned: Tensor) -> None:
        zero_(self, pruned)


@dataclass(frozen=True)
class LayerTarget:
    """The layers of one stack. One that is pruned returns its input unchanged."""

    stack: CountedStack
    protected: tuple[int, ...] = ()
    plain: bool = True

    def best(self, scores: Sequence[float], count: int) -> list[int] | None:
        """The `count` layers of the largest scores that can be left; `None` if no such layers can."""
        return self.stack.choose([[-score for score in scores]] * count, self.protected, self.plain)

    @property
    def name(self) -> str:
        return self.stack.name

    @property
    def units(self) -> int:
        return len(self.stack)

    @property
    def parts(self) -> list[Part]:
        return [part for layer in self.layers for part in layer]

    @property
    def layers(self) -> list[list[Part]]:
        named = (layer.named_modules(prefix=f"{self.name}.{place}") for place, layer in enumerate(self.stack.layers))
        return [
            [Part(n, m, t, "other") for n, m in each for t, _ in m.named_parameters(recurse=False)] for each in named
        ]

    def reduce(self, measure: Measure) -> Tensor:
        total = torch.zeros(self.units, device=self.parts[0].values.device)
        for i, layer in enumerate(self.layers):
            for part in layer:
                values = measure(part)
                if values is not None:
                    total[i] += values.float().sum().to(total.device)
        return total

    def entries(self, pruned: Tensor) -> Iterator[tuple[Part, Tensor]]:
        return iter(())  # the parameters of a bypassed layer stay

    def apply_(self, pruned: Tensor) -> None:
        for layer, gone in zip(self.stack.layers, pruned.tolist(), strict=True):
            bypass_(layer, gone)


PruningTarget = GroupTarget | WeightTarget | LayerTarget
"""Units that are ranked among themselves; `GroupTarget` says what the methods of all of them do."""


def is_zero(target: PruningTarget) -> Tensor:
    """Which units have no entry but zeros, a bool tensor of shape `(units,)`."""
    return target.reduce(lambda part: part.values.detach().abs()) == 0


@torch.no_grad()
def zero_(target: PruningTarget, pruned: Tensor) -> None:
    """Zeroes all entries of the pruned units."""
    for part, mask in target.entries(pruned):
        part.values.masked_fill_(mask, 0.0)


def find_targets(model: PreTrainedModel, spec: PruningSpec) -> list[PruningTarget]:
    """The targets of `spec` in `model`, at least one; changes nothing. Raises `TypeError`: `model` is no
    `PreTrainedModel`. Raises `ValueError`: nothing matches, the architecture lacks the structure, layers share their
    weights, or a weight is not a plain floating-point tensor."""
    if not isinstance(as_pretrained_(model), PreTrainedModel):
        raise TypeError(
            f"Pruning needs a Transformers PreTrainedModel, got {type(model).__name__}. "
            "Merge adapters with merge_and_unload() before pruning."
        )
    targets: list[PruningTarget]
    if spec.structure == "vocab":
        raise ValueError(VOCABULARY_NEEDS_NO_TRAINING)
    if read_facts(model).get("sharing") and (spec.criterion == "activation" or spec.structure not in _OF_WEIGHTS):
        raise ValueError(
            f"Layers of {type(model).__name__} share their weights, so structure={spec.structure!r} by criterion="
            f"{spec.criterion!r} cannot choose for each of them. Prune first and share_layers afterwards, or call "
            "unshare_layers_(model) before."
        )
    if spec.structure == "layer":
        stacks = find_layer_stacks(model, with_heads=True)
        alone = [stack for stack in stacks if not stack.heads]
        if len(alone) < len(stacks) and all(len(stack) == 1 for stack in alone):
            raise ValueError(
                f"Heads of {type(model).__name__} predict after each layer of {stacks[-1].name}, so no layer can be bypassed. "
                "make_student(teacher, num_decoder_layers=...) copies some of the layers with their heads."
            )
        targets = [LayerTarget(stack, tuple(stack.bound_to()), spec.plain_checkpoint) for stack in alone]
    elif spec.structure == "hidden":
        group = find_hidden(model)
        targets = [GroupTarget(group, tuple(module for _, module in norms_of(group)))]
    elif spec.structure in ("neuron", "head", "channel"):
        # Packed weights, before their tensors are looked up by name, which those of quantized models do not have.
        for name, module in model.named_modules():
            if isinstance(module, WEIGHTED):
                _check_prunable(Part(name, module, "weight", "input"))
        finders: dict[str, Callable[[PreTrainedModel], list[UnitGroup]]] = {
            "neuron": find_neurons,
            "head": find_heads,
            "channel": partial(find_channels, everywhere=spec.target_modules is not None),
        }
        targets = [GroupTarget(group) for group in _matching(model, spec, finders[spec.structure](model))]
    else:
        found = [
            WeightTarget(name, module, spec.block, tensor)
            for name, module in _matching_modules(model, spec)
            for tensor in weights_of(module)
        ]
        first = {id(target.parts[0].values): target for target in reversed(found)}  # of those that share a weight
        targets = [target for target in found if first[id(target.parts[0].values)] is target]
    for target in targets:
        for part in target.parts:
            _check_prunable(part)
    return targets


def _matching(model: PreTrainedModel, spec: PruningSpec, groups: list[UnitGroup]) -> list[UnitGroup]:
    """The groups in modules that the patterns of the spec name, by their own name or that of one of their layers."""

    def named(group: UnitGroup, patterns: object) -> bool:
        return any(module_matches(name, patterns) for name in group.names)  # type: ignore[arg-type]

    chosen = [g for g in groups if spec.target_modules is None or named(g, spec.target_modules)]
    _check_excluded(model, spec, [name for group in groups for name in group.names])
    chosen = [g for g in chosen if not named(g, spec.exclude_modules)]
    if not chosen:
        raise _nothing_matches(model, spec, [group.name for group in groups])
    return chosen


def _matching_modules(model: PreTrainedModel, spec: PruningSpec) -> list[tuple[str, nn.Module]]:
    modules = [(name, module) for name, module in model.named_modules() if weights_of(module)]
    if spec.target_modules is None:
        try:
            prefixes = tuple(f"{stack.name}." for stack in find_layer_stacks(model))
        except ValueError:  # a network of convolutions: its body
            body, _ = body_of(model)
            prefixes = (f"{body}." if body else "",)
        chosen = [(name, module) for name, module in modules if name.startswith(prefixes)]
    else:
        chosen = [(name, module) for name, module in modules if module_matches(name, spec.target_modules)]
    _check_excluded(model, spec, [name for name, _ in modules])
    matching = [(name, module) for name, module in chosen if not module_matches(name, spec.exclude_modules)]
    unseen = [name for name, module in matching if spec.criterion == "activation" and not isinstance(module, WEIGHTED)]
    if unseen and spec.target_modules is not None:
        raise ValueError(
            f"{unseen[0]} has its weights in parameters of its own, so that what comes to them is not seen. Leave it out with "
            "exclude_modules, or use criterion='magnitude', 'taylor' or 'fisher'."
        )
    matching = [(name, module) for name, module in matching if name not in unseen]
    if not matching:
        raise _nothing_matches(model, spec, [name for name, _ in (chosen or modules)])
    return matching


def _check_excluded(model: PreTrainedModel, spec: PruningSpec, names: list[str]) -> None:
    """Refuses patterns to exclude that mean nothing, as a misspelt one does."""
    lost = unmatched(spec.exclude_modules, names)
    if lost:
        raise ValueError(
            f"exclude_modules: nothing in {type(model).__name__} that can be pruned (structure={spec.structure!r}) matches "
            f"{', '.join(map(repr, lost))}. Names are, for example: {', '.join(names[:3]) or 'none'}."
        )


def _nothing_matches(model: PreTrainedModel, spec: PruningSpec, names: list[str]) -> ValueError:
    kind = "layer" if spec.structure in _OF_WEIGHTS else f"group of units ({spec.structure})"
    return ValueError(
        f"PruningSpec(target_modules={spec.target_modules!r}, exclude_modules={spec.exclude_modules!r}) matches no {kind} of "
        f"{type(model).__name__}. Those of it are, for example: {', '.join(names[:3]) or 'none'}."
    )


def _check_prunable(part: Part) -> None:
    values = part.values
    if isinstance(part.module, nn.Linear):
        expected: tuple[int, ...] = (part.module.out_features, part.module.in_features)
    else:
        expected = tuple(values.shape)
    wrong = part.tensor == "weight" and tuple(values.shape) != expected
    if not values.is_floating_point() or wrong:
        raise ValueError(
            f"The {part.tensor} of {part.name} ({type(part.module).__name__}) is {values.dtype} of shape "
            f"{tuple(values.shape)}; pruning needs floating point of shape {expected}. Load the model without "
            "quantization_config, and train it with DDP rather than with sharded weights."
        )
