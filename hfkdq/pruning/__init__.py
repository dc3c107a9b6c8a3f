# SPDX-License-Identifier: Apache-2.0
"""Pruning: weights or neurons that matter least are zeroed while the model trains, and neurons then removed.

Knows specs and the structure of models, and of the Trainer only its callbacks.
"""

from .callback import PruningCallback
from .one_shot import prune

__all__ = ["PruningCallback", "prune"]
