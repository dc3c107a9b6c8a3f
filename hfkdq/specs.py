# SPDX-License-Identifier: Apache-2.0
"""What a user asks for: frozen, validated descriptions of quantization and pruning.

Knows nothing of trainers, hubs or ONNX; the same spec drives training and export.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, TypeVar

from torch import nn

ModulePatterns = str | Sequence[str] | None
_Spec = TypeVar("_Spec", bound="_Serializable")


def module_matches(name: str, patterns: ModulePatterns) -> bool:
    """Whether a module name matches `patterns`, in the grammar of PEFT's `target_modules`.

    Args:
        name (`str`): dotted module name, as `model.named_modules()` gives it.
        patterns (`str` or list of `str`, *optional*): a string is a regular expression for the full name; a list
            holds names or their last parts (`"query"` matches `"encoder.layer.0.attention.self.query"`).

    Returns:
        `bool`: `False` for `None`.
    """
    if patterns is None:
        return False
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


class _Serializable:
    """`to_dict` and `from_dict` for the specs below; unknown keys are refused."""

    def to_dict(self) -> dict[str, Any]:
        """The spec as JSON-ready data; `from_dict` gives the equal spec back."""
        data = asdict(self)  # type: ignore[call-overload]
        return {key: list(value) if isinstance(value, tuple) else value for key, value in data.items()}

    @classmethod
    def from_dict(cls: type[_Spec], data: dict[str, Any]) -> _Spec:
        """The spec that `to_dict` described.

        Raises:
            ValueError: a key that is no field of this spec.
        """
        known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(data) - known)
        if unknown:
            raise ValueError(
                f"{cls.__name__} has no field {', '.join(unknown)}. Its fields are: {', '.join(sorted(known))}."
            )
        return cls(**data)


def _freeze_patterns(spec: Any) -> None:
    for name in ("target_modules", "exclude_modules"):
        value = getattr(spec, name)
        if value is None:
            continue
        if isinstance(value, str):
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"{name}={value!r} is not a regular expression: {error}.") from error
        elif not all(isinstance(item, str) for item in value):
            raise TypeError(f"{name} must be a regular expression or a list of module names, got {value!r}.")
        else:
            object.__setattr__(spec, name, tuple(value))


@dataclass(frozen=True, kw_only=True)
class QuantizationSpec(_Serializable):
    """How weights and activations become integers, in training and in the exported file.

    Weights of `nn.Linear` are symmetric int8 per output channel, `s = max|w| / 127`; tables of `nn.Embedding` are
    symmetric int8 per tensor. Activations that enter a linear layer are affine uint8 per tensor,
    `q = clamp(round(x / s) + z, 0, 255)`, after Jacob et al., "Quantization and Training of Neural Networks for
    Efficient Integer-Arithmetic-Only Inference" (2018).

    Args:
        weight_bits (`int`, defaults to 8): width of the weights. This release has 8.
        activation_bits (`int`, *optional*, defaults to 8): width of the activations, 8 or `None` for weight-only.
        range_estimator (`str`, defaults to `"moving_average"`): how the range of an activation is found.
            `"moving_average"` follows minimum and maximum of the batches exponentially, `"min_max"` keeps the widest
            seen, `"learned"` trains scale and zero point with the loss (Esser et al., "Learned Step Size
            Quantization", 2020; Bhalgat et al., "LSQ+", 2020), starting from the first batch.
        averaging_constant (`float`, defaults to 0.05): share of the newest batch in the moving average, in (0, 1].
        target_modules (`str` or list of `str`, *optional*): which modules, in the grammar of PEFT. All linear layers
            and embeddings by default.
        exclude_modules (`str` or list of `str`, *optional*): which of those to leave in floating point.

    Raises:
        ValueError: a width, range estimator or averaging constant that does not exist.

    Example:
        ```python
        >>> from hfkdq import QuantizationSpec
        >>> spec = QuantizationSpec(weight_bits=8, activation_bits=8, exclude_modules=["classifier"])
        >>> QuantizationSpec.from_dict(spec.to_dict()) == spec
        True

        ```
    """

    RANGE_ESTIMATORS: ClassVar[tuple[str, ...]] = ("moving_average", "min_max", "learned")

    weight_bits: int = 8
    activation_bits: int | None = 8
    range_estimator: str = "moving_average"
    averaging_constant: float = 0.05
    target_modules: ModulePatterns = None
    exclude_modules: ModulePatterns = None

    def __post_init__(self) -> None:
        if self.weight_bits != 8:
            raise ValueError(f"weight_bits={self.weight_bits!r}: this release quantizes weights to 8 bits. Use 8.")
        if self.activation_bits not in (8, None):
            raise ValueError(
                f"activation_bits={self.activation_bits!r}: this release quantizes activations to 8 bits, "
                "or not at all with None."
            )
        if self.range_estimator not in self.RANGE_ESTIMATORS:
            raise ValueError(
                f"range_estimator={self.range_estimator!r} does not exist. Use one of {', '.join(self.RANGE_ESTIMATORS)}."
            )
        if not 0.0 < self.averaging_constant <= 1.0:
            raise ValueError(f"averaging_constant must be in (0, 1], got {self.averaging_constant!r}.")
        _freeze_patterns(self)

    def selects(self, name: str, module: nn.Module) -> bool:
        """Whether this spec quantizes `module`, found under `name` in the model."""
        if not isinstance(module, (nn.Linear, nn.Embedding)) or module_matches(name, self.exclude_modules):
            return False
        return self.target_modules is None or module_matches(name, self.target_modules)


@dataclass(frozen=True, kw_only=True)
class PruningSpec(_Serializable):
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
        _freeze_patterns(self)
