# SPDX-License-Identifier: Apache-2.0
"""Which exporter the installed line of the ecosystem has."""

from __future__ import annotations

from typing import Any

import transformers
from packaging.version import Version


def load_backend() -> Any:
    """The module that exports with the installed Transformers.

    Raises:
        RuntimeError: what it needs is not installed.
    """
    if Version(transformers.__version__).major >= 5:
        try:
            from . import exporters_backend
        except ImportError as error:
            raise RuntimeError(
                _missing("transformers.exporters with onnxscript and ONNX Runtime", "onnx", error)
            ) from error
        return exporters_backend
    try:
        from . import optimum_backend
    except ImportError as error:
        raise RuntimeError(
            _missing("Optimum's exporter, optimum-onnx (transformers<4.58)", "optimum", error)
        ) from error
    return optimum_backend


def _missing(what: str, extra: str, error: ImportError) -> str:
    return (
        f"export_onnx with transformers {transformers.__version__} goes through {what}, which failed to import: {error}. "
        f'Install it: pip install "hfkdq[{extra}]"'
    )
