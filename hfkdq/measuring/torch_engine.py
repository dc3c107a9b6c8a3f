# SPDX-License-Identifier: Apache-2.0
"""A checkpoint in PyTorch, as the process that times it calls it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..modeling import load_checkpoint


def torch_call(folder: str, inputs: dict[str, np.ndarray[Any, Any]], threads: int) -> Callable[[], Any]:
    """What runs the model of the checkpoint in a folder once, on a batch and with the threads that PyTorch may use."""
    torch.set_num_threads(threads)
    model = load_checkpoint(folder, dtype="auto").eval()
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    tensors = {name: t.to(model.dtype) if t.is_floating_point() else t for name, t in tensors.items()}

    def call() -> Any:
        with torch.inference_mode():
            return model(**tensors)

    return call
