# SPDX-License-Identifier: Apache-2.0
"""The exporter of the installed line of the ecosystem."""

from __future__ import annotations

import transformers
from packaging.version import Version

from .protocol import Backend


def load_backend() -> Backend:
    """The module that exports with the installed Transformers; `RuntimeError` if its packages are missing."""
    is_v5 = Version(transformers.__version__).major >= 5
    try:
        if is_v5:
            from . import exporters_backend

            return exporters_backend
        from . import optimum_backend

        return optimum_backend
    except ImportError as error:
        through, extra = "Optimum's exporter, optimum-onnx (transformers<4.58)", "optimum"
        if is_v5:
            through, extra = "transformers.exporters with onnxscript and ONNX Runtime", "onnx"
        raise RuntimeError(
            f"export_onnx with transformers {transformers.__version__} goes through {through}, which failed to import: "
            f'{error}. Install it: pip install "hfkdq[{extra}]"'
        ) from error
