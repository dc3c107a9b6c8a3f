# SPDX-License-Identifier: Apache-2.0
"""Pruning: removes the least important units of a model, at once or while it trains."""

from .callback import PruningCallback
from .clustering import cluster_weights
from .file_size import compressed_size
from .finishing import load_pruned
from .fitting import fit_sparsity
from .one_shot import prune
from .sharing import share_layers, unshare_layers_
from .vocabulary import prune_vocabulary

__all__ = [
    "PruningCallback", "cluster_weights", "compressed_size", "fit_sparsity", "load_pruned", "prune",
    "prune_vocabulary", "share_layers", "unshare_layers_",
]  # fmt: skip
