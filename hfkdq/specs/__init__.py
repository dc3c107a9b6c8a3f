# SPDX-License-Identifier: Apache-2.0
"""Frozen, validated descriptions of quantization and pruning."""

from .base import ModulePatterns, module_matches, unmatched
from .pruning import PruningSpec
from .quantization import QuantizationScheme, QuantizationSpec, override_matches

__all__ = [
    "ModulePatterns", "PruningSpec", "QuantizationScheme", "QuantizationSpec", "module_matches", "override_matches",
    "unmatched",
]  # fmt: skip
