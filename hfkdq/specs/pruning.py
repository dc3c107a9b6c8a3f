# SPDX-License-Identifier: Apache-2.0
"""Which weights go, how many, and when.

Knows nothing of trainers or files; the same spec drives training and the one-shot verb.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import ModulePatterns, Serializable, freeze_patterns


@dataclass(frozen=True, kw_only=True)
class PruningSpec(Serializable):
    """Which weights go, how many, and when.

    The sparsity follows the cubic schedule of Zhu and Gupta, "To prune, or not to prune" (2017):
    `s(t) = sparsity * (1 - (1 - (t - begin) / (end - begin)) ** 3)`, with t the progress of training in [0, 1].

    Args:
        sparsity (`float`): share of the weights or neurons to remove from each pruned module, in [0, 1).
        structure (`str`, defaults to `"weight"`): `"weight"` zeroes single weights of linear layers (shapes stay);
            `"neuron"` removes neurons of the feed-forward layers, the same number in every layer, so that the
            model's own configuration describes the result.
        criterion (`str`, defaults to `"magnitude"`): what makes a weight matter. `"magnitude"` is |w|; for neurons the
            L2 norm of all weights that enter and leave one.
        begin (`float`, defaults to 0.0): progress of training at which pruning starts.
        end (`float`, defaults to 0.7): progress at which the full sparsity is reached; the rest is recovery.
        target_modules (`str` or list of `str`, *optional*): which linear layers, in the grammar of PEFT; for
            `structure="weight"` alone. All of the encoder and decoder layers by default.
        exclude_modules (`str` or list of `str`, *optional*): which of those to leave alone.

    Raises:
        ValueError: a sparsity outside [0, 1), an unknown structure or criterion, or `begin` not before `end`.

    Example:
        ```python
        >>> from hfkdq import PruningSpec
        >>> PruningSpec(sparsity=0.5, structure="neuron").end
        0.7

        ```
    """

    STRUCTURES: ClassVar[tuple[str, ...]] = ("weight", "neuron")
    CRITERIA: ClassVar[tuple[str, ...]] = ("magnitude",)

    sparsity: float
    structure: str = "weight"
    criterion: str = "magnitude"
    begin: float = 0.0
    end: float = 0.7
    target_modules: ModulePatterns = None
    exclude_modules: ModulePatterns = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.sparsity < 1.0:
            raise ValueError(f"sparsity must be in [0, 1), got {self.sparsity!r}. For half of the weights use 0.5.")
        if self.structure not in self.STRUCTURES:
            raise ValueError(f"structure={self.structure!r} does not exist. Use one of {', '.join(self.STRUCTURES)}.")
        if self.criterion not in self.CRITERIA:
            raise ValueError(f"criterion={self.criterion!r} does not exist. Use one of {', '.join(self.CRITERIA)}.")
        if not 0.0 <= self.begin < self.end <= 1.0:
            raise ValueError(f"Need 0 <= begin < end <= 1, got begin={self.begin!r} and end={self.end!r}.")
        if self.structure == "neuron" and (self.target_modules is not None or self.exclude_modules is not None):
            raise ValueError(
                "structure='neuron' prunes every feed-forward layer alike, so that the model's configuration can "
                "describe the result; target_modules and exclude_modules are for structure='weight'."
            )
        freeze_patterns(self)
