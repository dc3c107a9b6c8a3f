# SPDX-License-Identifier: Apache-2.0
"""A teacher's outputs, computed once and kept as columns of a dataset, so that training needs no teacher."""

from .info import CachedOutput, CacheInfo, cache_info
from .targets import generate_targets
from .teacher import CachedCollator, CachedTeacher
from .writer import cache_teacher_outputs

__all__ = [
    "CacheInfo", "CachedCollator", "CachedOutput", "CachedTeacher", "cache_info", "cache_teacher_outputs",
    "generate_targets",
]  # fmt: skip
