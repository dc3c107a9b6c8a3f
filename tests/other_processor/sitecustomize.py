# SPDX-License-Identifier: Apache-2.0
"""What Python imports at its start when this folder is on PYTHONPATH: once torch is imported, it becomes another processor."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path


class _WithTorch:
    """Finds torch as ever, and switches its kernels when it has been executed."""

    def find_spec(self, name, path=None, target=None):
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            there = Path(__file__).with_name("__init__.py")
            spec = importlib.util.spec_from_file_location("tests_other_processor", there)
            kernels = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(kernels)
            kernels.switch_on(int(os.environ[kernels.VARIABLE]))

        spec.loader.exec_module = exec_module
        return spec


if os.environ.get("HFKDQ_TEST_SUMS"):
    sys.meta_path.insert(0, _WithTorch())
