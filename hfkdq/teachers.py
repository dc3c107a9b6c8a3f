# SPDX-License-Identifier: Apache-2.0
"""A frozen model to learn from: where it runs, what it is fed, and that its answers are numbers.

Knows accelerate and batches; objectives and the trainer ask it for outputs.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel


def forward_columns(model: nn.Module) -> set[str]:
    """Names of what the forward pass of `model` takes."""
    return set(inspect.signature(model.forward).parameters)


def requested(needs: frozenset[str]) -> dict[str, bool]:
    """Arguments that make a model return what objectives need."""
    return {f"output_{name}": True for name in ("hidden_states", "attentions") if name in needs}


class FrozenTeacher:
    """A teacher in eval mode, without gradients, on the device and in the precision of the training.

    Args:
        model (`PreTrainedModel`): the teacher; frozen in place.
        accelerator (`Accelerator`): that of the trainer.
        label_names (list of `str`): columns that are never fed to it.
    """

    def __init__(self, model: PreTrainedModel, accelerator: Accelerator, label_names: list[str]) -> None:
        model.eval().requires_grad_(False)
        self.columns = forward_columns(model) - set(label_names)
        prepared = len(accelerator._models)
        self._model = accelerator.prepare_model(model, evaluation_mode=True)
        # Trainer.evaluate() prepares the student only while this list is empty.
        del accelerator._models[prepared:]
        self._nan_step: int | torch.Tensor = 0

    def __call__(self, batch: Mapping[str, Any], needs: frozenset[str], step: int) -> Any:
        """The teacher's output for a batch of optimizer step `step`, counted from 1."""
        inputs = {name: value for name, value in batch.items() if name in self.columns}
        if "use_cache" in self.columns:
            inputs["use_cache"] = False
        self._model.eval()
        with torch.no_grad():
            output = self._model(**inputs, **requested(needs), return_dict=True)
        self._check_finite(output.get("logits"), step)
        return output

    def _check_finite(self, logits: torch.Tensor | None, step: int) -> None:
        """Remembers the first step at which a logit was not finite; on the CPU raises at once."""
        if logits is None:
            return
        bad = ~torch.isfinite(logits).all()
        if bad.device.type == "cpu":
            self._nan_step = step if bad else 0
            self.raise_if_nan()
        else:  # Asking a GPU costs a synchronisation; the trainer does it once per logging step.
            before = torch.as_tensor(self._nan_step, device=bad.device)
            self._nan_step = torch.where(bad & (before == 0), step, before)

    def raise_if_nan(self) -> None:
        """Raises if any output since the last call was not finite.

        Raises:
            RuntimeError: naming the first such step.
        """
        step, self._nan_step = int(self._nan_step), 0
        if step:
            raise RuntimeError(
                f"The teacher's logits were NaN or infinite at step {step}, so there is nothing to learn from them. "
                "Check the teacher's weights and that step's inputs; a teacher in float16 may overflow, try bfloat16 "
                "or float32."
            )
