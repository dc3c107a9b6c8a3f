# SPDX-License-Identifier: Apache-2.0
"""Forward passes that objectives take by themselves, before the one on the batch as it is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..modeling.forwards import statistics_kept

if TYPE_CHECKING:
    from .mixin import DistillationMixin

_LOGITS = frozenset({"logits"})


class TermPasses:
    """The student and one teacher, as an objective runs them.

    Args:
        trainer (`DistillationMixin`): the trainer.
        wrapped (`nn.Module`): its student, as wrapped for the training.
        source (`str`): the name of the teacher; empty for an objective that uses none.
    """

    def __init__(self, trainer: DistillationMixin, wrapped: nn.Module, source: str) -> None:
        self._trainer, self._wrapped = trainer, wrapped
        self._source = source
        self.model: Any = trainer.model
        self.teacher_model: Any = trainer.models_of_teachers.get(source)

    def student(
        self, batch: Mapping[str, Any], needs: frozenset[str] = _LOGITS, indices: Mapping[str, Any] | None = None
    ) -> Any:
        """The student's output for a batch, without a task loss; its running statistics stay as they are."""
        inputs = self._trainer.student_inputs({key: value for key, value in batch.items() if key != "labels"})
        with statistics_kept(self._wrapped):
            return self._trainer.run_learner(self._wrapped, inputs, needs - {"loss"}, _both(indices))

    def teacher(
        self, batch: Mapping[str, Any], needs: frozenset[str] = _LOGITS, indices: Mapping[str, Any] | None = None
    ) -> Any:
        """The teacher's output for a batch, without a gradient."""
        is_model = isinstance(self.teacher_model, nn.Module)  # else there are cached outputs
        kept = statistics_kept(self.teacher_model) if is_model else contextlib.nullcontext()
        with torch.no_grad(), kept:
            return self._trainer.ask(self._source, dict(batch), needs, _both(indices))


def _both(indices: Mapping[str, Any] | None) -> dict[str, Any]:
    return {"hidden_states": None, "attentions": None, **(indices or {})}


@contextlib.contextmanager
def not_synchronised(model: nn.Module) -> Iterator[None]:
    """Lets a forward pass precede another one in the same step: processes exchange buffers and gradients once."""
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    else:
        yield
