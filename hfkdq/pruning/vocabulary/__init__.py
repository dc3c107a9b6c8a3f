# SPDX-License-Identifier: Apache-2.0
"""Vocabulary pruning: tokens that a corpus does not use leave a model and its tokenizer together."""

from .prune import prune_vocabulary

__all__ = ["prune_vocabulary"]
