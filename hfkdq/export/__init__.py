# SPDX-License-Identifier: Apache-2.0
"""Writing a model as an ONNX file that is proven equal to it, and running such a file.

Loads its parts when they are first used, so that `hfkdq.export.runtime` works where torch is not wanted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import export_onnx
    from .openvino_runtime import OpenVinoSession
    from .runtime import OnnxSession

__all__ = ["OnnxSession", "OpenVinoSession", "export_onnx"]


def __getattr__(name: str) -> Any:
    if name == "export_onnx":
        from .api import export_onnx

        return export_onnx
    if name == "OnnxSession":
        from .runtime import OnnxSession

        return OnnxSession
    if name == "OpenVinoSession":
        from .openvino_runtime import OpenVinoSession

        return OpenVinoSession
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
