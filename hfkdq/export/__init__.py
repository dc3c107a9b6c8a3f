# SPDX-License-Identifier: Apache-2.0
"""Writing a model as an ONNX file that is proven equal to it, and running such a file.

Loads its parts when they are first used, so that `hfkdq.export.runtime` works where torch is not wanted.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import export_onnx
    from .openvino_runtime import OpenVinoSession
    from .runtime import OnnxSession

__all__ = ["OnnxSession", "OpenVinoSession", "export_onnx"]
_HOMES = {"OnnxSession": "runtime", "OpenVinoSession": "openvino_runtime", "export_onnx": "api"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
