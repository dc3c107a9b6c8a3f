# SPDX-License-Identifier: Apache-2.0
"""Progress of the pruning in a training: masks, importance statistics, and a snapshot of the last good round."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from ..facts import record_fact
from ..specs import PruningSpec
from .criteria import DECAY, ImportanceStatistics
from .masks import Masks
from .targets import LayerTarget, PruningTarget, is_zero

UNFINISHED = "unfinished_pruning"
"""Fact in checkpoints whose weights alone are another model: bypassed layers and masked norms are no weights."""

_LEFT = 0.01
_SHARE = 0.1


class Progress:
    """The state of one pruning in one training. It lies in the optimizer's state under a name of its own, which
    PyTorch saves and loads as it is."""

    def __init__(
        self, model: PreTrainedModel, targets: Sequence[PruningTarget], spec: PruningSpec, parameters_before: int
    ) -> None:
        self.model = model
        self.spec = spec
        self.parameters_before = parameters_before
        self.importance = ImportanceStatistics(targets, spec, decay=DECAY, while_training=True)
        self.masks = Masks(targets, spec, self.importance)
        self.settled = False
        self.last_good: dict[str, Tensor] | None = None
        self._key = f"hfkdq.pruning {json.dumps(spec.to_dict(), sort_keys=True)}"
        self._store: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        self._entries: dict[tuple[int, int], Tensor] = {}

    def begin(self, optimizer: Optimizer | None) -> None:
        """Starts to follow the training: gradients of what is pruned are zero from here on."""
        self._save()
        if optimizer is not None:
            optimizer.state[self._key] = self._store  # type: ignore[index]
        for key, values in self._mask_entries().items():
            if values.requires_grad:
                self._handles.append(values.register_hook(partial(self._without_pruned, key)))
        if self.importance.needs_activations:
            self.importance.watch()
        if self.spec.cut != "decay" and any(bool(mask.any()) for mask in self.masks.pruned):
            self.masks.apply_()

    def _mask_entries(self) -> dict[tuple[int, int], Tensor]:
        """Renews the masks over whole tensors, and gives the tensors."""
        tensors = {}
        for i, (target, pruned) in enumerate(zip(self.masks.targets, self.masks.pruned, strict=True)):
            for place, (part, mask) in enumerate(target.entries(pruned)):
                self._entries[i, place] = mask
                tensors[i, place] = part.values
        return tensors

    def _without_pruned(self, key: tuple[int, int], gradient: Tensor) -> Tensor:
        return gradient.masked_fill(self._entries[key], 0.0)

    def end(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.importance.unwatch()

    def resume(self, optimizer: Optimizer | None, sparsity: float) -> None:
        """Restores the state that the optimizer has loaded; without one of this spec, zeros count as pruned."""
        stored = None if optimizer is None else optimizer.state.get(self._key)  # type: ignore[call-overload]
        if stored is None:
            for mask, target in zip(self.masks.pruned, self.masks.targets, strict=True) if sparsity > 0.0 else ():
                if not isinstance(target, LayerTarget):
                    mask.copy_(is_zero(target))
            return
        for i, mask in enumerate(self.masks.pruned):
            mask.copy_(stored[f"mask.{i}"])
        self.importance.restore(stored)
        self.masks.sparsity = float(stored["sparsity"])
        self.settled = bool(stored["settled"])
        good = {name.removeprefix("good."): tensor for name, tensor in stored.items() if name.startswith("good.")}
        self.last_good = good or None

    def _save(self) -> None:
        self._store.clear()
        self._store.update({f"mask.{i}": mask for i, mask in enumerate(self.masks.pruned)})
        self._store.update(self.importance.tensors_by_name())
        self._store["sparsity"] = torch.tensor(self.masks.sparsity, dtype=torch.float64)
        self._store["settled"] = torch.tensor(self.settled)
        self._store.update({f"good.{name}": tensor for name, tensor in (self.last_good or {}).items()})

    def follow_shapes(self) -> None:
        """Takes what is zero as pruned where another pruning has removed units since, which the masks do not know of."""
        targets, masks = self.masks.targets, self.masks.pruned
        if all(len(mask) == target.units for mask, target in zip(masks, targets, strict=True)):
            return
        self.masks.pruned = [is_zero(target) for target in targets]
        # What was seen of gradients and activations is of the former shapes.
        self.settled = self.settled or self.spec.criterion not in ("magnitude", "random")

    def observe_gradients(self) -> None:
        """Takes what the gradients of this step say, while there is still something to decide."""
        if self.masks.sparsity < (self.spec.sparsity or 0.0) and not self.settled:
            self.importance.observe_gradients()
            self._save()

    def grow_to(self, sparsity: float) -> bool:
        """Prunes up to `sparsity`; `False` if nothing is known of some units yet."""
        self.importance.share_between_processes()
        if not self.importance.is_complete():
            return False
        self.masks.grow_to(sparsity)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for mask in self.masks.pruned:  # equal scores may be ranked differently on different devices
                as_bytes = mask.to(torch.uint8)
                torch.distributed.broadcast(as_bytes, 0)
                mask.copy_(as_bytes.bool())
        self._mask_entries()
        self._save()
        if self.spec.structure in ("layer", "hidden"):
            record_fact(self.model, UNFINISHED, {"structure": self.spec.structure, "sparsity": self.masks.sparsity})
        return True

    def apply(self, steps: float) -> None:
        """Takes what is pruned out of the model, after an optimizer step; `steps` is the length of the pruning."""
        final = self.masks.sparsity >= (self.spec.sparsity or 0.0) or self.settled
        fading = self.spec.cut == "decay" and not final
        self.masks.apply_(fade=_LEFT ** (1.0 / max(1.0, _SHARE * steps)) if fading else 0.0)
        if self.importance.needs_activations:
            self._save()

    def snapshot(self) -> None:
        """Keeps a copy of the model as it is, for `rollback`."""
        good = {name: tensor.detach().cpu().clone() for name, tensor in self.model.state_dict().items()}
        self.last_good = {f"model.{name}": tensor for name, tensor in good.items()}
        self.last_good.update({f"mask.{i}": mask.cpu().clone() for i, mask in enumerate(self.masks.pruned)})
        self.last_good["sparsity"] = torch.tensor(self.masks.sparsity, dtype=torch.float64)
        self._save()

    def rollback(self) -> None:
        """Restores the last `snapshot`, for good."""
        good = self.last_good or {}
        weights = {name.removeprefix("model."): t for name, t in good.items() if name.startswith("model.")}
        self.masks.lift_()
        self.model.load_state_dict(weights, strict=False)
        for i, mask in enumerate(self.masks.pruned):
            mask.copy_(good[f"mask.{i}"])
        self.masks.sparsity = float(good["sparsity"])
        self.masks.apply_()
        self._mask_entries()
        self.settled = True
        self._save()
