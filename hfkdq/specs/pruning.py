# SPDX-License-Identifier: Apache-2.0
"""`PruningSpec`: the structures to remove, how many, by which criterion, and when."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..fields import check_fields
from ..schedules import Cubic, Exponential, Linear
from .base import ModulePatterns, Serializable, as_text, freeze_patterns


@dataclass(frozen=True, kw_only=True)
class PruningSpec(Serializable):
    """Says which units are pruned from a model, how many, by which criterion, and when.

    | structure | units that are pruned | file and latency |
    |---|---|---|
    | `"weight"` | single weights | zeros; smaller after ordinary compression |
    | `"n:m"` | all but `n` of every `m` weights in a row | zeros, for hardware that skips them |
    | `"block"` | blocks of weights | zeros |
    | `"neuron"` | neurons of the feed-forward layers | smaller and faster |
    | `"head"` | attention heads, with the keys they share | smaller and faster |
    | `"channel"` | channels of convolutions with all that they are added to; of ResNet and ConvNeXt those inside a block | smaller and faster |
    | `"layer"` | whole layers | smaller and faster |
    | `"hidden"` | channels of the hidden width, through all layers | smaller and faster |
    | `"vocab"` | tokens that a corpus does not use | smaller |

    Where no name tells what a model is made of, as in a class of your own, neurons and channels are found by following a batch
    through it: one made up from the configuration, or `example_inputs` of [`prune`] and [`PruningCallback`].

    Criteria, for a unit with the weights w, gradients g and inputs x; sums are over all weights, biases and norms of the unit,
    and E is the mean over batches (in training over optimizer steps, where one that lies 100 steps back counts a third):

    - `"magnitude"`: `|w|`, or the L2 norm of all weights of a unit;
    - `"random"`: the control;
    - `"activation"`: `|w| * ||x||`, summed over the weights that read a unit, with the root mean square of x over all positions,
      padding too. Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (Wanda, 2023). Of a
      `"layer"` the mean of `1 - cos(input, output)`: Men et al., "ShortGPT" (2024);
    - `"taylor"`: `E |sum of w * g|`, the change of the loss to first order. Molchanov et al., "Importance Estimation for
      Neural Network Pruning" (2019);
    - `"fisher"`: `E sum of (w * g) ** 2`, to second order with the diagonal of the empirical Fisher information, which is
      that of Theis et al., "Faster gaze prediction with dense networks and Fisher pruning" (2018), for batches of one example.
      Of single weights it is the mean square where `"taylor"` is the mean size: they rank alike on one batch, and large
      gradients of few batches count more;
    - `"movement"`: `-sum over steps of w * g`, what training has moved away from zero. Sanh et al., "Movement Pruning" (2020);
    - `"teacher"`: `"taylor"` with the gradient of the cross-entropy to labels drawn from a teacher's predictions, the true labels
      left out; of numbers and boxes, of the squares around drawn ones. Where model and teacher are equal, the mean of g
      squared is the Fisher information of what the teacher says.

    Training reaches the sparsity along `schedule` between `begin` and `end`, with t the share of that way gone:
    `"cubic"` is `sparsity * (1 - (1 - t) ** 3)` (Zhu and Gupta, "To prune, or not to prune", 2017), `"exponential"`
    `1 - (1 - sparsity) ** t` (the same share of what is left in every step), `"linear"` `sparsity * t`.

    Args:
        sparsity (`float`, *optional*): share of the units to remove, in [0, 1). For `"n:m"` the pattern says it; for
            `"vocab"` at most this share goes, all unused tokens by default.
        structure (`str`, defaults to `"weight"`): the units that are pruned, from the table.
        criterion (`str`, defaults to `"magnitude"`): what makes a unit matter, from the list.
        ranking (`str`, defaults to `"local"`): `"local"`: the same share goes from every module, or stack of layers;
            `"global"`: all units of the model compete, and each of those keeps one at least.
        cut (`str`, defaults to `"remove"`): the removal mode. `"remove"`: zero at once, and out of the shapes
            at the end; `"mask"`: zero, the shapes stay; `"decay"`: fades to zero while training goes on, then as
            `"remove"`; `"mean"`: replaced by its mean, which goes into the biases behind it, then as `"remove"`.
        schedule (`str`, defaults to `"cubic"`): how the sparsity grows.
        rounds (`int`, *optional*): in how many jumps it grows, with training between them; 1 is all at `begin`. By
            default with every optimizer step (for `"teacher"`, which looks at data at every jump, 8).
        begin (`float`, defaults to 0.0): progress of training at which pruning starts, in [0, 1].
        end (`float`, defaults to 0.7): progress at which the full sparsity is reached; the rest is recovery.
        multiple_of (`int`, defaults to 1): what the number of units that stay in each module is a multiple of, the nearest one that it
            has; for `"neuron"`, `"channel"` and `"hidden"` with `ranking="local"`. Kernels of convolutions work in blocks of 8 or 16
            channels, and can be slower with 20 than with 24.
        pattern (`str`, *optional*): for `"n:m"`, `"2:4"` by default; for `"block"` rows x columns, `"4x4"` by default.
        target_modules (`str` or list of `str`, *optional*): which modules, in the grammar of PEFT. By default all linear
            layers, convolutions and experts of the layer stacks, all feed-forward layers, all attentions; convolutions beside a
            stack of layers lose channels only where they are named.
        exclude_modules (`str` or list of `str`, *optional*): which of those to leave alone.
        plain_checkpoint (`bool`, defaults to `True`): refuse what the model's configuration cannot describe, so that
            `from_pretrained` loads the result. `False` allows it; [`load_pruned`] loads that.
        seed (`int`, defaults to 0): of the order in which `"random"` cuts, and of the labels that `"teacher"` draws.

    Raises:
        ValueError: a sparsity outside [0, 1), an unknown name, `begin` not before `end`, or fields that contradict one
            another.

    Example:
        ```python
        >>> from hfkdq import PruningSpec
        >>> PruningSpec(sparsity=0.5, structure="neuron").end
        0.7
        >>> PruningSpec(structure="n:m", pattern="2:4").sparsity
        0.5

        ```
    """

    # Each with how a model card goes on after the share.
    STRUCTURES: ClassVar[dict[str, str]] = {
        "weight": "of the weights of the pruned layers are zero; their shapes are unchanged",
        "n:m": "of the weights of the pruned layers are zero, {pattern}; their shapes are unchanged",
        "block": "of the weights of the pruned layers are zero, in blocks of {pattern}; shapes are unchanged",
        "neuron": "of the feed-forward neurons of every layer are removed, so the layers are smaller",
        "head": "of the attention heads are removed",
        "layer": "of the layers are removed",
        "hidden": "of the hidden width is removed, in all layers",
        "vocab": "of the vocabulary, which a corpus did not use, is removed",
        "channel": "of the inner channels of convolutional blocks are removed",
    }
    CRITERIA: ClassVar[tuple[str, ...]] = (
        "magnitude", "random", "activation", "taylor", "fisher", "movement", "teacher",
    )  # fmt: skip
    RANKINGS: ClassVar[tuple[str, ...]] = ("local", "global")
    CUTS: ClassVar[tuple[str, ...]] = ("remove", "mask", "decay", "mean")
    SCHEDULES: ClassVar[tuple[str, ...]] = ("cubic", "exponential", "linear")

    sparsity: float | None = None
    structure: str = "weight"
    criterion: str = "magnitude"
    ranking: str = "local"
    cut: str = "remove"
    schedule: str = "cubic"
    rounds: int | None = None
    begin: float = 0.0
    end: float = 0.7
    multiple_of: int = 1
    pattern: str | None = None
    target_modules: ModulePatterns = None
    exclude_modules: ModulePatterns = None
    plain_checkpoint: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        for field in ("structure", "criterion", "ranking", "cut", "schedule"):
            known = getattr(self, {"criterion": "CRITERIA"}.get(field, f"{field.upper()}S"))
            if getattr(self, field) not in known:
                raise ValueError(f"{field}={getattr(self, field)!r} does not exist. Use one of {', '.join(known)}.")
        self._check_pattern()
        if self.sparsity is None and self.structure != "vocab":
            raise ValueError(f"structure={self.structure!r} needs a sparsity in [0, 1). For one half use 0.5.")
        if self.sparsity is not None and not 0.0 <= self.sparsity < 1.0:
            raise ValueError(f"sparsity must be in [0, 1), got {self.sparsity!r}. For half of the weights use 0.5.")
        if not 0.0 <= self.begin < self.end <= 1.0:
            raise ValueError(f"Need 0 <= begin < end <= 1, got begin={self.begin!r} and end={self.end!r}.")
        if self.rounds is not None and (type(self.rounds) is not int or self.rounds < 1):
            raise ValueError(f"rounds must be a whole number from 1 on, or None, got {self.rounds!r}.")
        if type(self.multiple_of) is not int or self.multiple_of < 1:
            raise ValueError(f"multiple_of must be a whole number from 1 on, got {self.multiple_of!r}.")
        self._check_together()
        freeze_patterns(self)

    def _check_pattern(self) -> None:
        if self.structure not in ("n:m", "block"):
            if self.pattern is not None:
                raise ValueError(f"pattern is for structure='n:m' and 'block', not for {self.structure!r}.")
            return
        sign = ":" if self.structure == "n:m" else "x"
        if self.pattern is None:
            object.__setattr__(self, "pattern", f"2{sign}4" if sign == ":" else "4x4")
        first, _, second = str(self.pattern).partition(sign)
        if not (first.isdecimal() and second.isdecimal() and int(first) and int(second)):
            example = "'2:4'" if sign == ":" else "'4x4' (rows x columns)"
            raise ValueError(f"pattern={self.pattern!r} does not fit structure={self.structure!r}. Use {example}.")
        if sign == ":":
            n, m = int(first), int(second)
            if n >= m:
                raise ValueError(f"pattern={self.pattern!r} must keep fewer weights than it has: n < m, as in '2:4'.")
            if self.sparsity not in (None, 1.0 - n / m):
                told = f"pattern={self.pattern!r} is a sparsity of {1.0 - n / m}"
                raise ValueError(f"{told}, not {self.sparsity}. Leave sparsity out.")
            object.__setattr__(self, "sparsity", 1.0 - n / m)

    def _check_together(self) -> None:
        where = f"structure={self.structure!r}"
        if self.structure in ("layer", "hidden") and self.cut != "remove":
            raise ValueError(f"{where} cannot be cut={self.cut!r}: that changes the shapes of a model. Use 'remove'.")
        if self.cut == "mean" and self.structure not in ("neuron", "head"):
            raise ValueError(f"cut='mean' is for neurons and heads, whose readers have a bias; not for {where}.")
        if self.criterion == "activation" and self.structure == "hidden":
            raise ValueError(
                f"{where} has no input of its own for criterion='activation'. Use 'taylor' or 'magnitude'."
            )
        if self.structure in ("layer", "hidden", "vocab") and (self.target_modules or self.exclude_modules):
            raise ValueError(f"{where} goes through the whole model, without target_modules or exclude_modules.")
        if self.ranking == "global" and self.structure in ("n:m", "hidden"):
            raise ValueError(f"{where} has one ranking only: leave ranking='local'.")
        if self.multiple_of > 1 and (self.structure not in ("neuron", "channel", "hidden") or self.ranking != "local"):
            raise ValueError(
                f"multiple_of is for structure='neuron', 'channel' and 'hidden' with ranking='local', not for {where} with "
                f"ranking={self.ranking!r}. Leave it out."
            )
        if self.structure == "vocab" and (self.criterion, self.cut) != ("magnitude", "remove"):
            raise ValueError(f"{where} removes the rarest tokens of a corpus; leave criterion and cut out.")

    @classmethod
    def describe(cls, settings: Mapping[str, Any], code: Callable[..., str] = as_text) -> str:
        """A recorded spec in words that follow a share: `"of the attention heads are removed; chosen by taylor"`.

        Args:
            settings (`dict`): what [`~PruningSpec.to_dict`] gave, of this or another release.
            code (`Callable`, *optional*): writes values, given side by side, as code.
        """
        structure, cut = settings.get("structure"), settings.get("cut", "remove")
        words = cls.STRUCTURES.get(structure or "", "of the units are pruned")
        covered = {"sparsity", "pattern", "criterion"} | ({"structure"} if structure in cls.STRUCTURES else set())
        if cut == "mask" and " are removed" in words:
            words = words.split(" are removed")[0] + " are zero; shapes are unchanged"
        text = words.format(pattern=settings.get("pattern"))
        if "criterion" in settings and structure != "vocab":
            text += f"; chosen by {settings['criterion']}"
        return text + cls.describe_rest(settings, covered | ({"cut"} if cut == "mask" else set()), code)

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns of the block of weights that is one unit, `(1, 1)` for single weights."""
        if self.structure != "block":
            return (1, 1)
        rows, _, columns = str(self.pattern).partition("x")
        return (int(rows), int(columns))

    @property
    def kept_of(self) -> tuple[int, int] | None:
        """The `(n, m)` of `"n:m"`."""
        if self.structure != "n:m":
            return None
        n, _, m = str(self.pattern).partition(":")
        return (int(n), int(m))

    @property
    def removes(self) -> bool:
        """Whether units go out of the shapes of the model, not only to zero."""
        return self.cut != "mask" and self.structure not in ("weight", "n:m", "block")

    def sparsity_at(self, progress: float) -> float:
        """The sparsity that is due at `progress` of training, in [0, 1]."""
        final = self.sparsity or 0.0
        done = (progress - self.begin) / (self.end - self.begin)
        rounds = self.rounds or (8 if self.criterion == "teacher" else None)
        if rounds is not None:
            # Round r of R goes from (r - 1) / R to r / R of the way, and has from its first step what is due at its end.
            done = math.ceil(done * rounds - 1e-9) / rounds
        if done >= 1.0:
            return final
        if self.schedule == "exponential":
            return 1.0 - Exponential(1.0, 1.0 - final)(done)
        return {"cubic": Cubic, "linear": Linear}[self.schedule](0.0, final)(done)
