# SPDX-License-Identifier: Apache-2.0
"""Recipes: what becomes of a model, as one YAML file of the nouns of Python. Knows no command line and reads no data."""

from .reading import dump, load, override, read
from .recipe import DataSection, ExportSection, PushSection, Recipe, ReportSection, StudentSection

__all__ = [
    "DataSection", "ExportSection", "PushSection", "Recipe", "ReportSection", "StudentSection", "dump", "load",
    "override", "read",
]  # fmt: skip
