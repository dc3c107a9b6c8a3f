# SPDX-License-Identifier: Apache-2.0
"""Importance of each unit: from the weights, or from statistics collected while the model runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..specs import PruningSpec
from .targets import GroupTarget, LayerTarget, Part, PruningTarget

FROM_GRADIENTS = ("taylor", "fisher", "movement", "teacher")
"""Criteria that read gradients."""

DECAY = 0.99
"""Share of the statistics that stays in an optimizer step, so that they follow the weights as they change."""


class ImportanceStatistics:
    """Importance statistics of every target: gradients times weights, norms and means of activations. `tensors` holds
    them in float32, by names that begin with the index of the target. Values that are not finite are left out, and
    their name goes into `not_finite`. Every position counts, padding too. `decay` is the share of former values that
    stays when new ones come (all count alike without it); `while_training` ignores activations in eval mode."""

    def __init__(
        self, targets: Sequence[PruningTarget], spec: PruningSpec, decay: float | None = None,
        while_training: bool = False,
    ) -> None:  # fmt: skip
        self.targets = list(targets)
        self.spec = spec
        self.decay = None if spec.criterion == "movement" else decay
        self.while_training = while_training
        self.tensors: dict[str, Tensor] = {}
        self.not_finite: set[str] = set()
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    @property
    def needs_gradients(self) -> bool:
        return self.spec.criterion in FROM_GRADIENTS

    @property
    def needs_activations(self) -> bool:
        return self.spec.criterion == "activation" or self.spec.cut == "mean"

    def tensors_by_name(self) -> dict[str, Tensor]:
        return {f"evidence.{name}": tensor for name, tensor in self.tensors.items()}

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Restores the tensors of `tensors_by_name`; other entries are ignored."""
        device = self.targets[0].parts[0].values.device
        for name, tensor in saved.items():
            if name.startswith("evidence."):
                place = torch.device("cpu") if name.endswith(".count") else device
                self.tensors[name.removeprefix("evidence.")] = tensor.to(place)

    def share_between_processes(self) -> None:
        """Averages statistics of activations over the processes of a data-parallel run; gradients are shared already."""
        if not (self.needs_activations and torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        processes = torch.distributed.get_world_size()
        for name in sorted(self.tensors):
            if ".gradient" not in name:
                where = self.targets[0].parts[0].values.device
                total = self.tensors[name].to(where)
                torch.distributed.all_reduce(total)
                self.tensors[name] = (total / processes).to(self.tensors[name].device)

    def _add(self, name: str, value: Tensor, weight: float = 1.0) -> None:
        """Adds to a mean (or, for movement, a sum): numerator and denominator decay alike."""
        value = value.detach().float()
        if not bool(value.isfinite().all()):
            self.not_finite.add(name)
            return  # an overflow of mixed precision; the optimizer skips that step too
        keep = 1.0 if self.decay is None else self.decay
        if name not in self.tensors:
            self.tensors[name] = torch.zeros_like(value)
            self.tensors[f"{name}.count"] = torch.zeros((), dtype=torch.float64)
        self.tensors[name].mul_(keep).add_(value)
        self.tensors[f"{name}.count"].mul_(keep).add_(weight)

    def _mean(self, name: str) -> Tensor:
        return self.tensors[name] / self.tensors[f"{name}.count"].to(self.tensors[name].device, torch.float32)

    @torch.no_grad()
    def observe_gradients(self, gradients: Mapping[int, Tensor | None] | None = None) -> None:
        """Adds the gradients of a step: `.grad`, or `gradients` by the `id` of a parameter."""

        def gradient_of(part: Part) -> Tensor | None:
            return part.values.grad if gradients is None else gradients.get(id(part.values))

        def product(part: Part) -> Tensor | None:
            gradient = gradient_of(part)
            if gradient is None:
                return None
            value = part.values.float() * gradient.float()
            return value.square() if self.spec.criterion == "fisher" else value

        for i, target in enumerate(self.targets):
            layers = target.layers if isinstance(target, LayerTarget) else [target.parts]
            if not all(any(gradient_of(part) is not None for part in parts) for parts in layers):
                continue  # a layer without gradients would seem not to matter
            value = target.reduce(product)
            self._add(f"{i}.gradient", -value if self.spec.criterion == "movement" else value.abs())

    def watch(self) -> None:
        if self._handles:
            return
        for i, target in enumerate(self.targets):
            if isinstance(target, LayerTarget):
                for place, layer in enumerate(target.stack.layers):
                    self._handles.append(layer.register_forward_hook(self._layer_hook(i, place), with_kwargs=True))
                continue
            for name, module in {part.name: part.module for part in target.parts if part.role == "input"}.items():
                self._handles.append(module.register_forward_pre_hook(self._input_hook(i, name, module)))

    def unwatch(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Counts all alike, and activations of modules in eval mode too; then goes on as before."""
        watched, before = bool(self._handles), (self.decay, self.while_training)
        self.decay, self.while_training = None, False
        if self.needs_activations:
            self.watch()
        try:
            yield
        finally:
            self.decay, self.while_training = before
            if not watched:
                self.unwatch()

    def _input_hook(self, i: int, name: str, module: nn.Module):  # type: ignore[no-untyped-def]
        features = 1 if not isinstance(module, (nn.Linear, Conv1D)) else -1

        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if self.while_training and not module.training:
                return
            values = args[0].detach().float().transpose(features, -1).flatten(0, -2)  # (positions, features)
            if not len(values):
                return  # an expert that no token came to
            self._add(f"{i}.{name}.squares", values.square().sum(dim=0), len(values))
            if self.spec.cut == "mean":
                self._add(f"{i}.{name}.mean", values.sum(dim=0), len(values))

        return hook

    def _layer_hook(self, i: int, place: int):  # type: ignore[no-untyped-def]
        def hook(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: object) -> None:
            if self.while_training and not layer.training:
                return
            came = args[0] if args else kwargs["hidden_states"]
            made = output if isinstance(output, Tensor) else output[0]  # type: ignore[index]
            change = 1.0 - nn.functional.cosine_similarity(came.detach().float(), made.detach().float(), dim=-1)
            self._add(f"{i}.{place}.change", change.sum().reshape(1), change.numel())

        return hook

    def is_complete(self) -> bool:
        return not self.missing()

    def missing(self) -> dict[str, str]:
        """Statistics that are needed and missing: the name of the module by the name in `tensors`."""
        return {key: where for key, where in self._needed() if key not in self.tensors}

    def _needed(self) -> Iterator[tuple[str, str]]:
        for i, target in enumerate(self.targets):
            if self.needs_gradients:
                yield f"{i}.gradient", target.name
            if isinstance(target, LayerTarget):
                if self.needs_activations:
                    yield from ((f"{i}.{place}.change", f"{target.name}.{place}") for place in range(target.units))
                continue
            kinds = ["squares"] * (self.spec.criterion == "activation") + ["mean"] * (self.spec.cut == "mean")
            for part in target.parts if kinds else ():
                if part.role == "input":
                    yield from ((f"{i}.{part.name}.{kind}", part.name) for kind in kinds)

    def mean_input(self, i: int, name: str) -> Tensor | None:
        """Mean input of module `name` of target `i`, by feature; `None` before there is any."""
        return self._mean(f"{i}.{name}.mean") if f"{i}.{name}.mean" in self.tensors else None

    @torch.no_grad()
    def scores(self, i: int) -> Tensor:
        """Importance of each unit of target `i`, float32 of shape `(units,)`."""
        target, criterion = self.targets[i], self.spec.criterion
        if criterion == "magnitude":
            # Statistics of a norm, which are buffers, do not count.
            return target.reduce(
                lambda part: part.values.detach().float().square() if isinstance(part.values, nn.Parameter) else None
            ).sqrt()
        if criterion == "random":
            generator = torch.Generator().manual_seed(self.spec.seed * 100_003 + i)
            return torch.rand(target.units, generator=generator).to(target.parts[0].values.device)
        if criterion in FROM_GRADIENTS:
            return self._mean(f"{i}.gradient") if criterion != "movement" else self.tensors[f"{i}.gradient"]
        if isinstance(target, LayerTarget):
            return torch.cat([self._mean(f"{i}.{place}.change") for place in range(target.units)])
        return target.reduce(lambda part: self._wanda(i, part))

    def _wanda(self, i: int, part: Part) -> Tensor | None:
        if part.role != "input" or part.tensor != "weight":
            return None
        norms = self._mean(f"{i}.{part.name}.squares").sqrt()  # (features,)
        weight = part.values.detach().float().abs()
        if isinstance(part.module, Conv1D):
            return weight * norms.to(weight.device).unsqueeze(1)
        groups = int(getattr(part.module, "groups", 1))  # outputs of a grouped convolution read their group's inputs
        read = norms.to(weight.device).view(groups, -1).repeat_interleave(len(weight) // groups, dim=0)
        return weight * read.view(*weight.shape[:2], *[1] * (weight.dim() - 2))  # (outputs, inputs, window)


def check_trained(targets: Sequence[PruningTarget], spec: PruningSpec) -> None:
    """Refuses to learn from gradients that the training will not have. Raises `ValueError`: a criterion of the
    gradients in training, and a target, or a layer of one, that is frozen."""
    if spec.criterion not in FROM_GRADIENTS or spec.criterion == "teacher":
        return
    for target in targets:
        for parts in target.layers if isinstance(target, LayerTarget) else [target.parts]:
            if not any(part.values.requires_grad for part in parts):
                raise ValueError(
                    f"criterion={spec.criterion!r} learns from the gradients of the training, and {parts[0].name} has none: it is "
                    "frozen. Leave it out with exclude_modules, use criterion='magnitude', 'activation' or 'teacher', or "
                    "train it too."
                )


def check_criterion(targets: Sequence[PruningTarget], spec: PruningSpec) -> None:
    """Refuses means without a bias that could take them, and activations that no module of its own reads. Raises
    `ValueError`: `cut="mean"`, and a module that reads units has no bias, or is a convolution;
    `criterion="activation"` or `cut="mean"`, and the units are neurons of experts in one tensor."""
    for target in targets if spec.criterion == "activation" or spec.cut == "mean" else ():
        if isinstance(target, GroupTarget) and target.group.field and not target.group.of_role("input"):
            raise ValueError(
                f"{target.name} holds all experts in one tensor, so that what their neurons give is not seen. Use "
                "criterion='magnitude', 'taylor' or 'fisher' and another cut than 'mean' for this model."
            )
    for target in targets if spec.cut == "mean" else ():
        for entry in target.group.of_role("input") if isinstance(target, GroupTarget) else ():
            if getattr(entry.module, "bias", None) is None or not isinstance(entry.module, (nn.Linear, Conv1D)):
                raise ValueError(
                    f"{entry.name} is no linear layer with a bias that could take the mean of what is cut. Use cut='remove' for this model."
                )
