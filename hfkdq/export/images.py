# SPDX-License-Identifier: Apache-2.0
"""Images that a model takes apart, one by one, and puts together again, which a file would do with as many as were traced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..modeling.forwards import hooked

_TAKEN_APART = {"LlavaModel": "multi_modal_projector"}
"""By class, the module whose output, (images, tokens, channels), becomes a list and then (images * tokens, channels)."""


@contextmanager
def images_together(model: nn.Module) -> Iterator[None]:
    """Leaves the images in one tensor while it lasts."""
    names = [(module, _TAKEN_APART.get(type(module).__name__)) for module in model.modules()]
    handles = [getattr(module, name).register_forward_hook(_as_one) for module, name in names if name]
    with hooked(handles):
        yield


@dataclass(frozen=True)
class _One:
    """A list of one that stands for that of all images."""

    values: Tensor

    def __iter__(self) -> Iterator[Tensor]:
        yield self.values.flatten(0, 1)


def _as_one(module: nn.Module, args: Any, output: Tensor) -> _One:
    return _One(output)
