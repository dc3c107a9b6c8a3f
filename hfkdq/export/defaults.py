# SPDX-License-Identifier: Apache-2.0
"""Inputs that say nothing, for those that are not given; neither torch nor ONNX Runtime is imported for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
_DEFAULTS = {"attention_mask": 1, "token_type_ids": 0}


def neutral(name: str, inputs: Mapping[str, Array]) -> Array | None:
    """What a model takes an input for that it is not given, as masks that hide nothing; `None` if there is no such value."""
    if name == "pixel_mask" and "pixel_values" in inputs:
        shape = inputs["pixel_values"].shape
        return np.ones((shape[0], *shape[-2:]), np.int64)
    like = next((inputs[main] for main in ("input_ids", "input_values") if main in inputs), None)
    if like is not None and name == "position_ids":
        return np.broadcast_to(np.arange(like.shape[-1]), like.shape)
    return None if like is None or name not in _DEFAULTS else np.full(like.shape, _DEFAULTS[name], np.int64)
