# SPDX-License-Identifier: Apache-2.0
"""Measured facts about a compressed model, and what is rendered from them: tables, the model card, the plot.

Loads its parts when they are first used, so that the process that times an ONNX file carries no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..measuring.latency import Latency
    from .compression import CompressionReport, DatasetInfo, Engine, Layer, Mistake, Sample
    from .measure import Candidate

__all__ = ["Candidate", "CompressionReport", "DatasetInfo", "Engine", "Latency", "Layer", "Mistake", "Sample"]


def __getattr__(name: str) -> Any:
    if name == "Candidate":
        from . import measure

        return measure.Candidate
    if name in __all__:
        from . import compression

        return getattr(compression, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
